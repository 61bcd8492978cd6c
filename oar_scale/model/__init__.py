"""The any-order transformer. Needs torch alone: no ray, no deepspeed."""

from oar_scale.model.decoding import Candidates, Prefix
from oar_scale.model.spec import ModelSpec, check_prompts
from oar_scale.model.transformer import AnyOrderModel
from oar_scale.model.weights import load_model, model_id, save_model

__all__ = ["AnyOrderModel", "Candidates", "ModelSpec", "Prefix", "check_prompts", "load_model", "model_id", "save_model"]
