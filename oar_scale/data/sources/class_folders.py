"""A folder for each class, as ImageNet comes: ``ROOT/n02119789/n02119789_1.JPEG``.

The label is the number of the folder among all folders that hold images, in alphabetical order; the caption is made from the class's name.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence

from oar_scale.config.schema import ClassFoldersSource
from oar_scale.data.data_files import is_data
from oar_scale.data.labels import readable
from oar_scale.data.notes import Notes
from oar_scale.data.sources.image_files import image_files, key_of, no_folder, square
from oar_scale.data.sources.source import Content, SourceImage
from oar_scale.errors import UserError
from oar_scale.json_object import parse_object
from oar_scale.text import read_text


class ClassFolderImages:
    """The images, cropped to the central square and resized."""

    attribution = ""

    def __init__(self, config: ClassFoldersSource) -> None:
        self.notes = Notes()
        self.path, self.template = config.path, config.caption
        if not os.path.isdir(self.path):
            raise no_folder("path", self.path)
        self.files: dict[str, list[str]] = {}
        """The images of each class, relative to its folder."""
        for path in image_files(self.path, self.notes):
            folder, _, file = path.partition("/")
            if file:
                self.files.setdefault(folder, []).append(file)
            else:
                self.notes.add("images that lie in no class folder, left out", path)
        self.classes = sorted(self.files)
        for folder in self._folders():
            if folder not in self.files:
                self.notes.add("folders without images, which get no label", f"{folder}/")
        if not self.classes:
            raise UserError(f"data.source.path {self.path}: no folder of images in it; each class is a folder of images")
        self.names = {name: name.replace("_", " ") for name in self.classes}
        if config.names is not None:
            self.names = read_names(config.names)
            missing = [name for name in self.classes if name not in self.names]
            if missing:
                raise UserError(f"data.source.names {config.names}: no name for {len(missing)} of the classes, e.g. {missing[0]!r}")

    def images(self) -> Iterator[SourceImage]:
        """All images, class by class, in alphabetical order."""
        for label, folder in enumerate(self.classes):
            for file in self.files[folder]:
                path = f"{folder}/{file}"
                yield SourceImage(key_of(path), os.path.splitext(path)[0], functools.partial(self._read, path, label))

    def _folders(self) -> list[str]:
        names = [name for name in os.listdir(self.path) if is_data(f"{name}/")]
        return sorted(name for name in names if os.path.isdir(os.path.join(self.path, name)))

    def _read(self, path: str, label: int, size: int) -> Content:
        folder = self.classes[label]
        caption = self.template.replace("{name}", self.names[folder])
        return Content(square(os.path.join(self.path, path), size), caption, {"label": label, "class": folder})


def read_names(path: str) -> dict[str, str]:
    """Readable names of classes, by folder; of several ("tench, Tinca tinca") the first.

    Args:
        path: a JSON object of class and name (or of number and [class, name], as Keras has them for ImageNet), or text with
            a line for each class, the name behind the first blank (as in ``LOC_synset_mapping.txt``).

    Raises:
        UserError: the file is missing or holds something else.
    """
    where = f"data.source.names {path}"
    text = read_text(path, where)
    pairs: Iterable[Sequence[str]]
    try:
        if path.lower().endswith(".json"):
            pairs = [value if isinstance(value, list) else (key, value) for key, value in parse_object(text).items()]
        else:
            pairs = [line.split(maxsplit=1) for line in text.split("\n") if line.strip()]
        return {folder: readable(name) for folder, name in pairs}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: a class and its name are expected for each class ({error})") from error
