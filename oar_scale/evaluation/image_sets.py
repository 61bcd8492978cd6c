"""A set of images to be compared with another one, wherever it lies, cut into parts that are read one at a time.

    a folder of images          PART_IMAGES of them, in the order of their paths     captions: cat.txt beside cat.png, a drawing's record
    WebDataset shards           a tar (a folder or s3://)                            captions: KEY.txt
    arr_0 of an .npz            PART_IMAGES rows                                     no captions

A set has a fingerprint that changes with any byte of its images, and of the captions beside them. Pictures are decoded as everywhere here:
upright, on white.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray
from PIL import Image

from oar_scale.config.fingerprint import fingerprint
from oar_scale.data.data_files import files_below
from oar_scale.data.images import EXTENSIONS, decode_image
from oar_scale.data.manifest import read_manifest
from oar_scale.data.notes import Notes
from oar_scale.data.open_shard import ImageShard
from oar_scale.data.scan import list_shards, open_bytes
from oar_scale.data.sources.image_files import image_files
from oar_scale.data.views import make_view
from oar_scale.errors import UserError
from oar_scale.evaluation.adm_batch import Batch, read_batch
from oar_scale.generation.picture_files import read_record
from oar_scale.storage import join, open_storage
from oar_scale.storage.background import in_order
from oar_scale.storage.schemes import LOCAL, scheme_of
from oar_scale.text import NotText, decode_text

PART_IMAGES = 1000
READERS = 8
Kind = Literal["folder", "shards", "batch"]
_Found = tuple[str, Image.Image, str | None, str]
"""Name, picture, caption and key of an image."""


class SetImage(NamedTuple):
    """One image of a set."""

    name: str
    pixels: NDArray[np.uint8]
    """[H, W, 3]"""
    caption: str | None
    key: str
    """What it is called in any set: its path without the ending, its key in a shard, its row."""


@dataclass(frozen=True)
class SetPart:
    """Some images of a set, which are read together."""

    name: str
    fingerprint: str
    files: tuple[str, ...] = ()
    """Of a folder: the images' paths in it. Of shards: the tar."""
    rows: tuple[int, int] = (0, 0)
    """Of an ``.npz``: the first row, and the one after the last."""
    stated: tuple[int, int] | None = None
    """Bytes and CRC32C of a tar, where a manifest states them."""


