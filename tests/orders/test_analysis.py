"""What the statistics say about orders whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from oar_scale.orders.analysis import describe_orders, kendall_distance, mean_time_map

RASTER = np.arange(16)


def test_the_same_order_is_at_0_and_the_reversed_one_at_1() -> None:
    assert kendall_distance(RASTER, RASTER).tolist() == [0.0]
    assert kendall_distance(RASTER, RASTER[::-1]).tolist() == [1.0]


@given(st.permutations(range(7)), st.permutations(range(7)))
def test_the_distance_is_the_share_of_reversed_pairs(first: list[int], second: list[int]) -> None:
    """The distance is the share of pairs that stand the other way round."""
    pairs = [(a, b) for a in range(7) for b in range(a)]
    swapped = sum((first.index(a) < first.index(b)) != (second.index(a) < second.index(b)) for a, b in pairs)
    assert kendall_distance(np.array(first), np.array(second))[0] == pytest.approx(swapped / len(pairs))


@pytest.mark.parametrize("cells", [1, 2, 3, 8, 49, 256])
def test_the_distance_is_that_of_scipys_kendall_tau(cells: int) -> None:
    dice = np.random.default_rng(cells)
    first_SN, second_SN = (dice.permuted(np.tile(np.arange(cells), (5, 1)), axis=1).astype(np.uint16) for _ in range(2))
    times = zip(np.argsort(first_SN), np.argsort(second_SN), strict=True)
    tau_S = [stats.kendalltau(*pair).statistic if cells > 1 else 1.0 for pair in times]
    assert kendall_distance(first_SN, second_SN) == pytest.approx((1 - np.array(tau_S)) / 2, abs=1e-12)
    assert kendall_distance(first_SN, second_SN[0])[0] == kendall_distance(first_SN, second_SN)[0]


def test_random_orders_are_half_way_on_average() -> None:
    orders = np.stack([np.random.default_rng(seed).permutation(64) for seed in range(300)])
    statistics = describe_orders(orders, grid=8)
    assert statistics.raster_distance == pytest.approx(0.5, abs=0.02)
    assert statistics.pair_distance == pytest.approx(0.5, abs=0.02)
    assert statistics.distinct == 300
    assert statistics.first_cell_entropy > 0.9 * math.log(64)
    assert statistics.neighbour_share == pytest.approx(224 / (64 * 63), abs=0.01)  # 224 ordered pairs of neighbours


def test_raster_steps_to_a_neighbour_except_at_line_ends() -> None:
    """Raster order steps to a neighbour except at the end of a line."""
    statistics = describe_orders(np.stack([RASTER, RASTER]), grid=4)
    assert statistics.neighbour_share == 12 / 15
    assert (statistics.distinct, statistics.first_cell_entropy, statistics.raster_distance) == (1, 0.0, 0.0)


def test_the_time_map_tells_first_from_last() -> None:
    half_reversed = np.stack([RASTER, RASTER[::-1]])
    np.testing.assert_allclose(mean_time_map(RASTER[None], grid=4).ravel(), RASTER / 15)
    np.testing.assert_allclose(mean_time_map(half_reversed, grid=4), 0.5)
