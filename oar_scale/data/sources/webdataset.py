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
from itertools import chain
from typing import NamedTuple

from oar_scale.config.schema import WebDatasetSource
from oar_scale.data.data_files import files_below, require_folder, shards_among
from oar_scale.data.images import EXTENSIONS
from oar_scale.data.labels import stored_label
from oar_scale.data.notes import NO_DATA, SEVERAL_FORMATS, Notes
from oar_scale.data.sources.captions import caption_of, metadata_of
from oar_scale.data.sources.image_files import key_of, square_of
from oar_scale.data.sources.source import BadImage, Content, SourceImage
from oar_scale.data.tar_samples import TWICE, data_runs, key_and_extension, samples
from oar_scale.data.tars import BLOCK, map_file
from oar_scale.errors import UserError
from oar_scale.storage import join, open_storage
from oar_scale.storage.patience import as_patient
from oar_scale.text import is_missing

SHARDS_AT_ONCE = 4
"""Opened at the same time in the first pass; shards on S3 are whole in memory then."""


class SampleRange(NamedTuple):
    """Where a sample lies in its tar."""

    key: str
    start: int
    end: int
    """The byte offsets at which its members begin and end."""
    times: int = 1
    """How often its key comes in the tar, with others between."""


class WebDatasetImages:
    """The images, cropped to the central square and resized."""

    attribution = ""

    def __init__(self, config: WebDatasetSource) -> None:
        self.notes = Notes()
        self.config = config
        one = config.url.lower().endswith(".tar") and not os.path.isdir(config.url)
        if not one:
            require_folder(config.url, "data.source.url ")
        names = [] if one else shards_among(files_below(config.url, self.notes), self.notes)
        self.shards = [config.url] if one else [join(config.url, name) for name in names]
        if not self.shards:
            raise UserError(f"data.source.url {config.url}: no .tar below it")
        if one and not open_storage(config.url).exists(config.url):
            raise UserError(
                f"data.source.url {config.url}: no such file. Name one .tar, or the folder (s3://bucket/prefix) of many: all below it are "
                "read, and patterns like {000..099} or * have no meaning here."
            )

    def images(self) -> Iterator[SourceImage]:
        """All samples of all shards, in the order of the files."""
        folder = self.config.url.rstrip("/") + "/"
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            for uri, ranges in zip(self.shards, pool.map(as_patient(self._sample_ranges), self.shards), strict=True):
                shard = os.path.basename(uri) if uri == self.config.url else uri.removeprefix(folder)
                for sample in ranges:
                    name = f"{os.path.splitext(shard)[0]}/{sample.key}"
                    yield SourceImage(key_of(name), name, functools.partial(self._read, uri, sample))

    def _sample_ranges(self, uri: str) -> list[SampleRange]:
        """The samples of a shard: each begins where the one before it ends, so that headers that belong to a member come along."""
        ranges: dict[str, SampleRange] = {}
        data = memoryview(open_storage(uri).read(uri)) if uri.startswith("s3://") else map_file(uri)
        last, until, formats = "", 0, 0
        found = data_runs(data, uri, on_passed=lambda name: self.notes.add(NO_DATA, f"{uri}: {name}"))
        for name, offset, size in chain.from_iterable(zip(*run, strict=True) for run in found):
            (key, extension), end = key_and_extension(name), offset + -(-size // BLOCK) * BLOCK
            if not key:
                self.notes.add(NO_DATA, f"{uri}: {name}")
                continue
            if key == last:
                ranges[key] = ranges[key]._replace(end=end)
            elif key in ranges:
                ranges[key] = ranges[key]._replace(times=ranges[key].times + 1)
            else:
                ranges[key] = SampleRange(key, until, end)
            formats = (formats if key == last else 0) + (extension in EXTENSIONS)
            if formats == 2 and extension in EXTENSIONS:
                self.notes.add(SEVERAL_FORMATS, f"{uri}: {key}")
            last, until = key, end
        return list(ranges.values())

    def _read(self, uri: str, at: SampleRange, size: int) -> Content:
        if at.times > 1:
            raise BadImage(f"its key {TWICE}")
        part = open_storage(uri).read(uri, at.start, at.end) + bytes(2 * BLOCK)  # a tar of its own: one sample and the end
        key, sample = next(samples(memoryview(part), uri))
        if sample.doubled:
            raise BadImage(f"two members .{sample.doubled}")
        picture = next((sample[extension] for extension in EXTENSIONS if extension in sample), None)
        if picture is None:
            raise BadImage(f"no image among .{', .'.join(sample)}")
        metadata = metadata_of(sample.get("json"))
        field = self.config.caption
        caption = caption_of(sample.get("txt") if field is None else metadata.get(field), key_of(key))
        label = stored_label(metadata, sample.get("cls"), self.config.label)
        if not caption.text and is_missing(label):
            raise BadImage("no caption")
        if caption.several:
            metadata.setdefault("captions", list(caption.several))
        if not is_missing(label):
            metadata["label"] = label
        return Content(square_of(picture, size), caption.text, metadata, changed=caption.changed)
