"""What sources of image files share: which files are images, how they are named, and how one becomes a square."""

from __future__ import annotations

import errno
import os
import re
import stat
import zlib
from collections.abc import Iterable

from PIL import Image, ImageOps

from oar_scale.data.data_files import walk
from oar_scale.data.hashing import name_bytes
from oar_scale.data.images import EXTENSIONS, decode_image
from oar_scale.data.notes import Notes
from oar_scale.data.sources.source import BadImage
from oar_scale.errors import UserError

OTHER_FORMATS = (
    *("gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2"),
    *("jfif", "jpe", "svg", "psd", "dng", "ppm", "pgm", "tga"),
)
"""Endings of pictures that are left out."""
MAX_BYTES = 1 << 30
"""A file of more is not read: 64 million pixels take less in every format."""
ALONE = "captions and labels without a picture of their name, left out"
BESIDE = ("txt", "json", "npy", "cls")
"""Endings of what may lie beside an image and belong to it."""


def image_files(folder: str, notes: Notes) -> list[str]:
    """Paths of all images in and below a folder, relative to it, with ``/``, sorted (:func:`oar_scale.data.data_files.walk`)."""
    images, beside = [], []
    for name in walk(folder, notes, _is_image):
        ending = name.lower().rpartition(".")[2]
        if _is_image(name):
            images.append(name)
        elif ending in OTHER_FORMATS:
            notes.add(f"pictures that are not .{', .'.join(EXTENSIONS)}, left out", name)
        elif ending in BESIDE:
            beside.append(name)
        else:
            notes.add("files of other kinds, left out", name)
    note_alone(beside, images, notes)
    return sorted(images)


def note_alone(beside: Iterable[str], images: Iterable[str], notes: Notes) -> None:
    """Note the captions and other files that should lie beside a picture, and have none of their name."""
    stems = {os.path.splitext(name)[0] for name in images}
    for name in beside:
        if re.sub(r"(\.features)?\.[^./]*$", "", name, flags=re.IGNORECASE) not in stems:
            notes.add(ALONE, name)


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in EXTENSIONS


def no_folder(field: str, path: str) -> UserError:
    """The error that a folder of images is none."""
    if os.path.isfile(path):
        return UserError(
            f"data.source.{field} {path}: is a file, and a folder is wanted. A CSV, TSV or Parquet file is type: table, "
            "a tar is type: webdataset."
        )
    return UserError(f"data.source.{field} {path}: no such folder")


def key_of(path: str) -> str:
    """A path as a sample's key: readable, and still different for ``a b.png`` and ``a-b.png``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path) + f"-{zlib.crc32(name_bytes(path)):08x}"


def square(path: str, size: int) -> Image.Image:
    """An image file as RGB, centre-cropped to a square and resized. Raises BadImage as :func:`square_of`."""
    try:
        data = file_content(path)
    except (OSError, ValueError) as error:  # ValueError: a name with NUL in it
        raise BadImage(f"cannot be read ({error})") from error
    return square_of(data, size)


def file_content(path: str) -> bytes:
    """What is in a file that people's data names. Raises OSError, also for what has no end (pipes, devices) or no bearable one."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # a pipe without a writer would wait
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file", path)
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        return file.read(MAX_BYTES)


def square_of(data: bytes | memoryview, size: int) -> Image.Image:
    """:func:`square` of a file's content.

    Raises:
        BadImage: it cannot be read, or unpacks to more pixels than a photo has.
    """
    try:
        return ImageOps.fit(decode_image(data, "it"), (size, size), Image.Resampling.LANCZOS)
    except UserError as error:
        raise BadImage(str(error)) from error
