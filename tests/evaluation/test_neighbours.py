"""Precision, recall, density and coverage against a brute force over all pairs, and at their extremes."""

import numpy as np
import pytest
from numpy.typing import NDArray

from oar_scale.evaluation import neighbours as module
from oar_scale.evaluation.neighbours import neighbours

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


def test_the_shares_are_those_of_a_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    samples, reference = rng.normal(size=(23, 3)) * 0.7, rng.normal(size=(17, 3)) + 0.4
    measured = neighbours(samples, reference)
    figures = [value for value, _ in (measured.precision, measured.recall, measured.density, measured.coverage)]
    assert figures == pytest.approx(brute_force(samples, reference), abs=1e-12)
    monkeypatch.setattr(module, "ENTRIES", 40)  # a few rows at a time
    assert neighbours(samples, reference) == measured


def test_a_set_compared_with_itself_is_all_inside() -> None:
    rows = np.random.default_rng(1).normal(size=(30, 4)) + 1e3
    same = neighbours(rows, rows)
    assert (same.precision, same.recall, same.coverage) == ((1.0, 0.0),) * 3 and same.density[0] >= 1


def test_sets_far_apart_share_nothing() -> None:
    rows = np.random.default_rng(2).normal(size=(30, 4))
    far = neighbours(rows, rows + 100)
    assert [value for value, _ in (far.precision, far.recall, far.density, far.coverage)] == [0, 0, 0, 0]


def test_identical_images_are_inside_one_another() -> None:
    """Radii of 0: what is equal is inside, what is not is outside."""
    one = np.full((10, 5), 0.1)
    assert neighbours(one, one).precision[0] == 1 and neighbours(one, one).coverage[0] == 1
    assert neighbours(one + 1e-3, one).precision[0] == 0


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="5 samples are too few: each needs 5 neighbours"):
        neighbours(np.zeros((5, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="the same d"):
        neighbours(np.zeros((9, 2)), np.zeros((9, 3)))
    with pytest.raises(ValueError, match="samples hold values that are no numbers"):
        neighbours(np.full((9, 2), np.nan), np.zeros((9, 2)))
