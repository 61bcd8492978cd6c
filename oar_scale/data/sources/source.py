"""What a source of captioned images has to offer.

A source is read in two passes: first the names of all images, so that a million of them can be ordered and split while nothing
but names is in memory; then the content of one image at a time, by several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from oar_scale.data.notes import Notes
from oar_scale.text import cut

REASON_LENGTH = 300
"""Characters of a reason; a library's message may hold the whole value that it could not use."""


class BadImage(Exception):
    """An image that cannot be used; ``str(error)`` is the reason, in short."""

    def __init__(self, reason: str) -> None:
        line = " ".join(reason.encode("utf-8", "backslashreplace").decode().split())
        super().__init__(cut(line, characters=REASON_LENGTH))


@dataclass(frozen=True)
class Content:
    """The contents of a :class:`SourceImage`: picture, caption and metadata."""

    image: Image.Image
    """RGB, square, of the requested side."""
    caption: str
    """Empty where there is a label instead."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """Further entries of ``KEY.json``; ``label`` is the class, as the source has it (:mod:`oar_scale.data.labels`)."""
    features: bytes | None = None
    """``KEY.features.npy``: features of the caption, float16 [T, F]."""
    changed: tuple[str, ...] = ()
    """What was taken otherwise than it is there: reasons for :class:`oar_scale.data.notes.Notes`."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One captioned image, by name."""

    key: str
    """Unique, safe as a tar member name, without dots."""
    name: str
    """What the image is held out by."""
    read: Callable[[int], Content]
    """Its content for a side in pixels. Raises BadImage; called by several threads at once."""
    family: str = ""
    """What variants of one picture share (they differ in skin tone, say); empty for a picture without variants."""


class ImageSource(Protocol):
    """A data set of captioned images (``data.source`` of a recipe)."""

    attribution: str
    """Author and licence, copied into the manifest; empty where the source names none."""
    notes: Notes
    """What was left out when the images were listed; complete when :meth:`images` has ended."""

    def images(self) -> Iterator[SourceImage]:
        """All images, in a fixed order, none of them read yet."""
