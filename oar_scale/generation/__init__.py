"""Sampling and editing, and ``oar_scale.load``."""
