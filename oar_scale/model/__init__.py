"""The any-order transformer. Needs torch alone, no ray or deepspeed; its spec and formulas (``spec``, ``flops``) not even that."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oar_scale.model.decoding import Candidates, Decoder, Prefix
    from oar_scale.model.spec import ModelSpec, check_prompts
    from oar_scale.model.transformer import AnyOrderModel
    from oar_scale.model.weights import load_model, model_id, save_model

__all__ = ["AnyOrderModel", "Candidates", "Decoder", "ModelSpec", "Prefix", "check_prompts", "load_model", "model_id", "save_model"]
_HOME = {
    "decoding": ("Candidates", "Decoder", "Prefix"),
    "spec": ("ModelSpec", "check_prompts"),
    "transformer": ("AnyOrderModel",),
    "weights": ("load_model", "model_id", "save_model"),
}


def __getattr__(name: str) -> object:
    """A name of ``__all__``, from the module that has it: torch is imported when something needs it."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
