"""Weights in one safetensors file: tensors, what they are (``kind``) and the spec that builds the module.

Half the bytes at no visible cost: tensors of two dimensions and more are stored in bfloat16 where ``half`` is set.
Nothing is unpickled, so a file can be wrong but never run code. A checksum of the tensors is part of the metadata and compared
whenever they are read: safetensors itself takes any bits for weights. Files without one (of version 0.1.0, or of other programs)
are read as they are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.storage import open_storage

ENTRY = "oar_scale"
"""The one entry of the file's metadata: a JSON object."""
CHECKSUM = "crc32"
"""Its key for the checksum of the tensors."""
MAX_HEADER = 1 << 28
"""Bytes; what claims to be longer is no safetensors file."""


def save_weights(uri: str, tensors: dict[str, Tensor], metadata: dict[str, str], *, half: bool = False) -> None:
    """Write tensors and metadata atomically."""
    stored = {
        name: (tensor.detach().to(torch.bfloat16) if half and tensor.ndim > 1 else tensor.detach()).cpu().contiguous()
        for name, tensor in tensors.items()
    }
    metadata = {**metadata, CHECKSUM: tensors_checksum(stored, stored.__getitem__)}
    # One entry: safetensors writes several in random order, and the same weights must give the same bytes.
    open_storage(uri).write(uri, save_bytes(stored, {ENTRY: json.dumps(metadata, sort_keys=True)}))


def tensors_checksum(names: Iterable[str], tensor: Callable[[str], Tensor]) -> str:
    """CRC-32 of tensors on the CPU and of their names, 8 hex digits; ``tensor`` is asked for one at a time."""
    checksum = 0
    for name in sorted(names):
        values = tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(values.data, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


def file_damage(path: str) -> str | None:
    """What is wrong with the tensors of a local file, compared with its checksum; None where nothing is. Holds one tensor at a time."""
    with safe_open(path, "pt") as file:
        metadata = json.loads((file.metadata() or {}).get(ENTRY, "{}"))
        return _damage(path, file.keys(), file.get_tensor, metadata)


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
        UserError: not a safetensors file, one that holds something else, or one whose tensors are not those that were written.
    """
    data = open_storage(uri).read(uri)
    try:
        tensors = load_bytes(data)
    except SafetensorError as error:
        raise UserError(f"{uri}: not a readable safetensors file ({error}). Export the weights again.") from error
    metadata = _metadata(data)
    kind = metadata.get("kind", "")
    _check_kind(uri, kind, *kinds)
    if damage := _damage(uri, tensors, tensors.__getitem__, metadata):
        raise UserError(damage)
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


def _damage(uri: str, names: Iterable[str], tensor: Callable[[str], Tensor], metadata: Mapping[str, str]) -> str | None:
    expected = metadata.get(CHECKSUM)
    if expected is None or tensors_checksum(names, tensor) == expected:
        return None
    return f"{uri}: damaged: its tensors are not those that were written (checksum {expected}). Copy or export the file again."


def _check_kind(uri: str, kind: str, *kinds: str) -> None:
    if kind not in kinds:
        expected = " or ".join(repr(name) for name in kinds)
        raise UserError(f"{uri}: holds {kind or 'unnamed tensors'!r}, expected {expected} written by oar_scale.")


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return dict(json.loads(entries.get(ENTRY, "{}")))
