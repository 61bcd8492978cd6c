"""Editing without training for it: cells that are known are placed first, the others are drawn after them.

    inpainting      redo a box              known  . . . .        drawn  . . . .
    outpainting     redo all but a box             . # # .               . o o .
                                                   . # # .               . o o .

Any permutation of the cells is a valid sequence for an any-order model, so both are ordinary generation with a prefix.

:func:`edit_pages` does it to pictures, and honestly: what is to be drawn is hidden from the image tokenizer (``seen_codes``), and known
pixels stay as they are (``canvas``). Each drawing on the model's square is :func:`see`, :func:`redraw` and :func:`finish`; a picture may
take several (``pages``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.generation.canvas import Box, Canvas, Shown, to_picture
from oar_scale.generation.pages import Page
from oar_scale.generation.sampling import Generated, Known, generate
from oar_scale.generation.seen_codes import DEFAULT_FILLS, Fill, SeenCodes, cells_of, pixels_of, seen_codes
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, Decoder
from oar_scale.orders.policies import LateOrder
from oar_scale.orders.scores import score_logits
from oar_scale.orders.selection import Images
from oar_scale.text import shown as shortened
from oar_scale.tokenizers.image import ImageTokenizer, TokenizerSpec

DECODE_BATCH = 1
"""Pictures decoded at once: beside others a pixel would now and then be another one, as convolutions round by the size of the batch."""
VARIATION_SHIFT, STEP_SHIFT = 32, 48
"""Step s of variation v of the picture with number n has the noise of image n + v * 2^32 + s * 2^48: the first one that of a sample."""
MAX_VARIATIONS = 1 << STEP_SHIFT - VARIATION_SHIFT

OrderOf = Callable[[Sequence[int], Images, Tensor], Tensor | LateOrder | None]
"""From the rows of some drawings among all (the variations of the first picture come first), their numbers and their known cells (bool
[B, N]) to their orders."""


def no_order(rows: Sequence[int], numbers_B: Images, known_BN: Tensor) -> None:
    """The model chooses."""


@dataclass(frozen=True)
class EditOptions:
    """How pictures are edited, beside how codes are drawn (:class:`SampleSettings`)."""

    variations: int = 1
    """Drawings of each picture."""
    strength: float = 1.0
    """Share of the marked cells that is drawn anew. 1: all of them, and nothing sees what they hold. Below 1 they are looked at: those
    whose codes the model expects least, given the prompt and what is known, are drawn."""
    fills: tuple[Fill, ...] = DEFAULT_FILLS
    """Rules that fill the hole; see :func:`seen_codes`."""
    ring: int = 0
    """Cells at most so far from the hole are drawn, too, beside those whose codes depend on it. It needs ``strength`` 1: below, nothing of
    the picture is hidden, so there is no hole that it could lie around."""
    feather: float | None = None
    """So many of the model's pixels inside the hole are matched to the known ones beyond the seam; see ``canvas.mix``. None: none of
    them, but in windows, where drawings meet each other, as many as a cell is wide."""

    def __post_init__(self) -> None:
        if not isinstance(self.variations, Integral) or not 1 <= self.variations <= MAX_VARIATIONS:
            raise UserError(f"variations {shortened(self.variations)} must be a whole number from 1 to {MAX_VARIATIONS}")
        if not isinstance(self.strength, Real) or not 0 < self.strength <= 1:
            raise UserError(f"strength {shortened(self.strength)} must be above 0 and at most 1, which draws all that is marked")
        if not isinstance(self.ring, Integral) or self.ring < 0:
            raise UserError(f"ring {shortened(self.ring)} must be 0 cells or more")
        if self.ring and self.strength < 1:
            raise UserError(
                f"ring {shortened(self.ring)} with strength {shortened(self.strength)}: below strength 1 nothing of the picture is "
                "hidden, so there is no hole for a ring. Leave ring at 0 and mark more of the picture, or set strength to 1"
            )
        if self.feather is not None and (not isinstance(self.feather, Real) or not 0 <= self.feather < math.inf):
            raise UserError(f"feather {shortened(self.feather)} must be a number of pixels, and not negative")

    def seam(self, spec: TokenizerSpec, *, window: bool) -> float:
        """The width of the seam of a drawing."""
        cell = spec.image_size / spec.grid if window else 0.0
        return cell if self.feather is None else self.feather


class SeenCanvas(NamedTuple):
    """A canvas, and what is known of it before it is drawn."""

    canvas: Canvas
    pixels_3SS: Tensor
    """What the image tokenizer was shown, on the CPU."""
    codes_N: Tensor
    """int64, raster order; those of cells that are not known mean nothing."""
    known_N: Tensor
    """bool: the cells that are placed first; all others are drawn."""


@dataclass(frozen=True)
class Square:
    """What the model drew on one canvas."""

    box: Box
    """The part of the picture that it saw."""
    drawing: Image.Image
    """The whole square, the known part as the image tokenizer gives it back."""
    codes_N: Tensor
    """int64, raster order."""
    order_N: Tensor
    """int64: the cells as they were placed, known ones first."""
    score_N: Tensor
    """As of :class:`Generated`."""
    drawn_N: Tensor
    """bool: the cells that were drawn; all others were known."""

    @property
    def order_map(self) -> Image.Image:
        """When each cell was drawn: the first ones dark grey, the last white; known cells black."""
        drawn = int(self.drawn_N.sum())
        shade_N = torch.zeros(len(self.order_N), dtype=torch.uint8)
        places_M = torch.linspace(255 if drawn == 1 else 64, 255, drawn).to(torch.uint8)
        shade_N[self.order_N[len(self.order_N) - drawn :]] = places_M
        return Image.fromarray(pixels_of(shade_N, self.drawing.width).numpy())


@dataclass(frozen=True)
class Edit:
    """One drawing of one picture."""

    picture: Image.Image
    """Upright, of the picture's size; RGB, or RGBA where the picture is transparent. Pixels that were not marked are what they were."""
    image: int
    """The picture's place in the list."""
    variation: int
    squares: tuple[Square, ...]
    """What the model drew, one after the other."""


