"""Model folders on disk, and conversion between PyTorch and Orbax checkpoints."""
