"""What do the orders look like? A few numbers and one map for a set of orders.

time map        when is a cell placed, on average? 0 = first, 1 = last, [grid, grid]
distance        share of cell pairs that two orders place the other way round (Kendall tau distance):
                0 = same order, 0.5 = as unrelated orders on average, 1 = reversed
neighbour share share of steps that go to one of the 8 neighbours of the cell placed just before
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_PAIRS_AT_ONCE = 2**24


@dataclass(frozen=True)
class OrderStatistics:
    """Of S orders of the same grid."""

    orders: int
    distinct: int
    raster_distance: float
    """Mean Kendall tau distance to raster order."""
    pair_distance: float
    """Mean Kendall tau distance between an order and the next one of the set; nan for a single order."""
    neighbour_share: float
    first_cell_entropy: float
    """Entropy of the first cell in nats: 0 if all orders start in the same cell, log N if anywhere alike."""


def describe_orders(order_SN: NDArray[np.integer[Any]], grid: int) -> OrderStatistics:
    """The statistics of S orders; S at least 1."""
    return OrderStatistics(
        orders=len(order_SN),
        distinct=len(np.unique(order_SN, axis=0)),
        raster_distance=float(kendall_distance(order_SN, np.arange(grid * grid)).mean()),
        pair_distance=float(kendall_distance(order_SN[:-1], order_SN[1:]).mean()) if len(order_SN) > 1 else float("nan"),
        neighbour_share=float(neighbour_share(order_SN, grid).mean()),
        first_cell_entropy=first_cell_entropy(order_SN),
    )


def placing_times(order_SN: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The step [S, N] at which each cell is placed: the inverse permutations."""
    return np.argsort(order_SN, axis=-1)


def mean_time_map(order_SN: NDArray[np.integer[Any]], grid: int) -> FloatArray:
    """Mean placing time of each cell [grid, grid], from 0 (always first) to 1 (always last)."""
    last = max(grid * grid - 1, 1)
    mean: FloatArray = placing_times(order_SN).mean(axis=0) / last
    return mean.reshape(grid, grid)


def kendall_distance(first_SN: NDArray[np.integer[Any]], second_SN: NDArray[np.integer[Any]]) -> FloatArray:
    """Share of the cell pairs [S] that two orders place the other way round; either may be a single order [N]."""
    first_SN, second_SN = np.broadcast_arrays(np.atleast_2d(first_SN), np.atleast_2d(second_SN))
    cells = first_SN.shape[1]
    pairs = max(cells * (cells - 1) // 2, 1)
    earlier, later = np.triu_indices(cells, k=1)
    at_once = max(_PAIRS_AT_ONCE // pairs, 1)
    shares = []
    for start in range(0, len(first_SN), at_once):
        part = slice(start, start + at_once)
        time_SN = np.take_along_axis(placing_times(second_SN[part]), first_SN[part].astype(np.int64), axis=1)
        shares.append((time_SN[:, earlier] > time_SN[:, later]).sum(axis=1) / pairs)
    return np.concatenate(shares)


def neighbour_share(order_SN: NDArray[np.integer[Any]], grid: int) -> FloatArray:
    """Share of the N - 1 steps [S] that go to an 8-neighbour of the cell before."""
    row_SN, column_SN = np.divmod(order_SN.astype(np.int64), grid)
    reach_SN = np.maximum(np.abs(np.diff(row_SN, axis=1)), np.abs(np.diff(column_SN, axis=1)))
    share: FloatArray = (reach_SN == 1).mean(axis=1)
    return share


def first_cell_entropy(order_SN: NDArray[np.integer[Any]]) -> float:
    """Entropy in nats of the cell that is placed first."""
    share = np.unique(order_SN[:, 0], return_counts=True)[1] / len(order_SN)
    return float(-(share * np.log(share)).sum())
