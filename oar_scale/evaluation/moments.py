"""Count, mean and covariance of features, gathered a part of the images at a time: what a Frechet distance needs of a set.

    part 00000 -> Moments, part 00001 -> Moments, ...   merge_moments, in the order of the parts   -> Moments of the set

Two statistics are merged by the formula of Chan, Golub & LeVeque (1979), in float64, without the cancellation of sums of squares. Parts are
always merged in the order of the set, whoever computed them and whenever: so a set has the same statistics to the last bit. Merged in any
other order they agree to about 1e-12 of their size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Statistics of n features of D numbers."""

    count: int
    mean_D: Matrix
    scatter_DD: Matrix
    """The sum of ``(f - mean)^T (f - mean)`` over the features f: the covariance times (count - 1)."""

    @classmethod
    def of(cls, features: ArrayLike) -> Moments:
        """Of [n, D] features, n at least 1. Raises ValueError for another shape, or values that are no numbers."""
        features_SD = np.asarray(features, dtype=np.float64)
        if features_SD.ndim != 2 or not len(features_SD):
            raise ValueError(f"features of shape {features_SD.shape} have no statistics: they must be [n, D], n at least 1")
        if not np.isfinite(features_SD).all():
            row = int(np.flatnonzero(~np.isfinite(features_SD).all(1))[0])
            raise ValueError(f"the features of image {row} are no numbers (NaN or infinite)")
        mean_D = features_SD.mean(0)
        centred_SD = features_SD - mean_D
        return cls(len(features_SD), mean_D, centred_SD.T @ centred_SD)

    @property
    def covariance_DD(self) -> Matrix:
        """The unbiased covariance. Raises ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter_DD / (self.count - 1)

    def merged(self, other: Moments) -> Moments:
        """The statistics of both sets of features together. Raises ValueError where they have other dimensions."""
        if self.mean_D.shape != other.mean_D.shape:
            raise ValueError(f"statistics of {len(self.mean_D)} and of {len(other.mean_D)} features cannot be merged")
        count = self.count + other.count
        step_D = other.mean_D - self.mean_D
        scatter_DD = self.scatter_DD + other.scatter_DD
        scatter_DD += np.outer(step_D, step_D) * (self.count * other.count / count)
        return Moments(count, self.mean_D + step_D * (other.count / count), scatter_DD)


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """The statistics of all parts, merged in the order given. Raises ValueError where there is none."""
    merged: Moments | None = None
    for part in parts:
        merged = part if merged is None else merged.merged(part)
    if merged is None:
        raise ValueError("there are no statistics to merge")
    return merged
