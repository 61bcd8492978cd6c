"""Weights in safetensors files: tensors, what they are (``kind``) and the spec that builds the module.

    model.safetensors                     one file, or, as on the Hugging Face hub, several with an index:
    model-00001-of-00003.safetensors ...  model.safetensors.index.json

Both are named ``model.safetensors``; whoever reads finds out which it is. Tensors are written and read one at a time, so that a model is
never in memory twice.

Half the bytes at no visible cost: tensors of two dimensions and more are stored in bfloat16 where ``half`` is set.
Nothing is unpickled, so a file can be wrong but never run code. A checksum of the tensors is part of each file's metadata and compared
whenever they are read: safetensors itself takes any bits for weights. Files without one (of version 0.1.0, or of other programs)
are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.json_object import parse_object
from oar_scale.names import file_name
from oar_scale.storage import Missing, Storage, open_storage, read_json, write_json
from oar_scale.storage.background import in_order
from oar_scale.tokenizers.safetensors_format import (
    MAX_HEADER,
    FileWriter,
    Header,
    TensorInfo,
    combined_checksum,
    parse_header,
    tensor_bytes,
    tensor_crc,
    tensor_of,
)

ENTRY = "oar_scale"
"""Our entry of the file's metadata: a JSON object. Another says ``format: pt``, for the hub's own readers."""
CHECKSUM = "crc32"
"""Its key for the checksum of the tensors; in an index, those of the files by name."""
SAFE, INDEX = ".safetensors", ".index.json"
SHARD_BYTES = 5 * 10**9
"""Size above which exported weights become several files: the hub's own limit, and what one S3 request may carry."""
_HEADER_READ = 1 << 16
_AHEAD = 4
"""Tensors that are read at once."""
_SMALL = 1 << 20
"""Bytes that a file of this machine gives sooner than threads are started."""

Described = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def save_weights(uri: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, half: bool = False) -> None:
    """Write tensors that are in memory, and metadata, as one file, atomically."""
    write_weights(uri, tensors, tensors.items(), metadata, half=half)


def write_weights(
    uri: str,
    shapes: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    *,
    half: bool = False,
    shard_bytes: int | None = None,
    scratch: str | None = None,
) -> None:
    """Write tensors as they come, each once and in any order; one of them is in memory at a time.

    Args:
        shapes: by name tensors of the same shape and dtype, which may be on the meta device.
        metadata: ``kind`` and ``spec``.
        half: store matrices in bfloat16.
        shard_bytes: where all tensors together are larger, write files of at most that size (a single tensor may be larger) and an
            index, which comes last; None: one file, whatever its size.
        scratch: local folder for what is on its way to S3.
    """
    described: Described = {
        name: (torch.bfloat16 if half and tensor.ndim > 1 else tensor.dtype, tuple(tensor.shape)) for name, tensor in shapes.items()
    }
    parts = _parts(described, shard_bytes)
    files = [uri] if len(parts) == 1 else [_part_name(uri, number, len(parts)) for number in range(1, len(parts) + 1)]
    storage, writers, writer_of = open_storage(uri), list[FileWriter](), dict[str, FileWriter]()
    with ExitStack() as stack:
        for part, target in zip(parts, files, strict=True):
            file = stack.enter_context(storage.create(target, scratch=scratch))
            writers.append(FileWriter(file, {name: described[name] for name in part}, _file_metadata(metadata, "0" * 8)))
            writer_of |= dict.fromkeys(part, writers[-1])
        for name, tensor in tensors:
            writer_of[name].put(name, tensor)
        checksums = [writer.checksum() for writer in writers]
        for writer, checksum in zip(writers, checksums, strict=True):
            writer.finish(_file_metadata(metadata, checksum))
    if len(files) > 1:
        names = [target.rpartition("/")[2] for target in files]
        entry = json.dumps({**metadata, CHECKSUM: dict(zip(names, checksums, strict=True))}, sort_keys=True)
        weight_map = {name: file for part, file in zip(parts, names, strict=True) for name in part}
        total = sum(writer.bytes for writer in writers)
        write_json(uri + INDEX, {"metadata": {"total_size": total, ENTRY: entry}, "weight_map": dict(sorted(weight_map.items()))})


