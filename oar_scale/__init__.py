"""oar_scale: ordered autoregressive image generation, trained at scale."""

__version__ = "0.1.0"