@dataclass(frozen=True)
class ImageSet:
    """What is known of a set before an image is decoded; small enough to be sent to every actor."""

    where: str
    kind: Kind
    parts: tuple[SetPart, ...]
    size: int | None = None
    """Side to which every image is brought: its middle square, Lanczos. None: images are taken as they are."""

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of the images, and with the size that they are brought to."""
        return fingerprint({"parts": [part.fingerprint for part in self.parts], "size": self.size})

    def read(self, part: SetPart) -> Iterator[SetImage]:
        """The images of a part, in their order.

        Raises:
            UserError: an image cannot be read; names it.
        """
        readers: dict[Kind, Callable[[SetPart], Iterator[_Found]]] = {
            "folder": self._folder_images,
            "shards": self._shard_images,
            "batch": self._batch_images,
        }
        for name, picture, caption, key in readers[self.kind](part):
            sized = picture if self.size is None else make_view(picture, "center", name, self.size)
            yield SetImage(name, np.asarray(sized), caption, key)

    def _folder_images(self, part: SetPart) -> Iterator[_Found]:
        for name in part.files:
            path = os.path.join(self.where, name)
            data = open_storage(path).read(path)
            yield name, decode_image(data, path), _caption_beside(path) or _caption_in(data), os.path.splitext(name)[0]

    def _shard_images(self, part: SetPart) -> Iterator[_Found]:
        uri = join(self.where, part.files[0])
        with open_bytes(uri) as data:
            if part.stated not in (None, (len(data), crc32c(data))):
                raise _other_bytes(uri, self.where)
            shard = ImageShard(data, uri)
            for row, key in enumerate(shard.keys):
                yield f"{part.name}: {key}", shard.picture(row), _text(shard.find(row, ("txt",)), f"{uri}: {key}.txt"), key

    def _batch_images(self, part: SetPart) -> Iterator[_Found]:
        batch = read_batch(self.where)
        if batch is None:
            raise UserError(f"{self.where}: its images are gone")
        for row, pixels in enumerate(batch.rows(*part.rows), part.rows[0]):
            yield f"image {row}", Image.fromarray(pixels), None, str(row)


def find_images(where: str, size: int | None = None) -> ImageSet:
    """The set at a path or URI.

    Args:
        size: side to which every image is brought.

    Raises:
        UserError: there is none, or it is empty.
    """
    if where.lower().endswith(".npz"):
        batch = read_batch(where)
        if batch is None:
            raise UserError(f"{where}: holds no images (no arr_0)")
        return ImageSet(where, "batch", _batch_parts(batch), size)
    if scheme_of(where) == LOCAL and not os.path.isdir(where):
        raise UserError(f"{where}: no such folder. Name a folder of images or of shards, s3://bucket/prefix, or an .npz file.")
    names = files_below(where, Notes())
    if any(name.lower().endswith(".tar") for name in names):
        return ImageSet(where, "shards", _shard_parts(where, names), size)
    pictures = [name for name in names if name.lower().rpartition(".")[2] in EXTENSIONS]
    if pictures and scheme_of(where) != LOCAL:
        raise UserError(f"{where}: loose images are read from a local folder. Pack them into shards (tar), or copy them here.")
    if not pictures:
        raise UserError(f"{where}: holds no images (*.{', *.'.join(EXTENSIONS)}) and no shards (*.tar)")
    return ImageSet(where, "folder", _folder_parts(where), size)


def _folder_parts(folder: str) -> tuple[SetPart, ...]:
    names = image_files(folder, Notes())
    prints = list(in_order(functools.partial(_file_print, folder), names, READERS))
    parts = []
    for index, start in enumerate(range(0, len(names), PART_IMAGES)):
        some = slice(start, start + PART_IMAGES)
        parts.append(SetPart(f"{index:05d}", fingerprint({"files": [*zip(names[some], prints[some], strict=True)]}), tuple(names[some])))
    return tuple(parts)


def _file_print(folder: str, name: str) -> list[int]:
    path = os.path.join(folder, name)
    found = []
    for each in (path, _beside(path)):
        if each == path or os.path.isfile(each):
            data = open_storage(each).read(each)
            found += [len(data), crc32c(data)]
    return found


def _shard_parts(folder: str, names: list[str]) -> tuple[SetPart, ...]:
    if "manifest.json" in names:
        shards, sizes = read_manifest(folder).shards, open_storage(folder).sizes(folder)
        for shard in shards:
            if sizes.get(uri := join(folder, shard.name), shard.bytes) != shard.bytes:
                raise _other_bytes(uri, folder)
        return tuple(
            SetPart(
                shard.name,
                fingerprint({"bytes": shard.bytes, "crc32c": shard.crc32c}),
                (shard.name,),
                stated=(shard.bytes, shard.crc32c),
            )
            for shard in shards
        )
    tars = list_shards(folder)
    prints = in_order(functools.partial(_shard_print, folder), tars, READERS)
    return tuple(SetPart(name, found, (name,)) for name, found in zip(tars, prints, strict=True))


def _other_bytes(uri: str, folder: str) -> UserError:
    return UserError(
        f"{uri}: not the bytes that manifest.json states: it was replaced or damaged since. Restore it, or write the manifest anew: "
        f"oar data index {folder} --force"
    )


def _shard_print(folder: str, name: str) -> str:
    """Of a local tar its checksum; of an object what its storage says, which changes whenever it is replaced."""
    uri = join(folder, name)
    if scheme_of(uri) != LOCAL:
        return fingerprint({"version": open_storage(uri).version(uri)})
    with open_bytes(uri) as data:
        return fingerprint({"bytes": len(data), "crc32c": crc32c(data)})


def _batch_parts(batch: Batch) -> tuple[SetPart, ...]:
    parts = []
    for index, start in enumerate(range(0, batch.shape[0], PART_IMAGES)):
        stop = min(start + PART_IMAGES, batch.shape[0])
        parts.append(
            SetPart(f"{index:05d}", fingerprint({"crc32": batch.crc32, "shape": batch.shape, "rows": [start, stop]}), (), (start, stop))
        )
    return tuple(parts)


def _caption_beside(path: str) -> str | None:
    beside = _beside(path)
    return _text(open_storage(beside).read(beside), beside) if os.path.isfile(beside) else None


def _beside(path: str) -> str:
    return os.path.splitext(path)[0] + ".txt"


def _caption_in(data: bytes) -> str | None:
    """The caption that a drawing of ``oar sample`` says it was drawn for. None where it says none, or what this version cannot read."""
    try:
        record = read_record(data)
    except UserError:
        return None
    return record.prompt.strip() or None if record and isinstance(record.prompt, str) else None


def _text(data: bytes | memoryview | None, where: str) -> str | None:
    if data is None:
        return None
    try:
        return decode_text(data).strip() or None
    except NotText as error:
        raise UserError(f"{where}: {error}") from error
