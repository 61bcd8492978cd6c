"""A folder of images, each with its caption in a text file: ``cat.png`` and ``cat.txt``, subfolders included.

Also taken, where they lie beside the image: ``cat.json`` (a ``label``, or anything else) and ``cat.features.npy`` (features of
the caption). The text files may lie in a folder of their own, and hold several captions, one a line.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator

from oar_scale.config.schema import FolderSource
from oar_scale.data.hashing import name_hash
from oar_scale.data.images import EXTENSIONS
from oar_scale.data.notes import Notes
from oar_scale.data.sources.image_files import image_files, key_of, square
from oar_scale.data.sources.source import BadImage, Content, SourceImage
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject


class FolderImages:
    """The images, cropped to the central square and resized."""

    attribution = ""

    def __init__(self, config: FolderSource) -> None:
        self.notes = Notes()
        self.path, self.captions, self.alternatives = config.path, config.captions or config.path, config.alternatives
        for field, path in (("path", self.path), ("captions", self.captions)):
            if not os.path.isdir(path):
                raise UserError(f"data.source.{field} {path}: no such folder")

    def images(self) -> Iterator[SourceImage]:
        """All images of the folder and its subfolders, sorted by path."""
        names = sorted(image_files(self.path))
        if not names:
            raise UserError(f"data.source.path {self.path}: no image in it (*.{', *.'.join(EXTENSIONS)})")
        for name in names:
            yield SourceImage(key_of(name), os.path.splitext(name)[0], functools.partial(self._read, name))

    def _read(self, name: str, size: int) -> Content:
        stem = os.path.splitext(name)[0]
        beside = os.path.join(self.path, stem)
        text = _text(os.path.join(self.captions, f"{stem}.txt"))
        metadata = _metadata(f"{beside}.json")
        if self.alternatives:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            text = lines[int(name_hash(key_of(name), "caption") * len(lines))] if lines else ""
            metadata = {"captions": lines, **metadata}
        if not text:
            raise BadImage("no caption")
        return Content(square(os.path.join(self.path, name), size), text, metadata, _bytes(f"{beside}.features.npy"))


def _text(path: str) -> str:
    return (_bytes(path) or b"").decode(errors="replace").strip()


def _metadata(path: str) -> JsonObject:
    data = _bytes(path)
    try:
        metadata = json.loads(data or b"{}")
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise UserError(f'{path}: holds no object, e.g. {{"label": 3}}')
    return metadata


def _bytes(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
