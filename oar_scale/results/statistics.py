"""How sure is a mean, and is a difference one? Intervals over images and over seeds, paired tests, correction for many comparisons.

Values are [R, S]: of each of R seeds (trainings that differ in their seed alone) and each of S images. Two questions, two answers:

    over images    these models on other images of this kind: bootstrap of the images (BCa, Efron 1987), sign-flip test. Images of one
                   *family* (drawings of one thing, in other styles and skin tones) are alike: families are drawn and flipped as a whole
    over seeds     other trainings like these: Student's t of the seeds' means; none of a single seed

Differences are paired: by image always, and by seed where both sides have as many. A side with one seed is taken as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oar_scale.errors import UserError

Floats = NDArray[np.float64]
LEVEL = 0.95
"""Share of the intervals that hold the true value."""
RESAMPLES = 4000
FLIPS = 9999
"""Random sign flips of a test; all 2^S of them where these are fewer."""
FEW = 10
"""Below so many families a bootstrap is too narrow; Student's t is taken instead, and named."""


@dataclass(frozen=True)
class Interval:
    """Where the true mean lies, at :data:`LEVEL`."""

    low: float
    high: float
    method: str
    """``bootstrap`` or ``t``."""


@dataclass(frozen=True)
class Figure:
    """A mean over seeds and images, and how sure it is."""

    mean: float
    seeds: int
    images: int
    over_images: Interval | None
    """None of one image."""
    over_seeds: Interval | None
    """None of one seed."""
    families: int | None = None
    """So many groups of images are independent of each other. None: every image is."""


@dataclass(frozen=True)
class Comparison:
    """``first - second``, and how likely chance alone would give as much."""

    difference: Figure
    p_images: float
    """Two-sided, by flipping the signs of the images' differences: are these models alike?"""
    p_seeds: float | None
    """Two-sided, by Student's t of the seeds' differences: are such trainings alike? None where neither side has several seeds."""


def figure(values: ArrayLike, what: str = "values", families_S: ArrayLike | None = None) -> Figure:
    """Mean and intervals of values [R, S], or [S] of one seed.

    Args:
        families_S: a number for each image, the same for images that are not independent. None: all are.

    Raises:
        UserError: no value, or one that is no finite number; names ``what``, the seed and the image.
    """
    values_RS = _checked(values, what)
    seeds, images = values_RS.shape
    over_images = bootstrap_interval(values_RS.mean(0), families_S)
    return Figure(float(values_RS.mean()), seeds, images, over_images, t_interval(values_RS.mean(1)), _count(families_S))


def compare(first: ArrayLike, second: ArrayLike, what: str = "values", families_S: ArrayLike | None = None) -> Comparison:
    """The paired difference of two sets of values, [R, S] or [S], of the same images.

    Seeds are paired where both sides have as many; a single seed is subtracted from each of the other side's; other numbers of seeds are
    compared unpaired (Welch's t).

    Raises:
        UserError: other images on both sides, or as :func:`figure`.
    """
    first_RS, second_RS = _checked(first, what), _checked(second, what)
    if first_RS.shape[1] != second_RS.shape[1]:
        raise UserError(f"{what}: {first_RS.shape[1]} images on one side and {second_RS.shape[1]} on the other cannot be paired")
    by_image_S = first_RS.mean(0) - second_RS.mean(0)
    counts = len(first_RS), len(second_RS)
    if counts[0] == counts[1] or 1 in counts:
        by_seed_R = (first_RS - second_RS).mean(1)
        over_seeds, p_seeds, seeds = t_interval(by_seed_R), t_test(by_seed_R), len(by_seed_R)
    else:
        over_seeds, p_seeds = _welch(first_RS.mean(1), second_RS.mean(1))
        seeds = min(counts)
    over_images = bootstrap_interval(by_image_S, families_S)
    difference = Figure(float(by_image_S.mean()), seeds, len(by_image_S), over_images, over_seeds, _count(families_S))
    return Comparison(difference, sign_flip_test(_by_family(by_image_S, families_S)[0]), p_seeds)


def bootstrap_interval(values_S: ArrayLike, families_S: ArrayLike | None = None) -> Interval | None:
    """Where the mean of such values lies: BCa bootstrap of the families, or Student's t of fewer than :data:`FEW`; None of one family.

    Equal values have an interval without width: they do not tell how much others would differ.
    """
    values = np.asarray(values_S, dtype=np.float64)
    sums_F, counts_F = _by_family(values, families_S)
    if len(sums_F) < FEW:
        return t_interval(values) if families_S is None else _ratio_interval(sums_F, counts_F)
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        mean = float(values.mean())
        return Interval(mean, mean, "bootstrap")

    def mean_of(sums: Floats, counts: Floats, axis: int) -> Floats:
        means: Floats = sums.sum(axis) / counts.sum(axis)
        return means

    found = _scipy().bootstrap(
        (sums_F, counts_F), mean_of, paired=True, n_resamples=RESAMPLES, batch=100, confidence_level=LEVEL, method="BCa", rng=0
    )
    return Interval(float(found.confidence_interval.low), float(found.confidence_interval.high), "bootstrap")