def edit_pages(
    model: AnyOrderModel,
    vq: ImageTokenizer,
    pages: Sequence[Page],
    condition_PTD: Tensor,
    settings: SampleSettings,
    options: EditOptions,
    seed: int,
    order_of: OrderOf = no_order,
    images_B: Images | None = None,
) -> list[Edit]:
    """Draw what is marked in each of B pictures.

    The first steps of all drawings are one batch, then the second ones, and so on.

    Args:
        pages: before their first step; they stay as they are.
        condition_PTD: of the prompts that the steps name.
        seed, images_B: as for :func:`generate`; a number for each picture.
        order_of: the order of each drawing of a batch, as :func:`redraw` takes it.

    Returns:
        The variations of the first picture, then those of the second, and so on.

    Raises:
        ValueError: as :func:`generate`.
        UserError: a fill that there is not.
    """
    numbers_B = noise_numbers(np.arange(len(pages)) if images_B is None else images_B, options.variations)
    drawings = [Page.of(page.picture, page.steps) for page in pages for _ in range(options.variations)]
    squares: list[list[Square]] = [[] for _ in drawings]
    for turn in range(max((len(page.steps) for page in pages), default=0)):
        rows = [row for row, drawing in enumerate(drawings) if turn < len(drawing.steps)]
        condition_BTD = condition_PTD[[drawings[row].steps[turn].prompt for row in rows]]
        seen: list[SeenCanvas] = []
        for row, condition_TD in zip(rows, condition_BTD, strict=True):
            again = turn == 0 and row % options.variations  # the variations of a picture begin alike
            seen.append(seen[-1] if again else see(model, vq, drawings[row].canvas(vq.spec.image_size), condition_TD, options))
        codes_BN, known_BN = torch.stack([each.codes_N for each in seen]), torch.stack([each.known_N for each in seen])
        turn_numbers_B = numbers_B[rows] + (turn << STEP_SHIFT)
        order_BN = order_of(rows, turn_numbers_B, known_BN)
        drawn = redraw(model, codes_BN, ~known_BN, condition_BTD, settings, seed, order_BN, turn_numbers_B)
        for at, (row, image_3SS) in enumerate(zip(rows, decoded(vq, drawn.codes_BN), strict=True)):
            feather = options.seam(vq.spec, window=seen[at].canvas.picture.size != drawings[row].picture.size)
            picture, square = finish(seen[at], image_3SS, drawn.codes_BN[at], drawn.order_BN[at], drawn.score_BN[at], feather)
            drawings[row].take(picture)
            squares[row].append(square)
    return [Edit(drawing.picture, *divmod(row, options.variations), tuple(squares[row])) for row, drawing in enumerate(drawings)]


