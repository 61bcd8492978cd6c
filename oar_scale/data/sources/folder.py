"""A folder of images, each with its caption in a text file beside it: ``cat.png`` and ``cat.txt``.

Also taken, where there: ``cat.json`` (a ``label``, or anything else) and ``cat.features.npy`` (features of the caption).
"""

from __future__ import annotations

import functools
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

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
            beside = os.path.join(self.path, stem)
            yield SourceImage(
                key,
                stem,
                _caption(f"{beside}.txt"),
                functools.partial(_load, path),
                facts=_facts(f"{beside}.json"),
                features=_bytes(f"{beside}.features.npy"),
            )


def _caption(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip() or None
    except FileNotFoundError:
        return None


def _load(path: str, size: int) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)


def _facts(path: str) -> dict[str, Any]:
    data = _bytes(path)
    try:
        facts = json.loads(data or b"{}")
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(facts, dict):
        raise UserError(f'{path}: holds no object, e.g. {{"label": 3}}')
    return facts


def _bytes(path: str) -> bytes | None:
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return file.read()
