r"""Distances between two sets of images, computed from their features.

    KID      MMD^2 with the kernel k(a, b) = (a . b / d + 1)^3, unbiased: 0 on average when both come from one distribution
    Frechet  |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), of the Gaussians with the same means and covariances

KID can be read with a few hundred images, and with another number of images on each side. The Frechet distance has a bias that falls with
the number of samples on either side (two halves of *one* set of 800 images are far from 0): compare only distances that were measured with
the same numbers of samples to the same reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oar_scale.evaluation.moments import Moments
from oar_scale.results.estimates import Estimate, estimate

Matrix = NDArray[np.float64]
Groups = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Of each image of two sets, [n] and [m], the number of what it belongs to (a caption)."""
MAX_SUBSET = 1000
ENTRIES = 1 << 22
"""Values of a kernel that are in memory at once, of one pair of sets: 32 MB."""


class Kid(NamedTuple):
    """Mean of the unbiased MMD^2 over random subsets, and the standard deviation between the subsets.

    The deviation does not shrink with the number of images: it is no standard error (:func:`kid_error`).
    """

    mean: float
    std: float
    subsets: int


def kid(
    x: ArrayLike,
    y: ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    paired: bool = False,
    groups: Groups | None = None,
    seed: int = 0,
) -> Kid:
    """Kernel distance between two sets of features (Binkowski et al. 2018).

    Args:
        x, y: [n, d] and [m, d] features.
        subsets: number of random subsets.
        subset_size: samples in a subset, drawn without replacement; default half of the smaller set, at most 1000.
        paired: row i of ``x`` and of ``y`` belong to the same caption, and so are more alike than two independent images. Such pairs are
            left out, or the distance of a perfect model would be below 0 on average.
        groups: the same where several images may belong to one caption, in any order: pairs of one caption are left out, within a set as
            between the two.
        seed: of the draw; the same seed gives the same result.

    Raises:
        ValueError: features of other dimensions, values that are no numbers, a subset that is smaller than 2 or larger than a set,
            paired sets of unequal size, or no pair of different captions.
    """
    features_x, features_y = _features(x), _features(y)
    groups_x, groups_y = _numbered(features_x, features_y, paired, groups)
    fewest = min(len(features_x), len(features_y))
    size = min(fewest // 2, MAX_SUBSET) if subset_size is None else subset_size
    if not 2 <= size <= fewest:
        raise ValueError(f"subsets of {size} samples cannot be drawn from {fewest}: they need 2 to {fewest}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        picked_x, picked_y = rng.choice(len(features_x), size, replace=False), rng.choice(len(features_y), size, replace=False)
        subset_x, subset_y = features_x[picked_x].astype(np.float64), features_y[picked_y].astype(np.float64)
        values.append(_unbiased_mmd2(subset_x, subset_y, groups_x[picked_x], groups_y[picked_y]))
    found = [value for value in values if value is not None]
    if not found:
        raise ValueError("nearly all images belong to one caption, and a distance compares images of different ones")
    return Kid(float(np.mean(found)), float(np.std(found)), len(found))


def kid_error(x: ArrayLike, y: ArrayLike, *, paired: bool = False, groups: Groups | None = None, most: int = 5000) -> float:
    """The standard error of :func:`kid` over all images: how much it would differ for other images of both kinds.

    By the jackknife over captions, and over single images without any (Efron & Stein 1981): of paired sets that of :func:`kid_shares`. Too
    large rather than too small, by about sqrt(2) where both sets are from one distribution.

    Args:
        x, y, paired, groups: as of :func:`kid`.
        most: captions (or images) that are looked at, for the work grows with their square. Of more as many random ones, of those of each
            side alone and of both sides as evenly as there are: where one side has few, nearly all of the error is theirs. What the
            variance is in them counts by the share that they are, as that of a mean does.

    Raises:
        ValueError: as :func:`kid`, or fewer than 3 images a side or captions.
    """
    features_x, features_y = (_features(given).astype(np.float64) for given in (x, y))
    numbers = _numbered(features_x, features_y, paired, groups)
    _, at = np.unique(np.concatenate(numbers), return_inverse=True)
    at_x, at_y = at[: len(features_x)], at[len(features_x) :]
    count, share_g = int(at.max()) + 1, np.ones(1)
    if count > most:
        taken, share_g = _some_groups(at_x, at_y, count, most)
        at_x, at_y, count = taken[at_x], taken[at_y], len(share_g)
        features_x, features_y = features_x[at_x >= 0], features_y[at_y >= 0]
        at_x, at_y = at_x[at_x >= 0], at_y[at_y >= 0]
    distance_g = _means_without(features_x, at_x, features_x, at_x, count) + _means_without(features_y, at_y, features_y, at_y, count)
    distance_g -= 2 * _means_without(features_x, at_x, features_y, at_y, count)
    deviations_g = distance_g - np.mean(distance_g)
    if count < 3 or not np.isfinite(deviations_g).all():
        raise ValueError("a standard error of a distance needs at least 3 images a side, of different captions")
    return float(np.sqrt((count - 1) / count * np.sum(share_g * deviations_g**2)))


def kid_difference(first: ArrayLike, second: ArrayLike, reference: ArrayLike, families_n: ArrayLike | None = None) -> Estimate:
    """How much farther ``first`` is from the reference than ``second``, by the kernel of :func:`kid`, paired by row.

    A U-statistic over pairs of different rows, so that two samples for a caption are never compared with that caption's own image. What
    the rows of the three sets share (the caption, the noise) cancels in the difference and in its standard error.

    Args:
        first, second, reference: [n, d] features, the same n (at least 3) and d; row i of all three belongs to the same caption.
        families_n: the same number for rows that are not independent, which are one to the standard error. None: all are.

    Returns:
        Unbiased MMD^2 of ``first`` minus that of ``second``, and the standard error by the jackknife over rows (Efron & Stein 1981), which
        is too large rather than too small: by about sqrt(2) where both sets are from the distribution of the reference.

    Raises:
        ValueError: unequal shapes, or fewer than 3 rows.
    """
    return estimate(kid_shares(first, reference) - kid_shares(second, reference), families_n)


def kid_shares(samples: ArrayLike, reference: ArrayLike, families_n: ArrayLike | None = None) -> Matrix:
    """The share of each row in the KID of samples to a reference, paired by row as in :func:`kid_difference`.

    Rows of one family (the same thing in other styles or colours) are as alike as a row's sample and its own image: all pairs within a
    family are left out, among samples, among images and between the two. With every row its own family the share of row i is its jackknife
    pseudo-value, n KID - (n - 1) KID without i; with F families that of the U-statistic's linear term, (F - 1) / (F - 2) as far from the
    mean, which is the same for families of one row. Their mean is the KID, their standard error (by family) that of the jackknife; and the
    differences of two sets' shares are those of :func:`kid_difference`, so that whatever compares paired values can compare distances.

    Args:
        samples, reference: [n, d] features, the same n (at least 3) and d.
        families_n: the same number for rows of one family. None: each row is its own.

    Raises:
        ValueError: unequal shapes, or fewer than 3 rows or families.
    """
    features_x, features_z = _same_shape(samples, reference)
    families = np.arange(len(features_z)) if families_n is None else np.asarray(families_n)
    count = len(np.unique(families))
    if count < 3 or len(families) != len(features_z):
        raise ValueError(f"a standard error of a distance needs at least 3 samples, of different families, got {count}")
    k_xz = _kernel(features_x, features_z)
    terms_nn = _kernel(features_x, features_x) - k_xz - k_xz.T + _kernel(features_z, features_z)
    apart_nn = families[:, None] != families
    pairs_n, sums_n = apart_nn.sum(1), np.where(apart_nn, terms_nn, 0.0).sum(1)
    distance = sums_n.sum() / pairs_n.sum()
    weight = 2 * len(families) / pairs_n.sum() * (count - 1) / (count - 2)
    shares_n: Matrix = distance + weight * (sums_n - distance * pairs_n)
    return shares_n


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian with the mean and the covariance of a set of features."""

    mean_D: Matrix
    root_RD: Matrix
    """R [r, d] with ``R^T R`` = the covariance. No square root of a matrix is taken, so that singular covariances (fewer samples than
    dimensions, identical images) do no harm."""

    @classmethod
    def of_features(cls, features: ArrayLike) -> Gaussian:
        """Of [n, d] features, n at least 2. Raises ValueError for anything else, or values that are no numbers."""
        features_SD = _features(features).astype(np.float64)
        mean_D = features_SD.mean(0)
        return cls(mean_D, np.linalg.qr((features_SD - mean_D) / np.sqrt(len(features_SD) - 1)).R)

    @classmethod
    def of_rows(cls, features: NDArray[np.floating]) -> Gaussian:
        """Of [n, d] features, the cheaper way: a few rows are far less than a matrix [d, d]."""
        return cls.of_features(features) if len(features) <= features.shape[-1] else cls.of_moments(Moments.of(features))

    @classmethod
    def of_moments(cls, moments: Moments) -> Gaussian:
        """Of statistics that were gathered a part at a time."""
        return cls.of_covariance(moments.mean_D, moments.covariance_DD)

    @classmethod
    def of_covariance(cls, mean_D: Matrix, covariance_DD: Matrix) -> Gaussian:
        """Raises ValueError for values that are no numbers, or a matrix that is no covariance."""
        check_covariance(mean_D, covariance_DD)
        variances_D, directions_DD = np.linalg.eigh(covariance_DD)
        if variances_D[0] < -1e-4 * np.abs(covariance_DD).max():
            raise ValueError(f"this is no covariance matrix: along one direction its variance is {variances_D[0]:.3g}")
        return cls(mean_D, (directions_DD * np.sqrt(variances_D.clip(0))).T)


def check_covariance(mean_D: Matrix, covariance_DD: Matrix) -> None:
    """Raise ValueError for what can be seen at once to be no mean and covariance."""
    if mean_D.ndim != 1 or not len(mean_D) or covariance_DD.shape != (len(mean_D), len(mean_D)):
        raise ValueError(f"mean {list(mean_D.shape)} and covariance {list(covariance_DD.shape)} do not belong together")
    if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
        raise ValueError("the statistics hold values that are no numbers (NaN or infinite)")
    largest, least = float(np.abs(covariance_DD).max()), float(covariance_DD.diagonal().min())
    if np.abs(covariance_DD - covariance_DD.T).max() > 1e-4 * largest:
        raise ValueError("this is no covariance matrix: it is not symmetric")
    if least < -1e-4 * largest:
        raise ValueError(f"this is no covariance matrix: of one feature its variance is {least:.3g}")


def frechet_distance(x: Gaussian, y: Gaussian) -> float:
    """Frechet distance between two Gaussians of the same dimensions.

    With ``A^T A = C_x`` and ``B^T B = C_y`` the trace of ``(C_x C_y)^(1/2)`` is the sum of the singular values of ``A B^T``.
    """
    overlap = np.linalg.svd(x.root_RD @ y.root_RD.T, compute_uv=False).sum()
    distance = np.sum((x.mean_D - y.mean_D) ** 2) + np.sum(x.root_RD**2) + np.sum(y.root_RD**2) - 2 * overlap
    return max(float(distance), 0.0)  # rounding may leave -1e-13


def frechet(x: ArrayLike, y: ArrayLike) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features of the same size.

    Args:
        x, y: [n, d] features, the same n (at least 2) and d.

    Raises:
        ValueError: unequal shapes.
    """
    features_x, features_y = _same_shape(x, y)
    return frechet_distance(Gaussian.of_features(features_x), Gaussian.of_features(features_y))


def _numbered(x: NDArray[np.floating], y: NDArray[np.floating], paired: bool, groups: Groups | None) -> Groups:
    """What each row belongs to; without captions, to itself alone. Raises ValueError for sets that cannot be compared."""
    if x.shape[1] != y.shape[1] or (paired and len(x) != len(y)):
        raise _unlike(x, y)
    if groups is not None:
        return groups
    rows_x = np.arange(len(x))
    return rows_x, np.arange(len(y)) + (0 if paired else len(x))


def _some_groups(at_x: NDArray[np.int64], at_y: NDArray[np.int64], groups: int, most: int) -> tuple[NDArray[np.int64], Matrix]:
    """Random groups, ``most`` at most: of those in ``x`` alone, in ``y`` alone and in both as many each, or all that there are.

    Returns:
        The new number of each group, -1 of one that is left out, [groups]; for each new one the share of its kind that was taken.
    """
    where_g, number_g, share = np.zeros(groups, dtype=np.int64), np.full(groups, -1), list[float]()
    where_g[at_x] |= 1
    where_g[at_y] |= 2
    rng, kinds = np.random.default_rng(0), [np.flatnonzero(where_g == kind) for kind in (1, 2, 3)]
    for later, of_kind in zip((2, 1, 0), sorted(kinds, key=len), strict=True):
        count = min(len(of_kind), (most - len(share)) // (later + 1))
        number_g[rng.choice(of_kind, count, replace=False)] = len(share) + np.arange(count)
        share += [count / max(len(of_kind), 1)] * count
    return number_g, np.array(share)


def _unbiased_mmd2(x: Matrix, y: Matrix, groups_x: NDArray[np.int64], groups_y: NDArray[np.int64]) -> float | None:
    """MMD^2 of two samples, over the pairs of different groups; None where there is no such pair."""
    terms = []
    for first, of_first, second, of_second in ((x, groups_x) * 2, (y, groups_y) * 2, (x, groups_x, y, groups_y)):
        apart = of_first[:, None] != of_second[None, :]
        if not apart.any():
            return None
        terms.append(_kernel(first, second).mean(where=apart))
    return float(terms[0] + terms[1] - 2 * terms[2])


def _means_without(x: Matrix, at_x: NDArray[np.int64], y: Matrix, at_y: NDArray[np.int64], groups: int) -> Matrix:
    """The mean of the kernel over pairs of different groups, [groups]: without each of them in turn."""
    sums_g, counts_g = np.zeros(groups), np.zeros(groups)
    total = pairs = 0.0
    step = max(1, ENTRIES // len(y))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        apart = at_x[part, None] != at_y[None, :]
        values = np.where(apart, _kernel(x[part], y), 0.0)
        total, pairs = total + values.sum(), pairs + apart.sum()
        for given, sums in ((values, sums_g), (apart, counts_g)):
            sums += np.bincount(at_x[part], weights=given.sum(1), minlength=groups)
            sums += np.bincount(at_y, weights=given.sum(0), minlength=groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Matrix = (total - sums_g) / (pairs - counts_g)
    return means


def _kernel(x: Matrix, y: Matrix) -> Matrix:
    values: Matrix = (x @ y.T / x.shape[1] + 1) ** 3
    return values


def _features(given: ArrayLike) -> NDArray[np.floating]:
    features: NDArray[np.floating] = np.asarray(given)
    if features.ndim != 2:
        raise ValueError(f"features of shape {features.shape}: a distance needs [n, d]")
    if len(features) < 2:
        raise ValueError(f"a distance needs at least 2 images, got {len(features)}")
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
        raise ValueError(f"the features of image {row} are no numbers (NaN or infinite)")
    return features


def _same_shape(x: ArrayLike, y: ArrayLike) -> tuple[Matrix, Matrix]:
    features_x, features_y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if features_x.ndim != 2 or features_x.shape != features_y.shape or len(features_x) < 2:
        raise _unlike(features_x, features_y)
    _features(features_x), _features(features_y)
    return features_x, features_y


def _unlike(x: NDArray[np.floating], y: NDArray[np.floating]) -> ValueError:
    return ValueError(
        f"features of shapes {x.shape} and {y.shape} cannot be compared: "
        "both must be [n, d] with the same n >= 2, because the distances depend on the number of samples"
    )