# -- the parts of an edit: see, draw what is not known (redraw, or known_first and a batch of one's own), finish ---------------


def see(model: AnyOrderModel, vq: ImageTokenizer, canvas: Canvas, condition_TD: Tensor, options: EditOptions) -> SeenCanvas:
    """Find the codes of the cells that are not to be drawn. Raises UserError for a fill that there is not."""
    shown = canvas.shown(hide=options.strength == 1)
    return SeenCanvas(canvas, shown.pixels_3SS, *known_cells(model, vq, shown, condition_TD, options))


def known_cells(model: AnyOrderModel, vq: ImageTokenizer, shown: Shown, condition_TD: Tensor, options: EditOptions) -> SeenCodes:
    """The same of a canvas whose picture is not at hand. Of its marked pixels nothing may be shown, unless ``strength`` is below 1."""
    pixels_3SS, marked_SS, beside_SS = (each.to(condition_TD.device) for each in shown)
    if options.strength == 1:
        return seen_codes(vq, pixels_3SS, marked_SS | beside_SS, options.fills, options.ring)
    seen = seen_codes(vq, pixels_3SS, beside_SS, options.fills)
    marked_N = cells_of(marked_SS, vq.spec.grid)
    open_N = marked_N & seen.known_N
    count = min(share_of(int(marked_N.sum()), options.strength), int(open_N.sum()))
    if not count:
        return seen
    score_M = expected(model, seen.codes_N, seen.known_N & ~marked_N, open_N, condition_TD)
    least_m = open_N.nonzero()[:, 0][score_M.argsort(stable=True)[:count]]
    return seen._replace(known_N=seen.known_N.scatter(0, least_m, False))


def share_of(cells: int, strength: float) -> int:
    """So many cells that they are at least the share ``strength``, as it is written: 0.07 of 100 are 7, though the float is above 0.07."""
    return math.ceil(Fraction(str(strength)) * cells)


def known_first(codes_BN: Tensor, known_BN: Tensor, sequence_BN: Tensor | None = None) -> Known:
    """The known cells of each image, in raster order or in that of a sequence of all cells; codes of the other cells are not looked at."""
    if sequence_BN is None:
        sequence_BN = torch.arange(codes_BN.shape[1], device=codes_BN.device).expand_as(codes_BN)
    # The cells to keep move to the front; behind them, where another image keeps more, there is none.
    away_BN = ~known_BN.gather(1, sequence_BN)
    kept_first_BN = sequence_BN.gather(1, away_BN.to(torch.uint8).argsort(dim=1, stable=True))
    kept_B1 = (~away_BN).sum(1, keepdim=True)
    cells_BK = kept_first_BN[:, : int(kept_B1.max())]
    there_BK = torch.arange(cells_BK.shape[1], device=cells_BK.device) < kept_B1
    return Known(cells_BK.masked_fill(~there_BK, -1), codes_BN.gather(1, cells_BK))


def decoded(vq: ImageTokenizer, codes_BN: Tensor) -> Iterator[Tensor]:
    """The images of codes, [3, S, S] each, on the CPU."""
    for codes in codes_BN.split(DECODE_BATCH):
        with torch.no_grad():
            images_B3SS = vq.decode(codes).cpu()
        yield from images_B3SS


