"""Codes of an image with a hole in it, none of which has seen what the hole hides.

An encoder looks further than one cell: a convolution at its neighbours, attention and normalisation at the whole image. Encoded with its
hole, an image tells the codes around the hole what is in it. So the hole is filled first, by rules that know nothing of it:

    image, hole  --F fills-->  F images without what is hidden  --encode-->  F codes a cell
                                                                             all the same: the cell is *sure*, and known
                                                                             else: it depends on the hole, and is drawn, too

The cells outside the hole that are drawn, too, are its *ring*; it need not be contiguous. With a single fill all cells outside are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.tokenizers.image import ImageTokenizer

Fill = Literal["mean", "blur", "noise"]
DEFAULT_FILLS: tuple[Fill, ...] = ("noise",)
"""Noise keeps the image's statistics, over which encoders normalise. Measured in docs/results/editing-cpu.md."""
_BLUR = 1 / 8
"""Standard deviation of the blur, as a share of the image's side."""


class SeenCodes(NamedTuple):
    """What is known of one image."""

    codes_N: Tensor
    """int64, raster order; those of cells that are not known mean nothing."""
    known_N: Tensor
    """bool: cells outside the hole whose codes do not depend on it."""


@torch.no_grad()
def seen_codes(vq: ImageTokenizer, image_3HW: Tensor, hidden_HW: Tensor, fills: Sequence[Fill] = DEFAULT_FILLS, ring: int = 0) -> SeenCodes:
    """Encode an image that hides some of its pixels.

    Args:
        image_3HW: in [-1, 1], of the tokenizer's size; hidden pixels may hold anything, also NaN.
        fills: rules by which the hole is filled. A cell is known where all of them give the same code; of a single one all are.
        ring: cells at most so far from the hole, also diagonally, are not known in any case.

    Raises:
        UserError: no fill, or one that there is not; a ring below 0.
    """
    if not fills or isinstance(fills, str) or any(fill not in FILLS for fill in fills):
        raise UserError(f"fills {fills!r}: a list of rules is wanted. There are: {', '.join(FILLS)}")
    if ring < 0:
        raise UserError(f"ring {ring} must be 0 cells or more")
    hole_N = cells_of(hidden_HW, vq.spec.grid, ring)
    if hole_N.all():
        return SeenCodes(torch.zeros_like(hole_N, dtype=torch.long), ~hole_N)
    # One image at a time: in another batch the encoder may round otherwise, and a code change.
    filled_F3HW = torch.stack([fill_hole(image_3HW, hidden_HW, fill) for fill in fills])
    codes_FN = vq.encode(filled_F3HW)
    return SeenCodes(codes_FN[0], ~hole_N & (codes_FN == codes_FN[0]).all(0))


def fill_hole(image_3HW: Tensor, hidden_HW: Tensor, fill: Fill) -> Tensor:
    """The image with its hidden pixels replaced by what a rule makes of the others; grey where all are hidden."""
    seen_3HW = image_3HW.masked_fill(hidden_HW, 0.0)
    if hidden_HW.all():
        return seen_3HW
    return torch.where(hidden_HW, FILLS[fill](seen_3HW, ~hidden_HW), seen_3HW)


def cells_of(hidden_HW: Tensor, grid: int, ring: int = 0) -> Tensor:
    """The cells [N] with a hidden pixel, and those at most ``ring`` cells from one."""
    hidden_11HW = hidden_HW[None, None].float()
    touched_11GG: Tensor = F.max_pool2d(hidden_11HW, hidden_HW.shape[-1] // grid)
    if ring:
        touched_11GG = F.max_pool2d(touched_11GG, 2 * min(ring, grid) + 1, stride=1, padding=min(ring, grid))
    return touched_11GG.flatten() > 0


def pixels_of(cells_N: Tensor, size: int) -> Tensor:
    """The pixels [size, size] of some cells."""
    grid = round(len(cells_N) ** 0.5)
    cells_GG = cells_N.unflatten(0, (grid, grid))
    pixels_SS: Tensor = cells_GG.repeat_interleave(size // grid, 0).repeat_interleave(size // grid, 1)
    return pixels_SS


def blurred(values_CHW: Tensor, deviation: float) -> Tensor:
    """Sums over all pixels, each weighted by a Gaussian of its distance (a blur that is not normalised)."""
    sides = (torch.arange(side, device=values_CHW.device, dtype=torch.float64) for side in values_CHW.shape[-2:])
    down_HH, across_WW = (torch.exp(-((at_P[:, None] - at_P) ** 2) / (2 * deviation**2)) for at_P in sides)
    sums_CHW: Tensor = down_HH @ values_CHW.double() @ across_WW
    return sums_CHW


def _mean(seen_3HW: Tensor, known_HW: Tensor) -> Tensor:
    """The mean colour of the known pixels."""
    return (seen_3HW.sum((1, 2)) / known_HW.sum())[:, None, None].expand_as(seen_3HW)


def _blur(seen_3HW: Tensor, known_HW: Tensor) -> Tensor:
    """The known pixels, the nearer the more: the border of the hole runs into it."""
    deviation = _BLUR * known_HW.shape[-1]
    return (blurred(seen_3HW, deviation) / blurred(known_HW[None].float(), deviation)).float()


def _noise(seen_3HW: Tensor, known_HW: Tensor) -> Tensor:
    """Known pixels in places that always are the same random ones."""
    known_3K = seen_3HW[:, known_HW]
    pick_P = torch.randint(known_3K.shape[1], (known_HW.numel(),), generator=torch.Generator().manual_seed(0))
    return known_3K[:, pick_P.to(seen_3HW.device)].view_as(seen_3HW)


FILLS: dict[Fill, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "blur": _blur, "noise": _noise}
