"""For diffusers, which loads this folder with trust_remote_code=True. Needs: pip install 'oar_scale[diffusers]'."""

from oar_scale.generation.diffusers_pipeline import OrderedPipeline

__all__ = ["OrderedPipeline"]
