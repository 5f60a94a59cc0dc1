"""Pixel-level reasoning with large multimodal models: PixelLM in JAX."""

__version__ = "0.1.0"
