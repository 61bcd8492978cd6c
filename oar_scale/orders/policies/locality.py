"""LPD's orders: the cells of a step lie beside what is there already, and apart from one another (arXiv 2507.01957, "locality-aware").

    first step       one random cell (more: as below, around it)
    later ones       proximity of an empty cell = sum of 1 / distance over those of its 8 neighbours that are placed
                     1. cells of proximity 1 and more, the nearest first, that are more than REPULSION from all cells of this step
                     2. too few of them: of all other cells the one that is farthest from the cells of this step, again and again

A cell depends most on its neighbours: they should be known when it is asked for, and not be drawn in the same step without knowing it.
How many cells a step has is as in the drawing (``sample.steps``); one by one, the nearest cell comes next. Of equals a random one is taken.
Cells that are known beforehand (an edit) count as placed: the first step lies beside them, and steps are those that the drawing takes then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from oar_scale.data.hashing import permutations
from oar_scale.orders.policies import OrderRequest, Policy
from oar_scale.orders.step_sizes import cells_per_step

REPULSION = 2
"""Larger of the distances in rows and in columns: the value of LPD's L and XL models at 256 pixels."""


def locality_order(
    grid: int, sizes: Sequence[int], rank_N: NDArray[np.int64], known_N: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The order [N] of one image.

    Args:
        grid: cells a side.
        sizes: cells of each step; they sum to the number of cells that are not known.
        rank_N: a permutation: of equal cells that with the lowest rank is taken.
        known_N: the cells that are placed before the first step, in raster order; None: none.
    """
    row_N, column_N = np.divmod(np.arange(grid * grid), grid)
    down_NN, across_NN = (np.abs(each_N[:, None] - each_N) for each_N in (row_N, column_N))
    apart_NN, squared_NN = np.maximum(down_NN, across_NN), down_NN**2 + across_NN**2
    weight_NN = np.where(apart_NN == 1, 1 / np.sqrt(np.maximum(squared_NN, 1)), 0)
    empty_N = np.ones(grid * grid, dtype=np.bool_) if known_N is None else ~known_N
    proximity_N, order = weight_NN[:, ~empty_N].sum(1), np.flatnonzero(~empty_N).tolist()
    for size in sizes:
        by_rank_E = np.flatnonzero(empty_N)[np.argsort(rank_N[empty_N])]
        best_E = by_rank_E[np.argsort(-proximity_N[by_rank_E].round(9), kind="stable")]
        step: list[int] = []
        for cell in best_E[proximity_N[best_E] > 1 - 1e-9].tolist():
            if len(step) < size and (apart_NN[cell, step] > REPULSION).all():
                step.append(cell)
        farthest_E = best_E[~np.isin(best_E, step)]
        while len(step) < size:
            away_E = squared_NN[farthest_E][:, step].min(1, initial=4 * grid * grid)
            step.append(int(farthest_E[away_E.argmax()]))
            farthest_E = farthest_E[farthest_E != step[-1]]
        order += step
        empty_N[step] = False
        proximity_N += weight_NN[:, step].sum(1)
    return np.array(order, dtype=np.int64)


class LocalityPolicy(Policy):
    """An order for each image, a function of the request's seed and the image's number."""

    def sampling(self, request: OrderRequest) -> Tensor:
        """Orders int64 [B, N] for as many steps as the images are drawn in."""
        spec = request.model.spec
        rank_BN = permutations("locality order", spec.cells, request.seed, request.images_B.cpu().numpy())
        known_BN = np.zeros(rank_BN.shape, dtype=np.bool_) if request.known_BN is None else request.known_BN.cpu().numpy()
        orders = [
            locality_order(spec.grid, cells_per_step(spec.cells, request.steps, int(known_N.sum())), rank_N, known_N)
            for rank_N, known_N in zip(rank_BN, known_BN, strict=True)
        ]
        return from_numpy(np.stack(orders)).to(request.device)


POLICY = LocalityPolicy(__name__)
