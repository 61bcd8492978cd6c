"""Where captioned images come from. A source is one file here and one line in :func:`open_source`.

A source is asked twice: first for the names of all images, so that a million of them can be ordered and split while nothing
is in memory but names, then for the content of one image at a time, by several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from oar_scale.config.schema import Source


class BadSample(Exception):
    """An image that cannot be used; ``str(error)`` says why in a few words."""


@dataclass(frozen=True)
class Content:
    """What a name stands for."""

    image: Image.Image
    """RGB, square, of the side that was asked for."""
    caption: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else ``KEY.json`` shall hold, a whole number ``label`` for one."""
    features: bytes | None = None
    """``KEY.features.npy``: features of the caption, float16 [T, F]."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One captioned image, by name."""

    key: str
    """Unique, safe as a tar member name, without dots."""
    name: str
    """What the image is held out by."""
    read: Callable[[int], Content]
    """Its content for a side in pixels. Raises BadSample; called by several threads at once."""
    family: str = ""
    """What variants of one picture share (they differ in skin tone, say); empty for a picture without variants."""


class ImageSource(Protocol):
    attribution: str

    def images(self) -> Iterator[SourceImage]:
        """All images, in a fixed order, none of them read yet."""


def open_source(config: Source) -> ImageSource:
    """The source a recipe names. Raises UserError where it is not there."""
    from oar_scale.data.sources.class_folders import ClassFolderImages
    from oar_scale.data.sources.folder import FolderImages
    from oar_scale.data.sources.openmoji import OpenMojiImages
    from oar_scale.data.sources.table import TableImages
    from oar_scale.data.sources.webdataset import WebDatasetImages

    sources: dict[str, Callable[..., ImageSource]] = {
        "openmoji": OpenMojiImages,
        "folder": FolderImages,
        "table": TableImages,
        "class_folders": ClassFolderImages,
        "webdataset": WebDatasetImages,
    }
    return sources[config.type](config)
