"""Image shards that others wrote (img2dataset, open_clip), to be resized and split into our own.

    KEY.jpg|png|webp   KEY.txt (the caption)   KEY.json (the caption in one of its fields, a label, anything else)

Each shard is read twice: once for the names of its samples and where they lie, then sample by sample, in the order of our
shards and not of theirs. On S3 the second time is one ranged GET a sample; nothing is kept on the local disk.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from oar_scale.config.schema import WebDatasetSource
from oar_scale.data.images import EXTENSIONS
from oar_scale.data.labels import stored_label
from oar_scale.data.notes import Notes
from oar_scale.data.sources.captions import caption_of, metadata_of
from oar_scale.data.sources.image_files import key_of, square_of
from oar_scale.data.sources.source import BadImage, Content, SourceImage
from oar_scale.data.tars import BLOCK, key_and_extension, map_file, members, samples
from oar_scale.errors import UserError
from oar_scale.storage import open_storage
from oar_scale.text import is_missing

SHARDS_AT_ONCE = 4
"""Opened at the same time in the first pass; shards on S3 are whole in memory then."""

SampleRange = tuple[str, int, int]
"""A sample's KEY, and the byte offsets in the tar at which its members begin and end."""


class WebDatasetImages:
    """The images, cropped to the central square and resized."""

    attribution = ""

    def __init__(self, config: WebDatasetSource) -> None:
        self.notes = Notes()
        self.config = config
        uris = [config.url] if config.url.endswith(".tar") else open_storage(config.url).list(config.url)
        self.shards = [uri for uri in uris if uri.endswith(".tar")]
        if not self.shards:
            raise UserError(f"data.source.url {config.url}: no .tar below it")

    def images(self) -> Iterator[SourceImage]:
        """All samples of all shards, in the order of the files."""
        folder = self.config.url.rstrip("/") + "/"
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            for uri, ranges in zip(self.shards, pool.map(_sample_ranges, self.shards), strict=True):
                shard = os.path.basename(uri) if uri == self.config.url else uri.removeprefix(folder)
                for key, start, end in ranges:
                    name = f"{shard.removesuffix('.tar')}/{key}"
                    yield SourceImage(key_of(name), name, functools.partial(self._read, uri, start, end))

    def _read(self, uri: str, start: int, end: int, size: int) -> Content:
        part = open_storage(uri).read(uri, start, end) + bytes(2 * BLOCK)  # a tar of its own: one sample and the end
        key, sample = next(samples(memoryview(part), uri))
        picture = next((sample[extension] for extension in EXTENSIONS if extension in sample), None)
        if picture is None:
            raise BadImage(f"no image among .{', .'.join(sample)}")
        metadata = metadata_of(sample.get("json"))
        field = self.config.caption
        caption, several = caption_of(sample.get("txt") if field is None else metadata.get(field), key_of(key))
        label = stored_label(metadata, sample.get("cls"), self.config.label)
        if not caption and is_missing(label):
            raise BadImage("no caption")
        if several:
            metadata.setdefault("captions", several)
        if not is_missing(label):
            metadata["label"] = label
        return Content(square_of(picture, size), caption, metadata)


def _sample_ranges(uri: str) -> list[SampleRange]:
    """The samples of a shard: each begins where the one before it ends, so that headers that belong to a member come along."""
    ranges: list[SampleRange] = []
    data = memoryview(open_storage(uri).read(uri)) if uri.startswith("s3://") else map_file(uri)
    for name, offset, size in members(data, uri):
        key, end = key_and_extension(name)[0], offset + -(-size // BLOCK) * BLOCK
        if not key:
            continue
        if ranges and ranges[-1][0] == key:
            ranges[-1] = (key, ranges[-1][1], end)
        else:
            ranges.append((key, ranges[-1][2] if ranges else 0, end))
    return ranges
