"""Pictures of any size on the square that a model draws, and what was drawn back in the picture.

    picture W x H, hidden pixels  --scaled to fit-->  S x S: [ . . # . ]   . known   # hidden   = beside the picture: hidden, too
                                                             [ = = = = ]
    known pixels of the picture  <--  exactly as they were; only hidden ones are taken from the drawing, scaled back

No known pixel of the square has anything of a hidden one: the picture is scaled with its hidden pixels transparent.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oar_scale.data.images import MAX_PIXELS, on_white, upright
from oar_scale.errors import UserError
from oar_scale.generation.seen_codes import blurred
from oar_scale.tokenizers.vq import pixels_to_unit, unit_to_pixels

Mask = Image.Image | NDArray[np.bool_] | Tensor | tuple[int, int, int, int]
"""Which pixels of the upright picture are drawn anew: a picture in black (kept) and white (drawn), bool [H, W], or a box (left, top,
right, bottom), as Pillow counts them."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""
_DRAWN_FROM = 128
"""The grey of a mask from which on a pixel is drawn."""


class Shown(NamedTuple):
    """The model's square with a picture on it, as the image tokenizer is shown it."""

    pixels_3SS: Tensor
    """In [-1, 1], grey beside the picture; where it is hidden, too."""
    marked_SS: Tensor
    """bool: has some of the pixels that are to be drawn, or are hidden for another reason."""
    beside_SS: Tensor
    """bool: lies beside the picture."""


@dataclass(frozen=True)
class Canvas:
    """One picture on the model's square."""

    picture: Image.Image
    """Upright, RGB, or RGBA where it is transparent."""
    drawn_HW: NDArray[np.bool_]
    """Its pixels that are to be drawn."""
    size: int
    """S: side of the square."""
    unknown_HW: NDArray[np.bool_] | None = None
    """Its pixels that are not known; None: those to be drawn. There are more where others are to be drawn after these."""
    corner: tuple[int, int] = (0, 0)
    """Where the picture begins in a larger one that it is a window of: left, top."""

    @property
    def inner(self) -> tuple[int, int, int, int]:
        """Where the picture lies on the square: left, top, right, bottom."""
        width, height = scaled_size(self.picture.size, self.size)
        left, top = (self.size - width) // 2, (self.size - height) // 2
        return left, top, left + width, top + height

    def drawn(self) -> Tensor:
        """The pixels of the square [S, S] that have some of the ones to be drawn."""
        return self._square(_touched(self.drawn_HW, *self._inner_size()), beside=False)

    def hidden(self) -> Tensor:
        """The pixels of the square [S, S] that have some of those that are not known."""
        return self._square(_touched(self._unknown_HW(), *self._inner_size()), beside=False)

    def beside(self) -> Tensor:
        """The pixels of the square [S, S] that are beside the picture."""
        width, height = self._inner_size()
        return self._square(np.zeros((height, width), dtype=np.bool_), beside=True)

    def shown(self, *, hide: bool) -> Shown:
        """All that the image tokenizer is shown of it; with ``hide`` nothing of what is to be drawn."""
        return Shown(self.pixels(hide=hide), self.hidden() if hide else self.drawn(), self.beside())

    def pixels(self, *, hide: bool) -> Tensor:
        """The square as the image tokenizer takes it, [3, S, S], grey beside the picture; with ``hide``, where it is not known, too."""
        page = on_white(self.picture).copy()
        page.putalpha(Image.fromarray(~self._unknown_HW() if hide else np.ones_like(self.drawn_HW)).convert("L"))
        if page.size != self._inner_size():
            page = page.resize(self._inner_size(), Image.Resampling.LANCZOS)  # colours count by their alpha: hidden ones for nothing
        square_SS3 = np.zeros((self.size, self.size, 3), dtype=np.uint8)
        left, top, right, bottom = self.inner
        square_SS3[top:bottom, left:right] = np.asarray(page)[:, :, :3]
        image_3SS = pixels_to_unit(torch.from_numpy(square_SS3)[None])[0]
        return image_3SS.masked_fill(self.beside() | (self.hidden() if hide else False), 0.0)

    def finish(self, seen_3SS: Tensor, drawn_3SS: Tensor, redrawn_SS: Tensor, feather: float) -> Image.Image:
        """The picture with a drawing in it.

        Args:
            seen_3SS: what :meth:`pixels` gave.
            drawn_3SS: the drawing, in [-1, 1].
            redrawn_SS: pixels of the square that the drawing is good for; of these, the ones to be drawn are taken.
            feather: see :func:`mix`.
        """
        taken_SS = self.drawn() & redrawn_SS
        mixed_3SS = mix(seen_3SS, drawn_3SS, taken_SS, ~(self.hidden() & redrawn_SS) & ~self.beside(), feather)
        drawing, redrawn = (each.crop(self.inner) for each in (to_picture(mixed_3SS), Image.fromarray(redrawn_SS.numpy())))
        if drawing.size != self.picture.size:
            drawing = drawing.resize(self.picture.size, Image.Resampling.LANCZOS)
            redrawn = redrawn.resize(self.picture.size, Image.Resampling.NEAREST)
        taken = Image.fromarray(self.drawn_HW & np.asarray(redrawn))
        return Image.composite(drawing.convert(self.picture.mode), self.picture, taken)

    def _unknown_HW(self) -> NDArray[np.bool_]:
        return self.drawn_HW if self.unknown_HW is None else self.unknown_HW

    def _inner_size(self) -> tuple[int, int]:
        left, top, right, bottom = self.inner
        return right - left, bottom - top

    def _square(self, inner_hw: NDArray[np.bool_], *, beside: bool) -> Tensor:
        square_SS = np.full((self.size, self.size), beside)
        left, top, right, bottom = self.inner
        square_SS[top:bottom, left:right] = inner_hw
        return torch.from_numpy(square_SS)


