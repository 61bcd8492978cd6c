"""Decoding images that others made, with a limit on the pixels that is checked before anything is decoded.

A file of some kilobytes can hold 60,000 x 60,000 pixels, which would take 10 GB when decoded. The size is in the header, so that
is read first. Only the formats of shards are accepted: Pillow reads many more, some of which are programs (PostScript).
"""

from __future__ import annotations

import io
import struct
import warnings

from PIL import Image

from oar_scale.errors import UserError

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 << 20
"""8192 x 8192, 192 MB decoded."""

_BROKEN = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for broken files."""


def decode_image(data: bytes | memoryview, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to RGB.

    Args:
        where: names shard and sample in errors, as in ``shard.tar: image of sample 'cat'``.
        max_pixels: width times height that is still decoded.

    Raises:
        UserError: not a PNG, JPEG or WebP picture, a broken one, or one with more pixels.
    """
    image = _open(data, where)
    _check_size(image.size, where, max_pixels)
    try:
        return image.convert("RGB")
    except _BROKEN as error:
        raise UserError(f"{where} cannot be read ({error})") from error


def image_size(data: bytes | memoryview, where: str) -> tuple[int, int]:
    """Width and height in the header, without decoding. Raises UserError as :func:`decode_image`, but accepts any size."""
    return _open(data, where).size


def _open(data: bytes | memoryview, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below Pillow's
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except _BROKEN as error:
        raise UserError(f"{where} cannot be read ({error})") from error


def _check_size(size: tuple[int, int], where: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UserError(
            f"{where} cannot be read (it says {width} x {height} pixels, the limit is {max_pixels}). "
            "Scale it down, or remove it: small files with huge pictures are a known attack."
        )
