"""Editing without training for it: cells to keep are placed first, the others are drawn after them.

    inpainting      redo a box              known  . . . .        drawn  . . . .
    outpainting     redo all but a box             . # # .               . o o .
                                                   . # # .               . o o .

Any permutation of the cells is a valid sequence for an any-order model, so both are ordinary generation with a prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oar_scale.generation.sampling import Generated, Known, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel
from oar_scale.orders.policies import LateOrder
from oar_scale.orders.selection import Images


def inpaint(
    model: AnyOrderModel,
    codes_BN: Tensor,
    redo: Tensor,
    condition_BTD: Tensor,
    settings: SampleSettings,
    seed: int,
    order_BN: Tensor | LateOrder | None = None,
    images_B: Images | None = None,
) -> Generated:
    """Draw the cells marked in ``redo`` anew; all others keep their codes.

    Args:
        codes_BN: codes in raster order; those of marked cells are never looked at.
        redo: bool [N] for all images, or [B, N].
        seed, images_B: as for :func:`generate`.
        order_BN: permutations that both the known and the drawn cells follow. None: known cells in raster order, then
            the model chooses; a late order: known cells in raster order, then what it says.

    Raises:
        ValueError: as :func:`generate`.
    """
    redo_BN = redo.expand(codes_BN.shape)
    raster_BN = torch.arange(codes_BN.shape[1], device=codes_BN.device).expand_as(codes_BN)
    sequence_BN = order_BN if isinstance(order_BN, Tensor) else raster_BN
    # The cells to keep move to the front; behind them, where another image keeps more, there is none.
    away_BN = redo_BN.gather(1, sequence_BN)
    kept_first_BN = sequence_BN.gather(1, away_BN.to(torch.uint8).argsort(dim=1, stable=True))
    kept_B1 = (~away_BN).sum(1, keepdim=True)
    cells_BK = kept_first_BN[:, : int(kept_B1.max())]
    there_BK = torch.arange(cells_BK.shape[1], device=cells_BK.device) < kept_B1
    known = Known(cells_BK.masked_fill(~there_BK, -1), codes_BN.gather(1, cells_BK))
    return generate(model, condition_BTD, settings, seed, order_BN, known, images_B)


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
