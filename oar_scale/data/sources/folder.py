"""A folder of images, each with its caption in a text file beside it: ``cat.png`` and ``cat.txt``."""

from __future__ import annotations

import functools
import os
import re
import zlib
from collections.abc import Iterator

from PIL import Image, ImageOps

from oar_scale.config.schema import FolderSource
from oar_scale.data.sources import SourceImage
from oar_scale.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


class FolderImages:
    """Centre-cropped to a square, resized."""

    attribution = ""

    def __init__(self, config: FolderSource) -> None:
        self.path = config.path
        if not os.path.isdir(self.path):
            raise UserError(f"data.source.path {self.path}: no such folder")

    def images(self, size: int) -> Iterator[SourceImage]:
        names = sorted(name for name in os.listdir(self.path) if name.lower().endswith(EXTENSIONS))
        if not names:
            raise UserError(f"data.source.path {self.path}: no image in it ({', '.join('*' + e for e in EXTENSIONS)})")
        for name in names:
            stem, path = os.path.splitext(name)[0], os.path.join(self.path, name)
            key = re.sub(r"[^A-Za-z0-9_-]+", "-", name) + f"-{zlib.crc32(name.encode()):08x}"  # "a b.png" and "a-b.png" stay two
            yield SourceImage(key, stem, _caption(os.path.join(self.path, stem + ".txt")), functools.partial(_load, path))


def _caption(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip() or None
    except FileNotFoundError:
        return None


def _load(path: str, size: int) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
