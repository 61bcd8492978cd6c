"""Precision, recall, density and coverage against a brute force over all pairs, and at their extremes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest

from oar_scale.evaluation import neighbours as module
from oar_scale.evaluation.neighbours import Neighbours, neighbours, wilson_interval

Rows = NDArray[np.float64]


def brute_force(samples: Rows, reference: Rows) -> list[float]:
    """The four shares, by the definitions of the papers, one pair after the other."""

    def radius(rows: Rows, index: int, k: int) -> float:
        distances = sorted(float(np.linalg.norm(rows[index] - other)) for at, other in enumerate(rows) if at != index)
        return distances[k - 1]

    def inside(point: Rows, rows: Rows, k: int) -> list[bool]:
        return [bool(np.linalg.norm(point - centre) <= radius(rows, index, k)) for index, centre in enumerate(rows)]

    precision = np.mean([any(inside(point, reference, 3)) for point in samples])
    recall = np.mean([any(inside(point, samples, 3)) for point in reference])
    density = np.mean([sum(inside(point, reference, 5)) / 5 for point in samples])
    nearest = [min(float(np.linalg.norm(point - centre)) for point in samples) for centre in reference]
    coverage = np.mean([nearest[index] <= radius(reference, index, 5) for index in range(len(reference))])
    return [float(value) for value in (precision, recall, density, coverage)]


def values(measured: Neighbours) -> list[float]:
    assert measured.precision and measured.recall and measured.density and measured.coverage
    return [measured.precision.value, measured.recall.value, measured.density.mean, measured.coverage.value]


def test_the_shares_are_those_of_a_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    samples, reference = rng.normal(size=(23, 3)) * 0.7, rng.normal(size=(17, 3)) + 0.4
    measured = neighbours(samples, reference)
    assert values(measured) == pytest.approx(brute_force(samples, reference), abs=1e-12)
    monkeypatch.setattr(module, "ENTRIES", 40)  # a few rows at a time
    assert neighbours(samples, reference) == measured


def test_a_set_compared_with_itself_is_all_inside() -> None:
    rows = np.random.default_rng(1).normal(size=(30, 4)) + 1e3
    precision, recall, density, coverage = values(neighbours(rows, rows))
    assert precision == recall == coverage == 1 and density >= 1


def test_sets_far_apart_share_nothing() -> None:
    rows = np.random.default_rng(2).normal(size=(30, 4))
    assert values(neighbours(rows, rows + 100)) == [0, 0, 0, 0]


def test_identical_images_are_inside_one_another() -> None:
    """Radii of 0: what is equal is inside, what is not is outside."""
    one = np.full((10, 5), 0.1)
    assert values(neighbours(one, one)) == [1, 1, 2, 1]
    assert values(neighbours(one + 1e-3, one))[0] == 0


@given(trials=st.integers(1, 400), data=st.data())
def test_the_interval_of_a_share_is_wilsons(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    bounds = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert wilson_interval(successes, trials) == pytest.approx((bounds.low, bounds.high), abs=1e-9)


def test_twenty_of_twenty_images_are_no_certainty() -> None:
    rows = np.random.default_rng(3).normal(size=(20, 4))
    same = neighbours(rows, rows)
    for share in (same.precision, same.recall, same.coverage):
        assert share is not None and (share.value, share.high) == (1, 1) and 0.8 < share.low < 0.9


def test_figures_whose_balls_cannot_be_drawn_are_none() -> None:
    """Three samples have no third neighbours, four reference images no fifth ones; the other figures stay what they are."""
    rng = np.random.default_rng(4)
    samples, reference = rng.normal(size=(3, 2)), rng.normal(size=(30, 2))
    few = neighbours(samples, reference)
    assert few.recall is None and few.precision and few.density and few.coverage
    expected = brute_force(np.vstack([samples, samples[:1]]), reference)  # one counted twice: the balls of the reference are the same
    assert few.coverage.value == expected[3]
    other = neighbours(reference, rng.normal(size=(4, 2)))
    assert other.density is None and other.coverage is None and other.precision and other.recall


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="1 samples are too few"):
        neighbours(np.zeros((1, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="the same d"):
        neighbours(np.zeros((9, 2)), np.zeros((9, 3)))
    with pytest.raises(ValueError, match="samples hold values that are no numbers"):
        neighbours(np.full((9, 2), np.nan), np.zeros((9, 2)))