def scaled_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of a picture that is scaled to fit a square."""
    width, height = (max(1, round(each * side / max(size))) for each in size)
    return width, height


def make_canvas(image: Image.Image, mask: Mask, size: int, where: str) -> Canvas:
    """A picture of any mode and size, and what is to be drawn of it. ``where`` names it in errors.

    Raises:
        UserError: a picture that is too large, has no pixels or does not say what its numbers mean; a mask of another size or kind.
    """
    picture = upright_picture(image, where)
    return Canvas(picture, read_mask(mask, picture.size, f"the mask of {where}"), size)


def upright_picture(image: Image.Image, where: str) -> Image.Image:
    """A picture of any mode and size as upright RGB, or RGBA where it is transparent. Raises UserError as :func:`make_canvas`."""
    size = getattr(image, "size", None)
    if not isinstance(size, tuple):
        raise UserError(f"{where} is a {type(image).__name__}: a Pillow picture is wanted, as Image.open or Image.fromarray give it")
    width, height = size
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"{where} has {width} x {height} pixels; there must be some, and at most {MAX_PIXELS}. Scale it down.")
    if image.mode in ("I", "F"):
        raise UserError(
            f"{where} has mode {image.mode}, whose range would be taken from all pixels, also the hidden ones: make it one of 8 or 16 bits"
        )
    return upright(image, where)


class Margins(NamedTuple):
    """Pixels that a picture is to grow by at each side."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


def expand(image: Image.Image, margins: Margins, where: str) -> tuple[Image.Image, NDArray[np.bool_]]:
    """A picture, made upright, on a larger page, and the mask [H, W] of what is new.

    Raises:
        UserError: as :func:`make_canvas`; margins below 0, all of them 0, or such that the page would be too large.
    """
    picture = upright_picture(image, where)
    try:
        left, top, right, bottom = map(operator.index, margins)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: margins {margins!r} must be four whole numbers: left, top, right, bottom") from error
    width, height = picture.width + left + right, picture.height + top + bottom
    if min(margins) < 0 or not any(margins) or width * height > MAX_PIXELS:
        raise UserError(
            f"{where}: margins {tuple(margins)} around {picture.width} x {picture.height} pixels: each must be 0 or more, one more, "
            f"and the page may have {MAX_PIXELS} pixels"
        )
    page, new_HW = Image.new(picture.mode, (width, height)), np.ones((height, width), dtype=np.bool_)
    page.paste(picture, (left, top))
    new_HW[top : top + picture.height, left : left + picture.width] = False
    return page, new_HW


