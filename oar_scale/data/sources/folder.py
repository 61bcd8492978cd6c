"""A folder of images, each with its caption in a text file: ``cat.png`` and ``cat.txt``, subfolders included.

Also taken, where they lie beside the image: ``cat.json`` (a ``label``, or anything else) and ``cat.features.npy`` (features of
the caption). The text files may lie in a folder of their own, and hold several captions, one a line.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from oar_scale.config.schema import FolderSource
from oar_scale.data.data_files import walk
from oar_scale.data.images import EXTENSIONS
from oar_scale.data.labels import stored_label
from oar_scale.data.notes import Notes
from oar_scale.data.sources.captions import caption_lines, caption_of, metadata_of
from oar_scale.data.sources.image_files import file_content, image_files, key_of, no_folder, note_alone, square
from oar_scale.data.sources.source import BadImage, Content, SourceImage
from oar_scale.errors import UserError
from oar_scale.text import is_missing


class FolderImages:
    """The images, cropped to the central square and resized."""

    attribution = ""

    def __init__(self, config: FolderSource) -> None:
        self.notes = Notes()
        self.path, self.captions, self.alternatives = config.path, config.captions or config.path, config.alternatives
        for field, path in (("path", self.path), ("captions", self.captions)):
            if not os.path.isdir(path):
                raise no_folder(field, path)

    def images(self) -> Iterator[SourceImage]:
        """All images of the folder and its subfolders, sorted by path."""
        names = image_files(self.path, self.notes)
        if not names:
            raise UserError(f"data.source.path {self.path}: no image in it (*.{', *.'.join(EXTENSIONS)})")
        if self.captions != self.path:
            texts = (name for name in walk(self.captions, self.notes) if name.lower().endswith(".txt"))
            note_alone(texts, names, self.notes)
        for name in names:
            yield SourceImage(key_of(name), os.path.splitext(name)[0], functools.partial(self._read, name))

    def _read(self, name: str, size: int) -> Content:
        stem = os.path.splitext(name)[0]
        beside = os.path.join(self.path, stem)
        given: object = _beside(os.path.join(self.captions, stem), "txt")
        if self.alternatives and isinstance(given, bytes):
            given = caption_lines(given)
        caption = caption_of(given, key_of(name))
        metadata = metadata_of(_beside(beside, "json"))
        label = stored_label(metadata, _beside(beside, "cls"))
        if not caption.text and is_missing(label):
            raise BadImage("no caption")
        if caption.several:
            metadata = {"captions": list(caption.several), **metadata}
        if not is_missing(label):
            metadata["label"] = label
        image, features = square(os.path.join(self.path, name), size), _beside(beside, "features.npy")
        return Content(image, caption.text, metadata, features, caption.changed)


def _beside(stem: str, extension: str) -> bytes | None:
    """The content of ``STEM.EXTENSION``, which may also be written ``.EXT`` or ``.Ext``; None where there is none."""
    for each in dict.fromkeys((extension, extension.upper(), extension.capitalize())):
        try:
            return file_content(f"{stem}.{each}")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise BadImage(f"its .{each} cannot be read ({error.strerror})") from error
    return None
