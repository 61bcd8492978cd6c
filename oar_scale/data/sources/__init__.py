"""Where captioned images come from. A source is one file here and one line in :data:`SOURCES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from oar_scale.config.schema import Source


@dataclass(frozen=True)
class SourceImage:
    """One captioned image. ``load`` may raise; the caller counts it as a bad sample."""

    key: str
    """Unique, safe as a tar member name, without dots."""
    name: str
    """What the image is held out by."""
    caption: str | None
    load: Callable[[int], Image.Image]
    """RGB image of the given side in pixels."""
    family: str = ""
    """What variants of one picture share (they differ in skin tone, say); empty for a picture without variants."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else ``KEY.json`` shall hold, a whole number ``label`` for one."""
    features: bytes | None = None
    """``KEY.features.npy``: features of the caption, float16 [T, F]."""


class ImageSource(Protocol):
    attribution: str

    def images(self, size: int) -> Iterator[SourceImage]:
        """All images, in a fixed order, to be loaded at ``size`` x ``size`` pixels."""


def open_source(config: Source) -> ImageSource:
    """The source a recipe names."""
    from oar_scale.data.sources.folder import FolderImages
    from oar_scale.data.sources.openmoji import OpenMojiImages

    sources: dict[str, Callable[..., ImageSource]] = {"openmoji": OpenMojiImages, "folder": FolderImages}
    return sources[config.type](config)