def _by_family(values_S: Floats, families_S: ArrayLike | None) -> tuple[Floats, Floats]:
    """The sum of the values of each family and the number of its images, [F] both."""
    if families_S is None:
        return values_S, np.ones(len(values_S))
    families = np.asarray(families_S)
    if families.shape != values_S.shape:
        raise ValueError(f"families of shape {families.shape} for {len(values_S)} images")
    _, member_S = np.unique(families, return_inverse=True)
    return np.bincount(member_S, weights=values_S).astype(np.float64), np.bincount(member_S).astype(np.float64)


def _ratio_interval(sums_F: Floats, counts_F: Floats) -> Interval | None:
    """Student's t of a mean over families of several sizes, from the linearised ratio; of single images that is :func:`t_interval`."""
    families = len(sums_F)
    if families < 2:
        return None
    mean = float(sums_F.sum() / counts_F.sum())
    error = float(np.sqrt(families / (families - 1) * np.sum((sums_F - mean * counts_F) ** 2)) / counts_F.sum())
    reach = float(_scipy().t.ppf((1 + LEVEL) / 2, families - 1)) * error
    return Interval(mean - reach, mean + reach, "t")


def _count(families_S: ArrayLike | None) -> int | None:
    return None if families_S is None else len(np.unique(np.asarray(families_S)))


def t_interval(values_R: ArrayLike) -> Interval | None:
    """Where the mean lies that such values are spread around, by Student's t; None of one value."""
    values = np.asarray(values_R, dtype=np.float64)
    if len(values) < 2:
        return None
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    reach = float(_scipy().t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return Interval(mean - reach, mean + reach, "t")


def t_test(differences_R: ArrayLike) -> float | None:
    """Two-sided p of a mean of 0 by Student's t; None of one value. Equal values: 1 if they are 0, else 0."""
    differences = np.asarray(differences_R, dtype=np.float64)
    if len(differences) < 2:
        return None
    error = float(differences.std(ddof=1) / np.sqrt(len(differences)))
    if error == 0:
        return 0.0 if differences[0] else 1.0
    return float(2 * _scipy().t.sf(abs(float(differences.mean())) / error, len(differences) - 1))


def sign_flip_test(differences_S: ArrayLike) -> float:
    """Two-sided p of a mean of 0: the share of the sign flips whose mean is at least as far from 0.

    Exact where there are at most :data:`FLIPS` flips; else (b + 1) / (m + 1) of m random ones (Phipson & Smyth 2010), never 0. The smallest
    that S differences can give is 2 / 2^S.
    """
    differences = np.asarray(differences_S, dtype=np.float64)
    count = len(differences)
    exact = 2**count <= FLIPS
    if exact:
        signs_FS = 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    else:
        signs_FS = 1.0 - 2.0 * np.random.default_rng(0).integers(0, 2, (FLIPS, count), dtype=np.int8)
    sums_F, own = np.abs(signs_FS @ differences), abs(float(differences.sum()))
    as_far = int((sums_F >= own - 1e-12 * float(np.abs(differences).sum())).sum())  # sums of the same numbers, rounded otherwise
    return as_far / len(sums_F) if exact else (as_far + 1) / (len(sums_F) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): with each below alpha taken for real, the chance of any mistake is below alpha."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _welch(first_R: Floats, second_R: Floats) -> tuple[Interval, float]:
    found = _scipy().ttest_ind(first_R, second_R, equal_var=False)
    interval = found.confidence_interval(LEVEL)
    return Interval(float(interval.low), float(interval.high), "t"), float(found.pvalue)


def _checked(values: ArrayLike, what: str) -> Floats:
    values_RS = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if values_RS.ndim != 2 or not values_RS.size:
        raise UserError(f"{what}: no values to take a mean of, [seeds, images] is {list(values_RS.shape)}")
    bad = np.argwhere(~np.isfinite(values_RS))
    if len(bad):
        seed, image = bad[0].tolist()
        raise UserError(
            f"{what}: {len(bad)} of {values_RS.size} values are no finite numbers, the first one ({values_RS[seed, image]}) that of seed "
            f"{seed}, image {image}. A model's weights or the features of its pictures are damaged; leave that model out, or make it again."
        )
    return values_RS


def _scipy() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise UserError("intervals and tests need the package scipy: pip install 'oar_scale[eval]'") from error
    module: ModuleType = stats
    return module
