"""Weights in one safetensors file: tensors, what they are (``kind``) and the spec that builds the module.

Half the bytes at no visible cost: tensors of two dimensions and more are stored in bfloat16 where ``half`` is set.
Nothing is unpickled, so a file can be wrong but never run code.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.storage import open_storage

ENTRY = "oar_scale"
"""The one entry of the file's metadata: a JSON object."""
MAX_HEADER = 1 << 28
"""Bytes; what claims to be longer is no safetensors file."""


def save_weights(uri: str, tensors: dict[str, Tensor], metadata: dict[str, str], *, half: bool = False) -> None:
    """Write tensors and metadata atomically."""
    stored = {
        name: (tensor.detach().to(torch.bfloat16) if half and tensor.ndim > 1 else tensor.detach()).cpu().contiguous()
        for name, tensor in tensors.items()
    }
    # One entry: safetensors writes several in random order, and the same weights must give the same bytes.
    open_storage(uri).write(uri, save_bytes(stored, {ENTRY: json.dumps(metadata, sort_keys=True)}))


class StoredWeights(NamedTuple):
    """The contents of a weights file."""

    tensors: dict[str, Tensor]
    kind: str
    spec: str
    """JSON."""


def load_weights(uri: str, kind: str) -> tuple[dict[str, Tensor], str]:
    """Tensors and the spec (JSON) of a file written for ``kind``. Raises as :func:`read_weights`."""
    stored = read_weights(uri, kind)
    return stored.tensors, stored.spec


def read_weights(uri: str, *kinds: str) -> StoredWeights:
    """A file written for one of ``kinds``.

    Raises:
        UserError: not a safetensors file, or one that holds something else.
    """
    data = open_storage(uri).read(uri)
    try:
        tensors = load_bytes(data)
    except SafetensorError as error:
        raise UserError(f"{uri}: not a readable safetensors file ({error}). Export the weights again.") from error
    metadata = _metadata(data)
    kind = metadata.get("kind", "")
    _check_kind(uri, kind, *kinds)
    return StoredWeights(tensors, kind, metadata["spec"])


def read_header(uri: str, kind: str) -> str:
    """The spec (JSON) of a file written for ``kind``, without its tensors. Raises as :func:`read_weights`."""
    storage = open_storage(uri)
    size = int.from_bytes(storage.read(uri, 0, 8), "little")
    data = storage.read(uri, 0, 8 + size) if size < MAX_HEADER else b""
    try:
        metadata = _metadata(data)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{uri}: not a readable safetensors file ({error}). Export the weights again.") from error
    _check_kind(uri, metadata.get("kind", ""), kind)
    return metadata["spec"]


def _check_kind(uri: str, kind: str, *kinds: str) -> None:
    if kind not in kinds:
        expected = " or ".join(repr(name) for name in kinds)
        raise UserError(f"{uri}: holds {kind or 'unnamed tensors'!r}, expected {expected} written by oar_scale.")


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return dict(json.loads(entries.get(ENTRY, "{}")))