def read_mask(mask: Mask, size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """The pixels [H, W] to be drawn, of a picture of this (width, height). Raises UserError for masks of another size or kind."""
    if isinstance(mask, Image.Image):
        page = upright_picture(mask, where)
        if page.mode == "RGBA":
            raise UserError(f"{where} is transparent, and what that means is not agreed upon. Save it in black (kept) and white (drawn).")
        grey_HW3 = np.asarray(page)
        if (grey_HW3 != grey_HW3[:, :, :1]).any():
            raise UserError(f"{where} has colours. Save it in black (kept) and white (drawn).")
        drawn_HW = grey_HW3[:, :, 0] >= _DRAWN_FROM
    elif isinstance(mask, tuple):
        return _box(mask, size, where)
    else:
        drawn_HW = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if drawn_HW.dtype != np.bool_ or drawn_HW.ndim != 2:
            raise UserError(f"{where} is {drawn_HW.dtype} {list(drawn_HW.shape)}: bool [H, W] is wanted, True where it is drawn")
    height, width = drawn_HW.shape
    if (width, height) != size:
        raise UserError(f"{where} has {width} x {height} pixels, the picture (upright) {size[0]} x {size[1]}: they must be the same")
    return drawn_HW


def mix(seen_3SS: Tensor, drawn_3SS: Tensor, taken_SS: Tensor, kept_SS: Tensor, feather: float) -> Tensor:
    """The drawing where it is taken, else the pixels that were seen.

    With ``feather``, what is taken is shifted by the difference between seen and drawn pixels beyond the seam, by all of it there, and by
    less and less over about so many pixels. No kept pixel changes.
    """
    if feather and kept_SS.any():
        difference_3SS = (seen_3SS - drawn_3SS).masked_fill(~kept_SS, 0.0)
        near_SS = blurred(kept_SS[None].float(), feather / 2)
        weight_SS = (2 * near_SS / blurred(torch.ones_like(near_SS), feather / 2)).clamp_max(1)  # 1 at a straight seam
        shift_3SS = weight_SS * blurred(difference_3SS, feather / 2) / near_SS.clamp_min(1e-30)
        drawn_3SS = drawn_3SS + shift_3SS.float()
    return torch.where(taken_SS, drawn_3SS, seen_3SS)


def to_picture(image_3SS: Tensor) -> Image.Image:
    """An image in [-1, 1], on the CPU, as a picture."""
    return Image.fromarray(unit_to_pixels(image_3SS[None])[0].numpy())


def _box(box: tuple[int, ...], size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    width, height = size
    try:
        left, top, right, bottom = map(operator.index, box)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: box {box} must be four whole numbers: left, top, right, bottom") from error
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(f"{where}: box {box} (left, top, right, bottom) does not lie inside {width} x {height} pixels")
    drawn_HW = np.zeros((height, width), dtype=np.bool_)
    drawn_HW[top:bottom, left:right] = True
    return drawn_HW


def _touched(pixels_HW: NDArray[np.bool_], width: int, height: int) -> NDArray[np.bool_]:
    """Scaled to [height, width]: which of the new pixels cover any that is True."""
    rows_hW = np.stack([pixels_HW[first:end].any(0) for first, end in _spans(len(pixels_HW), height)])
    return np.stack([rows_hW[:, first:end].any(1) for first, end in _spans(pixels_HW.shape[1], width)], axis=1)


def _spans(pixels: int, new: int) -> list[tuple[int, int]]:
    """The pixels that each of ``new`` ones covers, in part or whole."""
    return [(at * pixels // new, -(-(at + 1) * pixels // new)) for at in range(new)]
