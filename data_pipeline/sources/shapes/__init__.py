"""Drawn scenes of coloured shapes with MUSE-like questions."""
