"""PyTorch checkpoints and Orbax checkpoints, converted in both directions."""
