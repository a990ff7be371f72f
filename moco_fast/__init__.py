"""Momentum Contrast: two views of every sample in, an image encoder out."""

__version__ = "0.1.0"
