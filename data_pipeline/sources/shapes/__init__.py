"""Synthetic dataset: rendered scenes of coloured shapes with MUSE-like questions."""
