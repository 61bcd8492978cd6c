"""The safetensors format, one tensor at a time: neither a writer nor a reader ever holds a whole model.

    8 bytes    length of the header
    header     {"NAME": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {"format": "pt", ...}}
    data       the tensors' bytes, without gaps

The header comes first and holds the checksum of what follows, so a file is written to a place where its beginning can be replaced.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import IO, NamedTuple

import torch
from torch import Tensor

from oar_scale.json_object import parse_json

METADATA = "__metadata__"
MAX_HEADER = 1 << 28
"""Bytes; what claims to be longer is no safetensors file."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_POLYNOMIAL = 0xEDB88320


class TensorInfo(NamedTuple):
    """Where in a file a tensor is, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the data."""

    @property
    def bytes(self) -> int:
        """Its size."""
        return tensor_bytes(self.dtype, self.shape)


class Header(NamedTuple):
    """The header of a file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data: int
    """Where in the file the data begins."""


def tensor_bytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """The size of a tensor's values."""
    return torch.Size(shape).numel() * dtype.itemsize


def parse_header(data: bytes) -> Header:
    """The header at the beginning of a file's bytes. Raises ValueError where it is none."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length:
        raise ValueError("the header is cut off")
    entries = parse_json(data[8 : 8 + length])
    if not isinstance(entries, dict):
        raise ValueError("the header is no object")
    metadata = dict(entries.pop(METADATA, {}))
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        try:
            start, end = entry["data_offsets"]
            tensors[name] = TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
        except (KeyError, TypeError) as error:
            raise ValueError(f"tensor {name} is described in an unknown way ({error})") from error
        if tensors[name].bytes != end - start:
            raise ValueError(f"tensor {name} has {end - start} bytes, its shape takes {tensors[name].bytes}")
    return Header(tensors, metadata, 8 + length)


def tensor_of(data: bytes | bytearray, info: TensorInfo) -> Tensor:
    """A tensor of the bytes of its values; of a bytearray without a copy."""
    if not data:
        return torch.empty(info.shape, dtype=info.dtype)
    own = data if isinstance(data, bytearray) else bytearray(data)
    return torch.frombuffer(own, dtype=torch.uint8).view(info.dtype).view(info.shape)


class FileWriter:
    """Writes one file; its tensors come in any order.

    Args:
        file: seekable, at its beginning.
        tensors: names with dtypes and shapes of all that will come.
        metadata: of the file.
    """

    def __init__(self, file: IO[bytes], tensors: Mapping[str, tuple[torch.dtype, Iterable[int]]], metadata: Mapping[str, str]) -> None:
        self._file, self._metadata = file, dict(metadata)
        self._infos: dict[str, TensorInfo] = {}
        at = 0
        # The largest numbers first, as safetensors itself does: each tensor then begins at a multiple of its numbers' size.
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            self._infos[name] = TensorInfo(dtype, tuple(shape), at)
            at += self._infos[name].bytes
        self._crcs: dict[str, int] = {}
        self._data = len(self._header(self._metadata))
        self.bytes = at
        """Size of all tensors."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, in the dtype that was announced."""
        info = self._infos[name]
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"tensor {name} is {tuple(tensor.shape)}, {info.shape} was announced")
        values = _bytes_of(tensor.detach().to("cpu", info.dtype))
        self._file.seek(self._data + info.start)
        self._file.write(values)
        self._crcs[name] = zlib.crc32(values)

    def checksum(self) -> str:
        """The checksum of all tensors, as :func:`combined_checksum`. Raises ValueError where one has not come."""
        if missing := self._infos.keys() - self._crcs.keys():
            raise ValueError(f"tensor {min(missing)} was not written")
        return combined_checksum({name: (crc, self._infos[name].bytes) for name, crc in self._crcs.items()})

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, with metadata as long as those of the beginning."""
        header = self._header(metadata)
        if len(header) != self._data:
            raise ValueError("the metadata have another length than was announced")
        self._file.seek(0)
        self._file.write(header)
        self._file.seek(0, 2)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        entries: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
        for name, info in self._infos.items():
            entries[name] = {"dtype": _NAMES[info.dtype], "shape": info.shape, "data_offsets": (info.start, info.start + info.bytes)}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def tensor_crc(tensor: Tensor) -> int:
    """CRC-32 of a tensor's values."""
    return zlib.crc32(_bytes_of(tensor.detach().cpu()))


def combined_checksum(parts: Mapping[str, tuple[int, int]]) -> str:
    """CRC-32, 8 hex digits, over each tensor's name and values in the order of the names.

    Args:
        parts: by name the CRC-32 of the values and their size, whatever the order in which they were computed.
    """
    checksum = 0
    for name in sorted(parts):
        crc, size = parts[name]
        checksum = _advanced(zlib.crc32(name.encode(), checksum), size) ^ crc
    return f"{checksum:08x}"


def _bytes_of(tensor: Tensor) -> memoryview:
    values: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return values


def _advanced(crc: int, size: int) -> int:
    """What a CRC-32 contributes to that of a text that is longer by ``size`` bytes: the product with x^(8 size) (zlib's crc32_combine)."""
    return _product(_power(size), crc)


@lru_cache(maxsize=256)
def _power(size: int) -> int:
    """x^(8 size); most tensors of a model have one of a few sizes."""
    power, factor = 1 << 31, 1 << 23  # x^0 and x^8: the highest bit is the lowest power
    while size:
        if size & 1:
            power = _product(power, factor)
        factor, size = _product(factor, factor), size >> 1
    return power


def _product(a: int, b: int) -> int:
    """The product of two polynomials modulo that of the CRC-32."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result
