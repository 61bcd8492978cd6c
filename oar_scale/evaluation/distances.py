r"""Distances between two sets of images, computed from their features.

    KID      MMD^2 with the kernel k(a, b) = (a . b / d + 1)^3, unbiased: 0 on average when both come from one distribution
    Frechet  |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), of the Gaussians with the same means and covariances

KID can be read with a few hundred images. The Frechet distance has a bias that falls with the number of samples (two
halves of *one* set of 800 images are far from 0), so it is only ever compared between equal numbers of samples: both
functions insist on as many ``x`` as ``y``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oar_scale.results.estimates import Estimate

Matrix = NDArray[np.float64]


class Kid(NamedTuple):
    """Mean of the unbiased MMD^2 over random subsets, and the standard deviation between the subsets."""

    mean: float
    std: float


def kid(x: ArrayLike, y: ArrayLike, *, subsets: int = 100, subset_size: int | None = None, seed: int = 0) -> Kid:
    """Kernel distance between two sets of features (Binkowski et al. 2018).

    Args:
        x, y: [n, d] features, the same n and d.
        subsets: number of random subsets.
        subset_size: samples in a subset, drawn without replacement; default half of n, at most 1000.
        seed: of the draw; the same seed gives the same result.

    Raises:
        ValueError: unequal shapes, or a subset that is smaller than 2 or larger than n.
    """
    features_x, features_y = _same_shape(x, y)
    count = len(features_x)
    size = min(count // 2, 1000) if subset_size is None else subset_size
    if not 2 <= size <= count:
        raise ValueError(f"subsets of {size} samples cannot be drawn from {count}: they need 2 to {count}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        picked_x, picked_y = rng.choice(count, size, replace=False), rng.choice(count, size, replace=False)
        values.append(_unbiased_mmd2(features_x[picked_x], features_y[picked_y]))
    return Kid(float(np.mean(values)), float(np.std(values)))


def kid_difference(first: ArrayLike, second: ArrayLike, reference: ArrayLike) -> Estimate:
    """How much farther ``first`` is from the reference than ``second``, by the kernel of :func:`kid`, paired by row.

    A U-statistic over pairs of different rows, so that two samples for a caption are never compared with that caption's own image. What
    the rows of the three sets share (the caption, the noise) cancels in the difference and in its standard error.

    Args:
        first, second, reference: [n, d] features, the same n (at least 3) and d; row i of all three belongs to the same caption.

    Returns:
        Unbiased MMD^2 of ``first`` minus that of ``second``, and the standard error by the jackknife over rows (Efron & Stein 1981), which
        is too large rather than too small: by about sqrt(2) where both sets are from the distribution of the reference.

    Raises:
        ValueError: unequal shapes, or fewer than 3 rows.
    """
    features_x, features_z = _same_shape(first, reference)
    features_y, _ = _same_shape(second, reference)
    count = len(features_z)
    if count < 3:
        raise ValueError(f"a standard error of a distance needs at least 3 samples, got {count}")

    k_xz, k_yz = _kernel(features_x, features_z), _kernel(features_y, features_z)
    # What the reference is to itself is the same on both sides.
    terms_nn = _kernel(features_x, features_x) - k_xz - k_xz.T - (_kernel(features_y, features_y) - k_yz - k_yz.T)
    np.fill_diagonal(terms_nn, 0.0)
    total = terms_nn.sum()
    without_n = (total - 2 * terms_nn.sum(1)) / ((count - 1) * (count - 2))
    spread = float(np.sum((without_n - without_n.mean()) ** 2))
    return Estimate(float(total / (count * (count - 1))), float(np.sqrt((count - 1) / count * spread)))


def frechet(x: ArrayLike, y: ArrayLike) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features.

    With ``A^T A = C_x`` and ``B^T B = C_y`` the trace of ``(C_x C_y)^(1/2)`` is the sum of the singular values of ``A B^T``.
    No square root of a matrix is taken, so that fewer samples than dimensions (singular covariances) do no harm.

    Args:
        x, y: [n, d] features, the same n (at least 2) and d.

    Raises:
        ValueError: unequal shapes.
    """
    features_x, features_y = _same_shape(x, y)
    mean_x, mean_y = features_x.mean(0), features_y.mean(0)
    root_x, root_y = _covariance_root(features_x - mean_x), _covariance_root(features_y - mean_y)
    overlap = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    distance = np.sum((mean_x - mean_y) ** 2) + np.sum(root_x**2) + np.sum(root_y**2) - 2 * overlap
    return max(float(distance), 0.0)  # rounding may leave -1e-13


def _covariance_root(centred: Matrix) -> Matrix:
    """R [min(n, d), d] with ``R^T R`` = the covariance."""
    return np.linalg.qr(centred / np.sqrt(len(centred) - 1)).R


def _unbiased_mmd2(x: Matrix, y: Matrix) -> float:
    count = len(x)
    k_xx, k_yy, k_xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within = (k_xx.sum() - np.trace(k_xx) + k_yy.sum() - np.trace(k_yy)) / (count * (count - 1))
    return float(within - 2 * k_xy.mean())


def _kernel(x: Matrix, y: Matrix) -> Matrix:
    values: Matrix = (x @ y.T / x.shape[1] + 1) ** 3
    return values


def _same_shape(x: ArrayLike, y: ArrayLike) -> tuple[Matrix, Matrix]:
    features_x, features_y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if features_x.ndim != 2 or features_x.shape != features_y.shape or len(features_x) < 2:
        raise ValueError(
            f"features of shapes {features_x.shape} and {features_y.shape} cannot be compared: "
            "both must be [n, d] with the same n >= 2, because the distances depend on the number of samples"
        )
    return features_x, features_y
