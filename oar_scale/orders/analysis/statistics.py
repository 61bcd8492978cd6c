"""Numbers and one map for a set of orders.

time map          when is a cell placed, on average? 0 = first, 1 = last, [grid, grid]
distance          share of cell pairs that two orders place the other way round (Kendall tau distance; tau = 1 - 2 distance):
                  0 = same order, 0.5 = as unrelated orders on average, 1 = reversed
neighbour share   share of steps that go up, down, left or right by one cell
frontier share    share of the cells that touch one that is there already, corners included
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Orders = NDArray[np.integer]

_NUMBERS_AT_ONCE = 2**20


@dataclass(frozen=True)
class OrderStatistics:
    """Statistics of S orders of the same grid."""

    orders: int
    distinct: int
    raster_distance: float
    """Mean Kendall tau distance to raster order."""
    pair_distance: float
    """Mean Kendall tau distance between an order and the next one of the set; nan for a single order."""
    neighbour_share: float
    frontier_share: float
    step_length: float
    """Mean distance from a cell to the next one, in cells."""
    first_cell_entropy: float
    """Entropy of the first cell in nats: 0 if all orders start in the same cell, log N if anywhere alike."""


def describe_orders(order_SN: Orders, grid: int) -> OrderStatistics:
    """The statistics of S orders; S at least 1."""
    return OrderStatistics(
        orders=len(order_SN),
        distinct=len(np.unique(order_SN, axis=0)),
        raster_distance=float(kendall_distance(order_SN, np.arange(grid * grid)).mean()),
        pair_distance=float(kendall_distance(order_SN[:-1], order_SN[1:]).mean()) if len(order_SN) > 1 else float("nan"),
        neighbour_share=float(neighbour_share(order_SN, grid).mean()),
        frontier_share=float(frontier_share(order_SN, grid).mean()),
        step_length=float(np.hypot(*_steps(order_SN, grid)).mean()),
        first_cell_entropy=first_cell_entropy(order_SN),
    )


def placing_times(order_SN: Orders) -> NDArray[np.int64]:
    """The step [S, N] at which each cell is placed: the inverse permutations."""
    return np.argsort(order_SN, axis=-1)


def mean_time_map(order_SN: Orders, grid: int) -> FloatArray:
    """Mean placing time of each cell [grid, grid], from 0 (always first) to 1 (always last)."""
    last = max(grid * grid - 1, 1)
    mean: FloatArray = placing_times(order_SN).mean(axis=0) / last
    return mean.reshape(grid, grid)


def kendall_distance(first_SN: Orders, second_SN: Orders) -> FloatArray:
    """Share of the cell pairs [S] that two orders place the other way round; either may be a single order [N]."""
    first_SN, second_SN = np.broadcast_arrays(np.atleast_2d(first_SN), np.atleast_2d(second_SN))
    cells = first_SN.shape[1]
    pairs = max(cells * (cells - 1) // 2, 1)
    at_once = max(_NUMBERS_AT_ONCE // cells, 1)
    shares = []
    for start in range(0, len(first_SN), at_once):
        part = slice(start, start + at_once)
        time_SN = np.take_along_axis(placing_times(second_SN[part]), first_SN[part].astype(np.int64), axis=1)
        shares.append(_inversions(time_SN) / pairs)
    return np.concatenate(shares)


def _inversions(number_SN: NDArray[np.int64]) -> NDArray[np.int64]:
    """In how many pairs [S] of a permutation of 0 .. N - 1 the larger number comes first, in N log N steps.

    Numbers are sorted from their highest bit to the lowest, those of equal higher bits being a group; a pair is counted where it is told
    apart, by a 1 before a 0.
    """
    place_N, found_S = np.arange(number_SN.shape[1]), np.zeros(len(number_SN), dtype=np.int64)
    for bit in reversed(range(int(place_N[-1]).bit_length())):
        group_N = (place_N >> bit + 1) << bit + 1  # where each place's group begins: permutations have all numbers of a group
        zeros_N = np.minimum(1 << bit, len(place_N) - group_N)  # in the group
        one_SN = (number_SN >> bit) & 1
        ones_before_SN = one_SN.cumsum(axis=1) - one_SN
        ones_before_SN -= ones_before_SN[:, group_N]
        found_S += (ones_before_SN * (1 - one_SN)).sum(axis=1)
        to_SN = group_N + np.where(one_SN, zeros_N + ones_before_SN, place_N - group_N - ones_before_SN)
        sorted_SN = np.empty_like(number_SN)
        np.put_along_axis(sorted_SN, to_SN, number_SN, axis=1)
        number_SN = sorted_SN
    return found_S


def neighbour_share(order_SN: Orders, grid: int) -> FloatArray:
    """Share of the N - 1 steps [S] that go up, down, left or right by one cell."""
    down_SN, right_SN = _steps(order_SN, grid)
    share: FloatArray = (np.abs(down_SN) + np.abs(right_SN) == 1).mean(axis=1)
    return share


def frontier_share(order_SN: Orders, grid: int) -> FloatArray:
    """Share of the N - 1 cells after the first [S] that have one of the 8 cells around them placed already."""
    last = order_SN.shape[1]
    time_Sgg = np.pad(placing_times(order_SN).reshape(-1, grid, grid), ((0, 0), (1, 1), (1, 1)), constant_values=last)
    around = [(down, right) for down in range(3) for right in range(3) if (down, right) != (1, 1)]
    earliest_Sgg = np.min([time_Sgg[:, down : down + grid, right : right + grid] for down, right in around], axis=0)
    share: FloatArray = (earliest_Sgg < time_Sgg[:, 1:-1, 1:-1]).sum(axis=(1, 2)) / max(last - 1, 1)
    return share


def first_cell_entropy(order_SN: Orders) -> float:
    """Entropy in nats of the cell that is placed first."""
    return float(choice_entropy(order_SN[:, :1])[0])


def choice_entropy(order_SN: Orders) -> FloatArray:
    """Entropy in nats, over the S orders, of the cell that is placed at each step [N].

    S orders cannot show more than log S; entropies of few orders are too low, those of random orders as well.
    """
    return np.array([_entropy(cell_S) for cell_S in order_SN.T])


def _entropy(cell_S: Orders) -> float:
    share = np.unique(cell_S, return_counts=True)[1] / len(cell_S)
    return float(-(share * np.log(share)).sum())


def _steps(order_SN: Orders, grid: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The displacement of each step, down and to the right, [S, N - 1] each."""
    row_SN, column_SN = np.divmod(order_SN.astype(np.int64), grid)
    return np.diff(row_SN, axis=1), np.diff(column_SN, axis=1)
