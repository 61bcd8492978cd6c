"""Views: fixed variants of a training image, tokenised side by side.

center        the image
center_flip   mirrored (not for arrows and flags)
jitterK       the K-th of a family of small zooms and shifts, chosen by a hash of the sample's key
"""

from __future__ import annotations

import zlib

from PIL import Image, ImageOps

from oar_scale.data.hashing import uniform

MAX_ZOOM, MAX_SHIFT = 0.15, 0.09
"""As a fraction of the side; what comes in from outside is white."""


def make_view(image: Image.Image, view: str, key: str) -> Image.Image:
    """The named view of a square RGB image, at the same size."""
    if view == "center":
        return image
    if view == "center_flip":
        return ImageOps.mirror(image)
    side = image.width
    words = (zlib.crc32(key.encode()), int(view.removeprefix("jitter")))
    zoom = (2 * float(uniform("zoom", *words)) - 1) * MAX_ZOOM
    dx, dy = ((2 * float(uniform(axis, *words)) - 1) * MAX_SHIFT * side for axis in ("dx", "dy"))
    half = side / 2 * (1 + zoom)
    middle_x, middle_y = side / 2 + dx, side / 2 + dy
    margin = side  # room enough for any zoom and shift
    page = ImageOps.expand(image, margin, "white")
    box = (middle_x - half + margin, middle_y - half + margin, middle_x + half + margin, middle_y + half + margin)
    return page.resize((side, side), Image.Resampling.BICUBIC, box=box)
