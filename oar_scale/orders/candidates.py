"""Which cells a step asks about, beside how many it places (``step_sizes.py``): the ways to make extraction cheaper than exact.

    exact         asks about every empty cell, places one                                    N (N + 1) / 2 rows
    commit        places the k best: the second best did not know about the best             about 1 / k of the rows
    cosine        places more and more, as RandAR draws                                      by the number of steps
    repulsion     places several that lie apart, which know little of one another anyway     as commit or cosine
    frontier      asks about the neighbours of what is there, and a few random cells         by the grid's side, not its area
    rescoring     asks again only near what was placed last; other scores stay as they were  by the radius

Distance is that of a king on a chess board. An image's choices depend on nothing but the image: images of a batch that ask
about fewer cells than others ask about some more, and do not look at the answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oar_scale.orders.selection import CounterRNG

if TYPE_CHECKING:
    from oar_scale.orders.extraction import ExtractionSettings


def within(grid: int, radius: int, device: torch.device) -> Tensor:
    """Which cells lie within a radius of which, themselves included: bool [N, N]."""
    row_N, column_N = torch.arange(grid, device=device).repeat_interleave(grid), torch.arange(grid, device=device).repeat(grid)
    return torch.maximum((row_N[:, None] - row_N).abs(), (column_N[:, None] - column_N).abs()) <= radius


class Asking:
    """Which cells of B images are asked about at each step."""

    def __init__(self, settings: ExtractionSettings, rng: CounterRNG, grid: int) -> None:
        self.settings, self.rng = settings, rng
        batch, device = len(rng.image_B1), rng.image_B1.device
        radius = 1 if settings.rescore_radius is None else settings.rescore_radius
        self.near_NN = within(grid, radius, device)
        self.near_BN = torch.zeros(batch, grid * grid, dtype=torch.bool, device=device)
        """Neighbours of any cell that was placed (frontier), or those near the last ones (rescoring)."""

    @property
    def all_empty(self) -> bool:
        """Whether every step, but a first one with a given cell, asks about every empty cell."""
        return self.settings.frontier_random is None and self.settings.rescore_radius is None

    def cells(self, step: int, size: int, empty_BN: Tensor, score_BN: Tensor) -> Tensor:
        """The cells to ask about, bool [B, N].

        Args:
            size: how many are to be placed.
            score_BN: what is known of the cells; -inf of those that nobody asked about yet.
        """
        settings = self.settings
        if step == 0 and settings.first_cell != "free":
            return self._first_cell(empty_BN)
        if settings.rescore_radius is not None:
            return empty_BN & (self.near_BN | (score_BN == -torch.inf))
        if settings.frontier_random is None or step == 0:
            return empty_BN
        return self._frontier(step, size, settings.frontier_random, empty_BN)

    def placed(self, cells_Bk: Tensor) -> None:
        near_BN = self.near_NN[cells_Bk].any(1)
        self.near_BN = near_BN if self.settings.rescore_radius is not None else self.near_BN | near_BN

    def _first_cell(self, empty_BN: Tensor) -> Tensor:
        if self.settings.first_cell == "random":
            cell_B = self.rng.uniform("first cell", 0).argmax(1)
        else:
            cell_B = torch.full((len(empty_BN),), int(self.settings.first_cell), device=empty_BN.device)
        return torch.zeros_like(empty_BN).scatter(1, cell_B[:, None], True)

    def _frontier(self, step: int, size: int, extra: int, empty_BN: Tensor) -> Tensor:
        """Neighbours of what is there and ``extra`` random cells; more of these where there would not be enough to place."""
        near_BN = self.near_BN & empty_BN
        rank_BN = (
            (self.rng.uniform("beyond the frontier", step) + 2 * near_BN.int() + empty_BN.int()).argsort(1, descending=True).argsort(1)
        )
        count_B1 = near_BN.sum(1, keepdim=True)
        return empty_BN & (rank_BN < torch.clamp(count_B1 + extra, min=size))


def pack(asked_BN: Tensor, count: int | None) -> tuple[Tensor, int]:
    """The cells [B, R] of a mask, in raster order, and R; behind those of an image that asks about fewer come cells of no interest.

    Args:
        count: R, where it is known: to count would wait for the device.
    """
    count = int(asked_BN.sum(1).max()) if count is None else count
    return (~asked_BN).to(torch.uint8).argsort(dim=1, stable=True)[:, :count], count
