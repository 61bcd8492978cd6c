"""The one way in which pictures become RGB pixels, wherever one is read: upright, 8 bits, on white.

    turned            as the camera says (EXIF or XMP orientation)
    transparent       laid over white: an alpha channel, premultiplied or not, a palette's, or a colour that stands for transparency
    16 bits           the upper 8 are kept, of grey as of colour
    1 bit, grey, palette, CMYK, YCbCr, HSV, Lab   their colours
    whole numbers (I) and fractions (F)           the smallest range that holds their values: 0 to 1 (F only), 255, 65,535, 2^31 - 1
    animated          the first picture
    colour profiles, gamma   not applied: the numbers are taken as sRGB, as img2dataset and torchvision take them

Data comes from strangers. A file of some kilobytes can hold 60,000 x 60,000 pixels, which would take 10 GB when decoded; the size is in the
header, so that is read first. Only the formats of shards are accepted: Pillow reads many more, some of which are programs (PostScript).
A file that was cut is an error, also one whose missing part is zeros, as an interrupted download or a full disk leaves it.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from oar_scale.errors import UserError

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 << 20
"""8192 x 8192, 192 MB decoded."""

_BROKEN = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError),
    *(AssertionError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises for broken files."""
_SCALE_DOWN = "Scale it down, or remove it: small files with huge pictures are a known attack."
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture of an orientation is made upright; 1 is."""
_ON_THEIR_SIDE = (5, 6, 7, 8)
_SAY_ORIENTATION = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")
"""Keys of what Pillow notes beside a picture."""
_NUMBERS = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_RANGES = {"I": (255, 65_535, 2**31 - 1), "F": (1, 255, 65_535, 2**31 - 1)}
_OVERSHOOT = {"I": 0.0, "F": 0.1}
"""The share of its range by which a value may lie outside, and is cut: fractions that were resized do."""


def decode_image(data: bytes | memoryview, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to upright RGB on white (see the module). Arguments and errors as :func:`decode_upright`."""
    return on_white(decode_upright(data, where, max_pixels))


def decode_upright(data: bytes | memoryview, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to upright RGB, or RGBA where it has transparency.

    Args:
        where: names shard and sample in errors, as in ``shard.tar: image of sample 'cat'``.
        max_pixels: width times height that is still decoded.

    Raises:
        UserError: not a PNG, JPEG or WebP picture, a broken or cut one, or one with more pixels.
    """
    image = _open(data, where, max_pixels)
    _check_size(image.size, where, max_pixels)
    try:
        _check_tail(data, image.format)
        if image.format == "PNG":
            _scale_transparent_colour(image)
        return _upright(image)
    except _BROKEN as error:
        raise UserError(f"{where} cannot be read ({error})") from error


def upright(image: Image.Image, where: str) -> Image.Image:
    """A picture in memory, of any mode, as upright RGB, or RGBA where it has transparency. Raises UserError where it cannot be read."""
    try:
        return _upright(image)
    except _BROKEN as error:
        raise UserError(f"{where} cannot be read ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in _NUMBERS:
        colours = _from_numbers(image)
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        colours = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    elif image.has_transparency_data:
        colours = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    else:
        colours = image.convert("RGB")
    turn = _UPRIGHT.get(_orientation(image))
    if turn is None:
        return colours
    turned = colours.transpose(turn)
    turned.info = {key: value for key, value in turned.info.items() if key not in _SAY_ORIENTATION}  # or it would be turned once more
    return turned


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA picture laid over white, as RGB; an RGB picture as it is."""
    if image.mode == "RGB":
        return image
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    return page.convert("RGB")


def image_size(data: bytes | memoryview, where: str) -> tuple[int, int]:
    """Width and height of the upright picture, from its header. Raises UserError as :func:`decode_image`, but accepts any size."""
    image = _open(data, where)
    width, height = image.size
    known = any(
        each in image.info for each in ("exif", "xmp", "Raw profile type exif")
    )  # a PNG may have it behind its pixels, which are not decoded here
    return (height, width) if known and _orientation(image) in _ON_THEIR_SIDE else (width, height)


def _open(data: bytes | memoryview, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which are refused below, and of corrupt EXIF
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UserError(f"{where} cannot be read (cannot identify image file: no {', '.join(FORMATS)}, or a broken header)") from error
    except Image.DecompressionBombError as error:  # its own text names a limit of Pillow's
        raise UserError(f"{where} cannot be read (it has too many pixels, the limit is {max_pixels}). {_SCALE_DOWN}") from error
    except _BROKEN as error:
        raise UserError(f"{where} cannot be read ({error})") from error


def _check_size(size: tuple[int, int], where: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UserError(f"{where} cannot be read (it says {width} x {height} pixels, the limit is {max_pixels}). {_SCALE_DOWN}")


def _check_tail(data: bytes | memoryview, kind: str | None) -> None:
    """Raise OSError for a file that ends in zeros where its picture should: decoders take those for pixels."""
    if len(data) < 64 or any(data[-16:]):  # one zero may well end a whole file, as of a photo with a film behind it
        return
    whole = bytes(data)
    if kind == "JPEG":  # neither marker can occur among the coded pixels
        cut = whole.rfind(b"\xff\xd9") < whole.rfind(b"\xff\xda")
    elif kind == "PNG":
        cut = b"IEND" not in whole
    else:
        cut = kind == "WEBP" and data[12:15] == b"VP8" and data[15:16] != b"X" and not any(data[-64:])
    if cut:
        raise OSError("it ends in zeros: the file was not written to its end")


def _scale_transparent_colour(image: Image.Image) -> None:
    """The transparent colour of a PNG that was just opened, in the numbers that Pillow makes of its pixels.

    The file has it in its own bits. Of 16-bit grey Pillow keeps all of them, of 16-bit colour the upper 8.
    """
    key = image.info.get("transparency")
    mode = image.tile[0][3] if isinstance(image, ImageFile.ImageFile) and image.tile else None
    if isinstance(key, int) and mode in ("1", "L;2", "L;4"):
        image.info["transparency"] = key * {"1": 255, "L;2": 85, "L;4": 17}[mode]
    if isinstance(key, tuple) and mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _from_numbers(image: Image.Image) -> Image.Image:
    """Grey of whole numbers or fractions; see the module for their ranges. Raises ValueError where none of them holds the values."""
    values_HW = np.asarray(image)
    if image.mode.startswith("I;16"):
        grey_HW = values_HW >> 8
        if "transparency" in image.info:
            grey_HW = np.where(values_HW == image.info["transparency"], 255, grey_HW)
    else:
        low, high, slack = float(values_HW.min()), float(values_HW.max()), _OVERSHOOT[image.mode]
        top = next((each for each in _RANGES[image.mode] if high <= (1 + slack) * each), None)
        if top is None or not low >= -slack * top:
            raise ValueError(f"its values run from {low:g} to {high:g}; scale them to 0 to 255, 0 to 65535 or, fractions, to 0 to 1")
        grey_HW = np.rint(np.clip(values_HW / top, 0, 1) * 255)
    return Image.fromarray(grey_HW.astype(np.uint8)).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The orientation that EXIF or XMP states, 1 to 8; 1 where there is none that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that EXIF is corrupt
            stated = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return stated if isinstance(stated, int) else 1