def finish(
    seen: SeenCanvas, image_3SS: Tensor, codes_N: Tensor, order_N: Tensor, score_N: Tensor, feather: float
) -> tuple[Image.Image, Square]:
    """The canvas's picture with the drawing in it, and what was drawn.

    Args:
        image_3SS: of the codes, on the CPU.
        order_N, score_N: as of :class:`Generated`.
    """
    drawn_N = ~seen.known_N.cpu()
    picture = seen.canvas.finish(seen.pixels_3SS, image_3SS, pixels_of(drawn_N, seen.canvas.size), feather)
    left, top = seen.canvas.corner
    box = left, top, left + picture.width, top + picture.height
    return picture, Square(box, to_picture(image_3SS), codes_N.cpu(), order_N.cpu(), score_N.cpu(), drawn_N)


def redraw(
    model: AnyOrderModel,
    codes_BN: Tensor,
    redo: Tensor,
    condition_BTD: Tensor,
    settings: SampleSettings,
    seed: int,
    order_BN: Tensor | LateOrder | None = None,
    images_B: Images | None = None,
) -> Generated:
    """Draw the cells marked in ``redo`` anew; all others keep their codes, which are all that is known of the image.

    Codes of an intact image know what lies in the cells beside them: for those of a picture with a hole see ``seen_codes``.

    Args:
        codes_BN: codes in raster order; those of marked cells are never looked at.
        redo: bool [N] for all images, or [B, N].
        seed, images_B: as for :func:`generate`.
        order_BN: permutations that both the known and the drawn cells follow. None: known cells in raster order, then
            the model chooses; a late order: known cells in raster order, then what it says.

    Raises:
        ValueError: as :func:`generate`.
    """
    sequence_BN = order_BN if isinstance(order_BN, Tensor) else None
    known = known_first(codes_BN, ~redo.expand(codes_BN.shape), sequence_BN)
    return generate(model, condition_BTD, settings, seed, order_BN, known, images_B)


def noise_numbers(images_B: Images, variations: int) -> Images:
    """The number of each variation of each image, whose noise it has: all of the first image, then all of the second."""
    numbers_BV: NDArray[np.int64] = np.asarray(images_B, dtype=np.int64)[:, None] + (np.arange(variations) << VARIATION_SHIFT)
    return numbers_BV.reshape(-1)


@torch.no_grad()
def expected(model: AnyOrderModel, codes_N: Tensor, known_N: Tensor, asked_N: Tensor, condition_TD: Tensor) -> Tensor:
    """How much the model expects the codes of some cells, given the known ones alone: log-probabilities [M], nats."""
    decoder, (known_K, asked_M) = Decoder(model), (each.nonzero()[:, 0] for each in (known_N, asked_N))
    prefix = decoder.prefill(decoder.begin(condition_TD[None]), known_K[None], codes_N[known_K][None])
    rows_MD = decoder.candidate_rows(prefix, asked_M[None]).rows_BRD[0]
    return score_logits("gt_logprob", model.output(rows_MD), codes_N[asked_M])


def box_mask(grid: int, top: int, left: int, height: int, width: int) -> Tensor:
    """Bool [N], True inside a box of the grid (raster order). ``~box_mask(...)`` is the mask of outpainting.

    Raises:
        ValueError: the box is empty or does not lie inside the grid.
    """
    if min(top, left) < 0 or min(height, width) < 1 or top + height > grid or left + width > grid:
        raise ValueError(f"box (top {top}, left {left}, {height} x {width}) does not lie inside a {grid} x {grid} grid")
    mask_GG = torch.zeros(grid, grid, dtype=torch.bool)
    mask_GG[top : top + height, left : left + width] = True
    return mask_GG.flatten()


def centre_mask(grid: int, side: int) -> Tensor:
    """Bool [N], True in the ``side x side`` box in the middle of the grid (towards the upper left where it cannot be exact)."""
    margin = (grid - side) // 2
    return box_mask(grid, margin, margin, side, side)
