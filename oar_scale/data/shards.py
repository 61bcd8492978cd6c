"""Whole shards: WebDataset tars, written deterministically, and read as lists of samples.

A sample is a run of members that share a KEY (the name up to the first dot):

    image shards   KEY.png  KEY.txt  KEY.json
    token shards   KEY.codes.npy (uint16 [views, N], raster)  KEY.txt  KEY.json  [KEY.features.npy (float16 [T, F])]

Plain ``webdataset.WebDataset(url)`` reads both. The same samples give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import crc32c
import numpy as np
import webdataset
from numpy.typing import NDArray

from oar_scale.data.manifest import ShardInfo
from oar_scale.data.open_shard import ImageShard, TokenShard
from oar_scale.data.tar_samples import samples
from oar_scale.data.tars import map_file
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.storage import join, open_storage
from oar_scale.storage.shard_cache import ShardCache

ShardSample = dict[str, Any]
"""A sample as ``webdataset`` writes and reads it: ``__key__`` (text), and for each extension its bytes, or an array to be written."""


def shard_name(index: int) -> str:
    """File name of the shard of this index: ``00042.tar``."""
    return f"{index:05d}.tar"


def write_shard(folder: str, name: str, samples: Iterable[ShardSample]) -> ShardInfo:
    """Write one shard (each sample a dict with ``__key__`` and a value per extension) and publish it atomically."""
    info, data = pack_shard(name, samples)
    uri = join(folder, name)
    open_storage(uri).write(uri, data)
    return info


def pack_shard(name: str, samples: Iterable[ShardSample]) -> tuple[ShardInfo, bytes]:
    """The entry of a shard for the manifest, and its bytes."""
    count, file = 0, io.BytesIO()
    with webdataset.TarWriter(file, mtime=0, user="oar", group="oar") as sink:
        for sample in samples:
            sink.write(sample)
            count += 1
    data = file.getvalue()
    return ShardInfo(name=name, bytes=len(data), samples=count, crc32c=crc32c.crc32c(data)), data


def with_identity(metadata: Mapping[str, object], name: str, family: str) -> JsonObject:
    """A sample's ``KEY.json`` with the name that it is held out by and its family; people's own entries of these names keep theirs."""
    own = {"name": name, "family": family}
    return {**metadata, **{f"oar_{key}" if key in metadata else key: value for key, value in own.items()}}


def identity(metadata: Mapping[str, object]) -> tuple[str, str]:
    """Name and family, as :func:`with_identity` stored them; empty where they are not."""
    name, family = (str(metadata.get(f"oar_{key}", metadata.get(key)) or "") for key in ("name", "family"))
    return name, family


def iterate_shard(path: str, uri: str) -> Iterator[ShardSample]:
    """The samples of a local tar as dicts of bytes, in the order of the file; ``uri`` names it in errors.

    Raises:
        UserError: see :func:`oar_scale.data.tar_samples.samples`; also for a sample with two members of one extension.
    """
    return _samples(map_file(path), uri)


def read_shard(uri: str, cache_dir: str, expected: ShardInfo | None = None, *, cache_bytes: int | None = None) -> list[ShardSample]:
    """All samples of a shard, checked against the manifest's size and crc32c where it is given.

    Args:
        cache_bytes: bound of the folder with copies of remote shards.

    Raises:
        UserError: missing or damaged.
    """
    return list(_samples(_read(uri, cache_dir, expected, cache_bytes), uri))


def _samples(data: memoryview, uri: str) -> Iterator[ShardSample]:
    for key, sample in samples(data, uri):
        if sample.doubled:
            raise UserError(f"{uri}: sample {key!r} has two members .{sample.doubled}. Write it again with a key for each.")
        yield {"__key__": key, **{extension: bytes(content) for extension, content in sample.items()}}


def token_sample(source: ShardSample, codes_VN: NDArray[np.uint16]) -> ShardSample:
    """One sample of a token shard, ready for :func:`write_shard`: the codes, and all of the image's sample but its picture."""
    buffer = io.BytesIO()
    np.save(buffer, codes_VN.astype(np.uint16))
    kept: ShardSample = {part: source[part] for part in ("features.npy", "json", "txt", "cls") if part in source}
    return {"__key__": source["__key__"], "codes.npy": buffer.getvalue(), "json": b"{}", **kept}


def read_token_shard(uri: str, cache_dir: str, expected: ShardInfo | None = None, *, cache_bytes: int | None = None) -> TokenShard:
    """Open a token shard. Arguments and errors as those of :func:`read_shard`."""
    return TokenShard(_read(uri, cache_dir, expected, cache_bytes), uri)


def read_image_shard(uri: str, cache_dir: str, expected: ShardInfo | None = None, *, cache_bytes: int | None = None) -> ImageShard:
    """Open an image shard. Arguments and errors as those of :func:`read_shard`."""
    return ImageShard(_read(uri, cache_dir, expected, cache_bytes), uri)


def _read(uri: str, cache_dir: str, expected: ShardInfo | None, cache_bytes: int | None) -> memoryview:
    cache = ShardCache(cache_dir, cache_bytes)
    return cache.read(uri) if expected is None else cache.read(uri, expected.bytes, expected.crc32c)
