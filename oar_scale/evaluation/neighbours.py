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

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
ENTRIES = 1 << 24
"""Distances that are in memory at once: 128 MB."""


@dataclass(frozen=True)
class Neighbours:
    """The four shares, each a mean over images, with its standard error over those images; the balls are taken as given."""

    precision: tuple[float, float]
    recall: tuple[float, float]
    density: tuple[float, float]
    coverage: tuple[float, float]


def neighbours(samples: ArrayLike, reference: ArrayLike, *, k_precision: int = 3, k_density: int = 5) -> Neighbours:
    """Compare two sets of features by the balls of their nearest neighbours.

    Args:
        samples, reference: [n, d] and [m, d] features.
        k_precision: which neighbour the balls of precision and recall reach.
        k_density: which neighbour the balls of density and coverage reach.

    Raises:
        ValueError: other dimensions, values that are no numbers, or too few images to have so many neighbours.
    """
    samples_SD, reference_RD = _both(samples, reference, max(k_precision, k_density))
    radii_S, radii_R = neighbour_distances(samples_SD, (k_precision,))[0], neighbour_distances(reference_RD, (k_precision, k_density))
    real_S, balls_S = np.zeros(len(samples_SD)), np.zeros(len(samples_SD))
    drawn_R, near_R = np.zeros(len(reference_RD)), np.zeros(len(reference_RD))
    for part in _slices(len(samples_SD), len(reference_RD)):
        distance_PR = squared_distances(samples_SD[part], reference_RD)
        real_S[part] = (distance_PR <= radii_R[0]).any(1)
        drawn_R = np.maximum(drawn_R, (distance_PR <= radii_S[part, None]).any(0))
        inside_PR = distance_PR <= radii_R[1]
        balls_S[part] = inside_PR.sum(1) / k_density
        near_R = np.maximum(near_R, inside_PR.any(0))
    return Neighbours(*(_mean(values) for values in (real_S, drawn_R, balls_S, near_R)))


def neighbour_distances(features_SD: Matrix, ks: tuple[int, ...]) -> Matrix:
    """Squared distance of each image to its k-th nearest neighbour in its own set, [len(ks), S]; an image is no neighbour of itself."""
    found = np.empty((len(ks), len(features_SD)))
    for part in _slices(len(features_SD), len(features_SD)):
        distance_PS = squared_distances(features_SD[part], features_SD)
        distance_PS[np.arange(len(distance_PS)), np.arange(part.start, part.stop)] = np.inf
        ordered = np.partition(distance_PS, [k - 1 for k in ks], axis=1)
        found[:, part] = ordered[:, [k - 1 for k in ks]].T
    return found


def squared_distances(x: Matrix, y: Matrix) -> Matrix:
    """``|x_i - y_j|^2`` [n, m]; 0 for rows that are equal but for rounding."""
    square_X, square_Y = np.einsum("nd,nd->n", x, x), np.einsum("nd,nd->n", y, y)
    sums = square_X[:, None] + square_Y[None, :]
    distances: Matrix = sums - 2 * (x @ y.T)
    distances[distances < 1e-13 * sums] = 0.0
    return distances


def _both(samples: ArrayLike, reference: ArrayLike, k: int) -> tuple[Matrix, Matrix]:
    """Both sets in float64, moved so that the reference's mean is 0: far from there, differences of squares lose digits."""
    sets = [np.asarray(given, dtype=np.float64) for given in (samples, reference)]
    for name, features in zip(("samples", "reference images"), sets, strict=True):
        if features.ndim != 2 or features.shape[1:] != sets[1].shape[1:]:
            raise ValueError(f"features of shapes {sets[0].shape} and {sets[1].shape} cannot be compared: both must be [n, d], the same d")
        if len(features) <= k:
            raise ValueError(f"{len(features)} {name} are too few: each needs {k} neighbours in its own set, so at least {k + 1} images")
        if not np.isfinite(features).all():
            raise ValueError(f"the features of the {name} hold values that are no numbers (NaN or infinite)")
    middle_D = sets[1].mean(0)
    return sets[0] - middle_D, sets[1] - middle_D


def _slices(rows: int, columns: int) -> list[slice]:
    step = max(1, ENTRIES // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _mean(values: Matrix) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
