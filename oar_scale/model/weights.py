"""An any-order model in one safetensors file, and a model made of tensors that exist already."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from pydantic import ValidationError
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model.spec import ModelSpec
from oar_scale.model.transformer import AnyOrderModel
from oar_scale.storage import open_storage
from oar_scale.tokenizers.safetensors_file import load_weights, read_header, save_weights

_KIND = "any-order model"


def save_model(uri: str, model: AnyOrderModel, *, half: bool = False) -> None:
    """Write a model as safetensors, its :class:`ModelSpec` in the metadata; ``half`` stores matrices in bfloat16."""
    save_tensors(uri, model.spec, model.state_dict(), half=half)


def save_tensors(uri: str, spec: ModelSpec, tensors: dict[str, Tensor], *, half: bool = False) -> None:
    """:func:`save_model` of a model that is nowhere whole: its spec, and its state dict."""
    save_weights(uri, tensors, {"kind": _KIND, "spec": spec.model_dump_json()}, half=half)


def read_spec(uri: str) -> ModelSpec:
    """The spec that :func:`save_model` wrote; its tensors are not read. Raises as :func:`load_model`."""
    return _spec(uri, read_header(uri, _KIND))


def load_model(uri: str, *, as_stored: bool = False) -> AnyOrderModel:
    """Read what :func:`save_model` wrote: eval mode, CPU, float32 or, ``as_stored``, in the dtypes of the file.

    Raises:
        UserError: no such file, another kind of file, or tensors that do not fit the spec.
    """
    tensors, spec = load_weights(uri, _KIND)
    if not as_stored:
        for name in tensors:
            # Copied even where it is float32 already: a file's bytes lie at any address, and the last bits of a product depend on that.
            tensors[name] = tensors[name].to(torch.float32, copy=True)
    return model_of(_spec(uri, spec), tensors, uri)


def _spec(uri: str, stored: str) -> ModelSpec:
    try:
        return ModelSpec.model_validate_json(stored)
    except ValidationError as error:
        raise UserError(f"{uri}: the sizes of this model are not understood; another version of oar_scale wrote them ({stored})") from error


def model_of(spec: ModelSpec, tensors: dict[str, Tensor], where: str, shown: Callable[[str], str] = str) -> AnyOrderModel:
    """A model, in eval mode, whose parameters are these very tensors: nothing is copied, and nothing drawn to be overwritten.

    Args:
        tensors: a state dict; its dtypes and devices become the model's.
        where: names the file in errors.
        shown: what the file calls a tensor.

    Raises:
        UserError: names the first tensor that does not fit the spec, and both shapes.
    """
    with torch.device("meta"):
        model = AnyOrderModel(spec)
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        here = tuple(tensors[name].shape) if name in tensors else "absent"
        wanted = tuple(expected[name].shape) if name in expected else "absent"
        if here != wanted:
            raise UserError(f"{where}: tensor {shown(name)} is {here} in the file, the model has {wanted}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def model_id(uri: str) -> str:
    """The first 16 hex digits of the SHA-256 of a weights file: how order tables and checkpoints name a model."""
    return hashlib.sha256(open_storage(uri).read(uri)).hexdigest()[:16]
