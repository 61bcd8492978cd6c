"""An any-order model in one safetensors file."""

from __future__ import annotations

import hashlib

import torch

from oar_scale.errors import UserError
from oar_scale.model.spec import ModelSpec
from oar_scale.model.transformer import AnyOrderModel
from oar_scale.storage import open_storage
from oar_scale.tokenizers.weights import load_weights, save_weights


def save_model(uri: str, model: AnyOrderModel, *, half: bool = False) -> None:
    """Write a model as safetensors, its :class:`ModelSpec` in the metadata; ``half`` stores matrices in bfloat16."""
    save_weights(uri, model.state_dict(), {"kind": "any-order model", "spec": model.spec.model_dump_json()}, half=half)


def load_model(uri: str) -> AnyOrderModel:
    """Read what :func:`save_model` wrote: eval mode, float32, CPU.

    Raises:
        UserError: no such file, another kind of file, or tensors that do not fit the spec.
    """
    tensors, spec = load_weights(uri, "any-order model")
    model = AnyOrderModel(ModelSpec.model_validate_json(spec))
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        here = tuple(tensors[name].shape) if name in tensors else "absent"
        wanted = tuple(expected[name].shape) if name in expected else "absent"
        if here != wanted:
            raise UserError(f"{uri}: tensor {name} is {here} in the file, the model has {wanted}")
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    return model.eval()


def model_id(uri: str) -> str:
    """The first 16 hex digits of the SHA-256 of a weights file: how order tables and checkpoints name a model."""
    return hashlib.sha256(open_storage(uri).read(uri)).hexdigest()[:16]