def file_damage(uri: str) -> str | None:
    """What is wrong with the tensors of weights, compared with their checksums; None where nothing is. Holds few tensors at a time."""
    try:
        for _ in open_weights(uri):
            pass
    except UserError as error:
        return str(error)
    return None


class LoadedWeights(NamedTuple):
    """The contents of a weights file."""

    tensors: dict[str, Tensor]
    kind: str
    spec: str
    """JSON."""


def load_weights(uri: str, kind: str) -> tuple[dict[str, Tensor], str]:
    """Tensors and the spec (JSON) of a file written for ``kind``. Raises as :func:`read_weights`."""
    stored = read_weights(uri, kind)
    return stored.tensors, stored.spec


def read_weights(uri: str, *kinds: str) -> LoadedWeights:
    """All tensors that were written for one of ``kinds``.

    Raises:
        UserError: not a safetensors file, one that holds something else, or one whose tensors are not those that were written.
    """
    stored = open_weights(uri, *kinds)
    return LoadedWeights(dict(stored), stored.kind, stored.spec)


class _File(NamedTuple):
    uri: str
    header: Header
    checksum: str | None


@dataclass(frozen=True)
class StoredWeights:
    """Weights of which the headers have been read. Iterating reads the tensors, few at a time, and verifies each file at its end."""

    uri: str
    kind: str
    spec: str
    """JSON."""
    identity: str | None
    """The id that a copy in several files keeps of the file it was made from."""
    files: tuple[_File, ...]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Dtype and shape of each tensor."""
        return {name: info for file in self.files for name, info in file.header.tensors.items()}

    @property
    def shapes(self) -> dict[str, Tensor]:
        """Tensors on the meta device of the same shapes and dtypes."""
        return {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in self.infos.items()}

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.bytes for info in self.infos.values())

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, unverified."""
        file = next(file for file in self.files if name in file.header.tensors)
        return _read(file, open_storage(file.uri), name)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors as they are stored. Raises UserError, after a file's last one, where they are not those that were written."""
        for file in self.files:
            names, parts = sorted(file.header.tensors), dict[str, tuple[int, int]]()
            read = partial(_read, file, open_storage(file.uri))  # opened here: other threads know nothing of this one's patience
            for first in range(0, len(names), _AHEAD):  # a few at a time, so that what is read ahead does not fill the memory
                few = names[first : first + _AHEAD]
                small = "://" not in file.uri and sum(file.header.tensors[name].bytes for name in few) < _SMALL
                for name, tensor in zip(few, in_order(read, few, 1 if small else _AHEAD), strict=True):
                    if file.checksum is not None:
                        parts[name] = (tensor_crc(tensor), tensor.nbytes)
                    yield name, tensor
            if file.checksum is not None and combined_checksum(parts) != file.checksum:
                raise UserError(
                    f"{file.uri}: damaged: its tensors are not those that were written (checksum {file.checksum}). "
                    "Copy or export the file again."
                )


def open_weights(uri: str, *kinds: str) -> StoredWeights:
    """Read the header of weights in one file or in several.

    Args:
        uri: ``NAME.safetensors`` for both, or the index of several.
        kinds: what they may be; none: anything.

    Raises:
        Missing: there is neither.
        UserError: not a safetensors file, one that holds something else, or parts that do not belong together.
    """
    uri = uri.removesuffix(INDEX)
    try:
        header = _read_header(uri)
    except Missing:
        if not open_storage(uri).exists(uri + INDEX):
            raise
        return _open_parts(uri, *kinds)
    entry = _entry(header.metadata)
    _check_kind(uri, entry.get("kind", ""), *kinds)
    return StoredWeights(uri, entry.get("kind", ""), entry.get("spec", ""), None, (_File(uri, header, entry.get(CHECKSUM)),))


