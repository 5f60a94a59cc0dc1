"""Pixels on the host: reading, canvas geometry, run-length masks and overlays."""
