"""An any-order model as weights in safetensors, and a model made of tensors that exist already.

Neither writing nor reading holds a model twice: what is written comes one tensor at a time, from a model, from the shards of a
checkpoint, or drawn anew (:func:`fresh_weights`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model.spec import ModelSpec
from oar_scale.model.transformer import AnyOrderModel, modules_as_made
from oar_scale.storage import open_storage
from oar_scale.storage.background import in_order
from oar_scale.tokenizers.safetensors_file import SHARD_BYTES as SHARD_BYTES
from oar_scale.tokenizers.safetensors_file import StoredWeights, index_of, open_weights, write_weights
from oar_scale.tokenizers.without_values import without_values

_KIND = "any-order model"
_CHUNK_BYTES, _CONNECTIONS = 4 << 20, 4


def save_model(uri: str, model: AnyOrderModel, *, half: bool = False, shard_bytes: int | None = None) -> None:
    """Write a model as safetensors, its :class:`ModelSpec` in the metadata; ``half`` stores matrices in bfloat16.

    Args:
        shard_bytes: as :func:`~oar_scale.tokenizers.safetensors_file.write_weights`.
    """
    write_weights(uri, model.state_dict(), model.state_dict().items(), _metadata(model.spec), half=half, shard_bytes=shard_bytes)


def save_tensors(
    uri: str,
    spec: ModelSpec,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    half: bool = False,
    shard_bytes: int | None = None,
    scratch: str | None = None,
) -> None:
    """:func:`save_model` of a model that is nowhere whole: its spec, and the tensors of its state dict in any order, in float32.

    Other arguments as :func:`~oar_scale.tokenizers.safetensors_file.write_weights`.
    """
    shapes = meta_model(spec).state_dict()
    write_weights(uri, shapes, tensors, _metadata(spec), half=half, shard_bytes=shard_bytes, scratch=scratch)


def copy_weights(stored: StoredWeights, uri: str, *, shard_bytes: int) -> None:
    """Write weights as they are stored, in several files where they are larger than ``shard_bytes``; they keep their id."""
    identity = {"id": model_id(stored.uri)}
    write_weights(uri, stored.shapes, stored, {"kind": stored.kind, "spec": stored.spec, **identity}, shard_bytes=shard_bytes)


def fresh_weights(spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """The weights that ``AnyOrderModel(spec)`` would begin with, bit for bit, drawn when they are asked for, a module at a time."""
    model = meta_model(spec)
    for path, module in modules_as_made(model):
        module.to_empty(device="cpu", recurse=False)
        if module is not model and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{name}" if path else name, parameter.detach()
        module.to_empty(device="meta", recurse=False)


def meta_model(spec: ModelSpec) -> AnyOrderModel:
    """The model without values: names and shapes."""
    with without_values():
        return AnyOrderModel(spec)


def read_spec(uri: str) -> ModelSpec:
    """The spec that :func:`save_model` wrote; its tensors are not read. Raises as :func:`load_model`."""
    return open_model(uri)[0]


def open_model(uri: str) -> tuple[ModelSpec, StoredWeights]:
    """The spec of what :func:`save_model` wrote, and its tensors, which are read when they are asked for. Raises as :func:`load_model`."""
    stored = open_weights(uri, _KIND)
    try:
        spec = ModelSpec.model_validate_json(stored.spec)
    except ValidationError as error:
        raise UserError(
            f"{uri}: the sizes of this model are not understood; another version of oar_scale wrote them ({stored.spec})"
        ) from error
    fitting_model(spec, {name: info.shape for name, info in stored.infos.items()}, uri)
    return spec, stored


def load_model(uri: str, *, as_stored: bool = False) -> AnyOrderModel:
    """Read what :func:`save_model` wrote: eval mode, CPU, float32 or, ``as_stored``, in the dtypes of the file.

    Raises:
        UserError: no such file, another kind of file, or tensors that do not fit the spec.
    """
    spec, stored = open_model(uri)
    # Copied even where it is float32 already: a file's bytes lie at any address, and the last bits of a product depend on that.
    tensors = {name: tensor if as_stored else tensor.to(torch.float32, copy=True) for name, tensor in stored}
    return model_of(spec, tensors, uri)


def model_of(spec: ModelSpec, tensors: dict[str, Tensor], where: str, shown: Callable[[str], str] = str) -> AnyOrderModel:
    """A model, in eval mode, whose parameters are these very tensors: nothing is copied, and nothing drawn to be overwritten.

    Args:
        tensors: a state dict; its dtypes and devices become the model's.
        where: names the file in errors.
        shown: what the file calls a tensor.

    Raises:
        UserError: names the first tensor that does not fit the spec, and both shapes.
    """
    model = fitting_model(spec, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, where, shown)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def fitting_model(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], where: str, shown: Callable[[str], str] = str) -> AnyOrderModel:
    """The model without values, which tensors of these shapes fit. Raises UserError as :func:`model_of` where they do not."""
    model = meta_model(spec)
    expected = model.state_dict()
    for name in sorted(expected.keys() | shapes.keys()):
        here = shapes.get(name, "absent")
        wanted = tuple(expected[name].shape) if name in expected else "absent"
        if here != wanted:
            raise UserError(f"{where}: tensor {shown(name)} is {here} in the file, the model has {wanted}")
    return model


def model_id(uri: str) -> str:
    """How order tables and checkpoints name a model: the first 16 hex digits of the SHA-256 of its weights file.

    Weights in several files have the id of the file that they were made from, or else that of their index.
    """
    index = index_of(uri)
    if index is not None and (identity := open_weights(uri).identity) is not None:
        return identity
    digest = hashlib.sha256()
    for chunk in _chunks(index or uri):
        digest.update(chunk)
    return digest.hexdigest()[:16]


def _chunks(uri: str) -> Iterator[bytes]:
    """The bytes of an object; a few chunks are read at once."""
    storage, starts = open_storage(uri), [0]
    while starts:
        chunk = b""
        for chunk in in_order(lambda start: storage.read(uri, start, start + _CHUNK_BYTES), starts, _CONNECTIONS):
            yield chunk
        following = starts[-1] + _CHUNK_BYTES
        full = len(chunk) == _CHUNK_BYTES
        starts = list(range(following, following + _CONNECTIONS * _CHUNK_BYTES, _CHUNK_BYTES)) if full else []


def _metadata(spec: ModelSpec) -> dict[str, str]:
    return {"kind": _KIND, "spec": spec.model_dump_json()}