def index_of(uri: str) -> str | None:
    """The index of weights in several files; None where they are in one, or not there."""
    uri = uri.removesuffix(INDEX)
    storage = open_storage(uri)
    return None if storage.exists(uri) or not storage.exists(uri + INDEX) else uri + INDEX


def _open_parts(uri: str, *kinds: str) -> StoredWeights:
    index = read_json(uri + INDEX)
    try:
        entry, by_file = parse_object(index["metadata"][ENTRY]), dict[str, set[str]]()
        for name, file in index["weight_map"].items():
            by_file.setdefault(file_name(file), set()).add(name)
        checksums, kind = dict(entry[CHECKSUM]), str(entry["kind"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{uri}{INDEX}: not an index that oar_scale wrote ({error!r}). Export the weights again.") from error
    _check_kind(uri + INDEX, kind, *kinds)
    files = []
    for file in sorted(by_file):
        part = uri.removesuffix(uri.rpartition("/")[2]) + file
        header = _read_header(part)
        own = _entry(header.metadata)
        if header.tensors.keys() != by_file[file] or any(own.get(key) != entry[key] for key in ("kind", "spec")):
            raise UserError(f"{part}: is not the part that {uri}{INDEX} describes. Copy or export the weights again.")
        if own.get(CHECKSUM) != checksums.get(file):
            raise UserError(f"{part}: is of another export than {uri}{INDEX}. Copy or export the weights again.")
        files.append(_File(part, header, own.get(CHECKSUM)))
    return StoredWeights(uri, kind, entry["spec"], entry.get("id"), tuple(files))


def _read_header(uri: str) -> Header:
    storage = open_storage(uri)
    data = storage.read(uri, 0, _HEADER_READ)
    size = 8 + int.from_bytes(data[:8], "little")
    if len(data) < size <= MAX_HEADER:
        data += storage.read(uri, len(data), size)
    try:
        return parse_header(data)
    except (ValueError, AttributeError, TypeError) as error:
        raise _unreadable(uri, error) from error


def _read(file: _File, storage: Storage, name: str) -> Tensor:
    info, start = file.header.tensors[name], file.header.data
    data = storage.read(file.uri, start + info.start, start + info.start + info.bytes) if info.bytes else b""
    if len(data) != info.bytes:
        raise _unreadable(file.uri, f"it ends inside tensor {name}")
    return tensor_of(data, info)


def _unreadable(uri: str, why: object) -> UserError:
    return UserError(f"{uri}: not a readable safetensors file ({why}). Export the weights again.")


def _check_kind(uri: str, kind: str, *kinds: str) -> None:
    if kinds and kind not in kinds:
        expected = " or ".join(repr(name) for name in kinds)
        raise UserError(f"{uri}: holds {kind or 'unnamed tensors'!r}, expected {expected} written by oar_scale.")


def _entry(metadata: Mapping[str, str]) -> dict[str, str]:
    return parse_object(metadata.get(ENTRY, "{}"))


def _file_metadata(metadata: Mapping[str, str], checksum: str) -> dict[str, str]:
    return {"format": "pt", ENTRY: json.dumps({**metadata, CHECKSUM: checksum}, sort_keys=True)}


def _parts(described: Described, shard_bytes: int | None) -> list[list[str]]:
    """The names of each file's tensors, in the order in which they are described."""
    parts: list[list[str]] = [[]]
    used = 0
    for name, (dtype, shape) in described.items():
        size = tensor_bytes(dtype, shape)
        if shard_bytes is not None and parts[-1] and used + size > shard_bytes:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def _part_name(uri: str, number: int, count: int) -> str:
    return f"{uri.removesuffix(SAFE)}-{number:05d}-of-{count:05d}{SAFE}"
