"""Precision and recall, density and coverage: how two sets of features lie among one another.

Around each image a ball reaches to its k-th nearest neighbour in its own set.

    precision   share of the samples inside a ball of some reference image: is what is drawn like something real?         k = 3
    recall      share of the reference images inside a ball of some sample: is everything real drawn?                       k = 3
    density     mean number of reference balls that a sample is in, divided by k: robust to single outliers                  k = 5
    coverage    share of the reference images with a sample inside their ball: robust to outliers among the samples          k = 5

Precision and recall are those of Kynkaanniemi et al. (2019), density and coverage those of Naeem et al. (2020). They depend on the number
of images on both sides. A distance equal to the radius counts as inside, so that identical images are inside one another's balls.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oar_scale.results.estimates import Estimate, estimate
from oar_scale.results.statistics import LEVEL

Matrix = NDArray[np.float64]
ENTRIES = 1 << 24
"""Distances that are in memory at once: 128 MB."""
K_PRECISION, K_DENSITY = 3, 5
"""Which neighbour the balls of precision and recall, and those of density and coverage, reach."""


class Share(NamedTuple):
    """A share of images, and where it lies for other images of this kind (95 %, Wilson 1927), the balls taken as given."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Neighbours:
    """The four figures; None for one whose balls cannot be drawn, as a set has too few images."""

    precision: Share | None
    recall: Share | None
    density: Estimate | None
    """With its standard error over the samples, the balls taken as given."""
    coverage: Share | None


def neighbours(samples: ArrayLike, reference: ArrayLike) -> Neighbours:
    """Compare two sets of features by the balls of their nearest neighbours.

    Args:
        samples, reference: [n, d] and [m, d] features, n and m at least 2. Precision wants m above :data:`K_PRECISION`, recall n, density
            and coverage m above :data:`K_DENSITY`.

    Raises:
        ValueError: other dimensions, fewer images, or values that are no numbers.
    """
    samples_SD, reference_RD = _both(samples, reference)
    (radii_S,), radii_R = neighbour_distances(samples_SD, (K_PRECISION,)), neighbour_distances(reference_RD, (K_PRECISION, K_DENSITY))
    real_S, balls_S = np.zeros(len(samples_SD), bool), np.zeros(len(samples_SD))
    drawn_R, near_R = (np.zeros(len(reference_RD), bool) for _ in range(2))
    for part in _slices(len(samples_SD), len(reference_RD)):
        distance_PR = squared_distances(samples_SD[part], reference_RD)
        real_S[part] = (distance_PR <= radii_R[0]).any(1)
        drawn_R |= (distance_PR <= radii_S[part, None]).any(0)
        inside_PR = distance_PR <= radii_R[1]
        balls_S[part] = inside_PR.sum(1) / K_DENSITY
        near_R |= inside_PR.any(0)
    dense = len(reference_RD) > K_DENSITY
    return Neighbours(
        precision=_share(real_S) if len(reference_RD) > K_PRECISION else None,
        recall=_share(drawn_R) if len(samples_SD) > K_PRECISION else None,
        density=estimate(balls_S) if dense else None,
        coverage=_share(near_R) if dense else None,
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Where a share lies at :data:`LEVEL` after so many independent trials (Wilson 1927): never without width, also at 0 and 1."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    rate, scale = successes / trials, 1 + z**2 / trials
    middle = (rate + z**2 / (2 * trials)) / scale
    reach = z / scale * float(np.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2))
    return (0.0 if successes == 0 else middle - reach), (1.0 if successes == trials else middle + reach)


def neighbour_distances(features_SD: Matrix, ks: tuple[int, ...]) -> Matrix:
    """Squared distance of each image to its k-th nearest neighbour in its own set, [len(ks), S]; an image is no neighbour of itself.

    NaN, in which nothing lies, where there are no k others.
    """
    found = np.full((len(ks), len(features_SD)), np.nan)
    there = [k for k in ks if k < len(features_SD)]
    for part in _slices(len(features_SD), len(features_SD)) if there else []:
        distance_PS = squared_distances(features_SD[part], features_SD)
        distance_PS[np.arange(len(distance_PS)), np.arange(part.start, part.stop)] = np.inf
        ordered = np.partition(distance_PS, [k - 1 for k in there], axis=1)
        found[: len(there), part] = ordered[:, [k - 1 for k in there]].T
    return found


def squared_distances(x: Matrix, y: Matrix) -> Matrix:
    """``|x_i - y_j|^2`` [n, m]; 0 for rows that are equal but for rounding."""
    square_X, square_Y = np.einsum("nd,nd->n", x, x), np.einsum("nd,nd->n", y, y)
    sums = square_X[:, None] + square_Y[None, :]
    distances: Matrix = sums - 2 * (x @ y.T)
    distances[distances < 1e-13 * sums] = 0.0
    return distances


def _both(samples: ArrayLike, reference: ArrayLike) -> tuple[Matrix, Matrix]:
    """Both sets in float64, moved so that the reference's mean is 0: far from there, differences of squares lose digits."""
    sets = [np.asarray(given, dtype=np.float64) for given in (samples, reference)]
    for name, features in zip(("samples", "reference images"), sets, strict=True):
        if features.ndim != 2 or features.shape[1:] != sets[1].shape[1:]:
            raise ValueError(f"features of shapes {sets[0].shape} and {sets[1].shape} cannot be compared: both must be [n, d], the same d")
        if len(features) < 2:
            raise ValueError(f"{len(features)} {name} are too few: neighbours need at least 2")
        if not np.isfinite(features).all():
            raise ValueError(f"the features of the {name} hold values that are no numbers (NaN or infinite)")
    middle_D = sets[1].mean(0)
    return sets[0] - middle_D, sets[1] - middle_D


def _slices(rows: int, columns: int) -> list[slice]:
    step = max(1, ENTRIES // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _share(inside: NDArray[np.bool_]) -> Share:
    return Share(float(inside.mean()), *wilson_interval(int(inside.sum()), len(inside)))
