"""Views: fixed variants of a training image, tokenized side by side.

center        the image, its middle where it is no square
center_flip   mirrored (not for arrows and flags)
jitterK       the K-th of a family of small zooms and shifts, chosen by a hash of the sample's key
crop0-9       ten crops of the image at 1.1 times the size, as LlamaGen takes them: the middle, the corners, all five mirrored
crop10-19     the same at 1.05 times the size

An image that is larger than the views keeps its detail in the crops; one that has their size is enlarged for them.
"""

from __future__ import annotations

import zlib

from PIL import Image, ImageOps

from oar_scale.data.hashing import name_bytes, uniform

MAX_ZOOM, MAX_SHIFT = 0.15, 0.09
"""As a fraction of the side; what comes in from outside is white."""

CROP_PERCENT = (110, 105)
"""Size of the image that is cropped, of crop0-9 and of crop10-19."""


def make_view(image: Image.Image, view: str, key: str, size: int | None = None) -> Image.Image:
    """The named view of an RGB image, ``size`` x ``size`` pixels (default: the image's width)."""
    side = image.width if size is None else size
    if view.startswith("crop"):
        return _crop(image, int(view.removeprefix("crop")), side)
    square = _square(image, side)
    if view == "center":
        return square
    if view == "center_flip":
        return ImageOps.mirror(square)
    return _jitter(square, int(view.removeprefix("jitter")), key)


def _square(image: Image.Image, side: int) -> Image.Image:
    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def _crop(image: Image.Image, number: int, side: int) -> Image.Image:
    """Numbers 0 to 4 are the middle, the upper and the lower corners (left before right); 5 to 9 their mirror images."""
    larger = side * CROP_PERCENT[number // 10] // 100
    rest = larger - side
    left, top = ((rest // 2, rest // 2), (0, 0), (rest, 0), (0, rest), (rest, rest))[number % 5]
    cropped = _square(image, larger).crop((left, top, left + side, top + side))
    return ImageOps.mirror(cropped) if number % 10 >= 5 else cropped


def _jitter(square: Image.Image, number: int, key: str) -> Image.Image:
    side = square.width
    keys = (zlib.crc32(name_bytes(key)), number)
    zoom = (2 * float(uniform("zoom", *keys)) - 1) * MAX_ZOOM
    dx, dy = ((2 * float(uniform(axis, *keys)) - 1) * MAX_SHIFT * side for axis in ("dx", "dy"))
    half = side / 2 * (1 + zoom)
    middle_x, middle_y = side / 2 + dx, side / 2 + dy
    margin = side  # wide enough for any zoom and shift
    page = ImageOps.expand(square, margin, "white")
    box = (middle_x - half + margin, middle_y - half + margin, middle_x + half + margin, middle_y + half + margin)
    return page.resize((side, side), Image.Resampling.BICUBIC, box=box)
