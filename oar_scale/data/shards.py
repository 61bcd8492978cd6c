"""Shards: WebDataset tars, written deterministically and read with every fault named.

A sample is a run of members that share a KEY (the name up to the first dot):

    image shards   KEY.png  KEY.txt  KEY.json
    token shards   KEY.codes.npy (uint16 [views, N], raster)  KEY.txt  KEY.json  [KEY.features.npy (float16 [T, F])]

Plain ``webdataset.WebDataset(url)`` reads both. The same samples give the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import crc32c
import numpy as np
import webdataset
from numpy.typing import NDArray

from oar_scale.data.manifest import ShardInfo
from oar_scale.errors import UserError
from oar_scale.storage import fetch, join, open_storage
from oar_scale.tokenizers.prompts import Field


@dataclass(frozen=True)
class TokenShard:
    """All samples of a token shard, S of them."""

    keys: list[str]
    captions: list[str]
    codes_SVN: NDArray[np.uint16]
    prompts: Sequence[Any]
    """What the model is told about each sample: its caption, label or features, as was asked for."""


def shard_name(index: int) -> str:
    return f"{index:05d}.tar"


def write_shard(folder: str, name: str, samples: Iterable[dict[str, Any]]) -> ShardInfo:
    """Write one shard (each sample a dict with ``__key__`` and a value per extension) and publish it whole."""
    uri, count = join(folder, name), 0
    handle, path = tempfile.mkstemp(suffix=".tar")
    os.close(handle)
    try:
        with webdataset.TarWriter(path, mtime=0, user="oar", group="oar") as sink:
            for sample in samples:
                sink.write(sample)
                count += 1
        with open(path, "rb") as file:
            data = file.read()
        open_storage(uri).write(uri, data)
    finally:
        os.unlink(path)
    return ShardInfo(name=name, bytes=len(data), samples=count, crc32c=crc32c.crc32c(data))


def iterate_shard(path: str, uri: str) -> Iterator[dict[str, Any]]:
    """The samples of a local tar as dicts of bytes, in the order of the file; ``uri`` names it in errors.

    Raises:
        UserError: the tar is truncated or is none.
    """
    sample: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                content = tar.extractfile(member)
                assert content is not None
                data = content.read()
                if len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                sample["__key__"] = key
                sample[extension.lower()] = data
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{uri}: truncated or broken tar after sample {sample.get('__key__', '(none)')!r} ({error}). Write the shard again."
        ) from error
    if sample:
        yield sample


def read_shard(uri: str, cache_dir: str, expected: ShardInfo | None = None) -> list[dict[str, Any]]:
    """All samples of a shard, checked against the manifest's size and crc32c where it is given."""
    path = fetch(uri, cache_dir)
    if expected is not None:
        with open(path, "rb") as file:
            data = file.read()
        checksum = crc32c.crc32c(data)
        if len(data) != expected.bytes or checksum != expected.crc32c:
            raise UserError(
                f"{uri}: {len(data)} bytes with crc32c {checksum:08x}, the manifest says {expected.bytes} with {expected.crc32c:08x}: "
                "the file is damaged or was replaced. Write the shard again."
            )
    return list(iterate_shard(path, uri))


def token_sample(source: dict[str, Any], codes_VN: NDArray[np.uint16]) -> dict[str, Any]:
    """One sample of a token shard, ready for :func:`write_shard`: the codes, and all of the image's sample but its picture."""
    buffer = io.BytesIO()
    np.save(buffer, codes_VN.astype(np.uint16))
    kept: dict[str, Any] = {part: source[part] for part in ("features.npy", "json", "txt") if part in source}
    return {"__key__": source["__key__"], "codes.npy": buffer.getvalue(), "json": b"{}", **kept}


def read_token_shard(uri: str, cache_dir: str, expected: ShardInfo | None = None, field: Field = "txt") -> TokenShard:
    """Decode a token shard.

    Args:
        field: what the prompts are.

    Raises:
        UserError: damaged, or a sample lacks codes, caption or prompt; the error names shard and key.
    """
    keys, captions, codes, prompts = [], [], [], []
    for sample in read_shard(uri, cache_dir, expected):
        missing = [part for part in ("codes.npy", "txt") if part not in sample]
        if missing:
            raise UserError(f"{uri}: sample {sample['__key__']!r} has no .{missing[0]}; is this a folder of token shards?")
        keys.append(sample["__key__"])
        captions.append(sample["txt"].decode("utf-8", errors="replace"))
        codes.append(np.load(io.BytesIO(sample["codes.npy"]), allow_pickle=False))
        prompts.append(captions[-1] if field == "txt" else _prompt(sample, field, uri))
    return TokenShard(keys, captions, np.stack(codes), prompts)


def _prompt(sample: dict[str, Any], field: Field, uri: str) -> Any:
    """A sample's label or features. Raises UserError where it has none."""
    if field == "features" and "features.npy" in sample:
        return np.load(io.BytesIO(sample["features.npy"]), allow_pickle=False)
    if field == "label":
        label = json.loads(sample.get("json", b"{}")).get("label")
        if isinstance(label, int):
            return label
    what = "features (.features.npy)" if field == "features" else "whole number as label in its .json"
    raise UserError(f"{uri}: sample {sample['__key__']!r} has no {what}, which the recipe's tokenizer.text asks for")
