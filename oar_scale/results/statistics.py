"""How sure is a mean, and is a difference one? Intervals over images and over seeds, paired tests, correction for many comparisons.

Values are [R, S]: of each of R seeds (trainings that differ in their seed alone) and each of S images. Three questions, three answers:

    over images    these models on other images of this kind: bootstrap of the images (BCa, Efron 1987), sign-flip test. Images of one
                   *family* (drawings of one thing, in other styles and skin tones) are alike: families are drawn and flipped as a whole
    over seeds     other trainings like these, on these images: Student's t of the seeds' means; none of a single seed
    over both      train again, and look at other images: Student's t with the variance under clustering by seed and by family
                   (Cameron, Gelbach & Miller 2011), and the critical value of Cochran & Cox (1950): that of Student's t for the seeds and
                   that for the families, weighed by their variances

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
RADEMACHER_TAIL = 3.179
"""A sum of numbers with random signs, of variance 1, is above x with at most so many times the probability of a standard normal number
(Bentkus & Dzindzalieta, Bernoulli 21, 2015: 1 / (4 P(Z > sqrt 2)))."""
FEW = 10
"""Below so many families a bootstrap is too narrow; Student's t is taken instead, and named."""


@dataclass(frozen=True)
class Interval:
    """Where the true mean lies, at :data:`LEVEL`."""

    low: float
    high: float
    method: str
    """``bootstrap``, ``t``, or ``t pooled``, where several arms tell how much seeds differ (:mod:`oar_scale.results.seed_spread`)."""

    @property
    def half(self) -> float:
        """Half its width: what stands after ±."""
        return (self.high - self.low) / 2


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
    over_both: Interval | None = None
    """Over images and seeds together; None of one image, family or seed."""


@dataclass(frozen=True)
class SeedSpread:
    """How much the difference of two arms varies from seed to seed, as several arms tell together."""

    variance: float
    """Of the difference at one seed."""
    freedom: int
    """Degrees of freedom."""
    arms: int
    unstable: tuple[str, ...] = ()
    """The arms that vary more than the others: it does not hold for their differences."""


@dataclass(frozen=True)
class Comparison:
    """``first - second``, and how likely chance alone would give as much."""

    difference: Figure
    p_images: float
    """Two-sided, by flipping the signs of the images' differences: are these models alike?"""
    p_seeds: float | None
    """Two-sided, by Student's t of the seeds' differences: are such trainings alike? None where neither side has several seeds."""
    p_both: float | None = None
    """Two-sided, with the interval over both: would other trainings, on other images, be alike? None where that is None."""
    over_seeds_alone: Interval | None = None
    """Over seeds, as these two arms alone tell; that of ``difference`` is from all arms where their spread is given."""
    seed_freedom: float | None = None
    """Degrees of freedom of the interval over seeds."""


def figure(values: ArrayLike, what: str = "values", families_S: ArrayLike | None = None) -> Figure:
    """Mean and intervals of values [R, S], or [S] of one seed.

    Args:
        families_S: a number for each image, the same for images that are not independent. None: all are.

    Raises:
        UserError: no value, or one that is no finite number; names ``what``, the seed and the image.
    """
    values_RS = _checked(values, what)
    mean, (seeds, images) = float(values_RS.mean()), values_RS.shape
    over_images = bootstrap_interval(values_RS.mean(0), families_S)
    by_seed = _of_mean(values_RS.mean(1))
    both = _over_both(by_seed, values_RS.mean(0), _interaction(values_RS, families_S), families_S)
    return Figure(mean, seeds, images, over_images, _interval(by_seed, mean), _count(families_S), _interval(both, mean))


def compare(
    first: ArrayLike,
    second: ArrayLike,
    what: str = "values",
    families_S: ArrayLike | None = None,
    spread: SeedSpread | None = None,
    paired: bool = True,
) -> Comparison:
    """The paired difference of two sets of values, [R, S] or [S], of the same images.

    Seeds are paired where both sides have as many; a single seed is subtracted from each of the other side's; other numbers of seeds are
    compared unpaired (Welch's t).

    Args:
        spread: how much such differences vary from seed to seed, where other arms tell as well; used where seeds are paired.
        paired: whether seed r of one side has something in common with seed r of the other; as many of others are not paired.

    Raises:
        UserError: other images on both sides, or as :func:`figure`.
    """
    first_RS, second_RS = _checked(first, what), _checked(second, what)
    if first_RS.shape[1] != second_RS.shape[1]:
        raise UserError(f"{what}: {first_RS.shape[1]} images on one side and {second_RS.shape[1]} on the other cannot be paired")
    by_image_S = first_RS.mean(0) - second_RS.mean(0)
    mean, counts = float(by_image_S.mean()), (len(first_RS), len(second_RS))
    if (paired and counts[0] == counts[1]) or 1 in counts:
        differences_RS = first_RS - second_RS
        seeds, alone, interaction = max(counts), _of_mean(differences_RS.mean(1)), _interaction(differences_RS, families_S)
    else:
        seeds, alone = min(counts), _welch(first_RS.mean(1), second_RS.mean(1))
        interaction = _interaction(first_RS, families_S) + _interaction(second_RS, families_S)
    by_seed = alone
    if spread is not None and alone is not None and paired and counts[0] == counts[1]:
        by_seed = _Spread(spread.variance / seeds, spread.freedom, "t pooled")
    both = _over_both(by_seed, by_image_S, interaction, families_S)
    difference = Figure(
        mean,
        seeds,
        len(by_image_S),
        bootstrap_interval(by_image_S, families_S),
        _interval(by_seed, mean),
        _count(families_S),
        _interval(both, mean),
    )
    return Comparison(
        difference,
        sign_flip_test(_by_family(by_image_S, families_S)[0]),
        _p_value(by_seed, mean),
        _p_value(both, mean),
        _interval(alone, mean),
        None if by_seed is None else by_seed.freedom,
    )


def clustered_error(values_S: ArrayLike, families_S: ArrayLike | None = None) -> float | None:
    """The standard error of the mean of values in families; None of one family."""
    spread = _ratio_spread(*_by_family(np.asarray(values_S, dtype=np.float64), families_S))
    return None if spread is None else spread.variance**0.5


def two_way_variance(independent: ArrayLike, over_first: ArrayLike, over_second: ArrayLike) -> Floats:
    """The variance of a mean under clustering in two ways (Cameron, Gelbach & Miller, J. Bus. Econ. Stat. 29, 2011).

    Args:
        independent: what is common to neither; it is in the two others as well, and is counted once.
        over_first, over_second: under clustering in one way.
    """
    once = np.asarray(independent, dtype=np.float64)
    return np.asarray(np.maximum(once, np.asarray(over_first) + np.asarray(over_second) - once))


def bootstrap_interval(values_S: ArrayLike, families_S: ArrayLike | None = None) -> Interval | None:
    """Where the mean of such values lies: BCa bootstrap of the families, or Student's t of fewer than :data:`FEW`; None of one family.

    Equal values, or families of equal means, have an interval without width: they do not tell how much others would differ.
    """
    values = np.asarray(values_S, dtype=np.float64)
    sums_F, counts_F = _by_family(values, families_S)
    if len(sums_F) < FEW:
        spread = _of_mean(values) if families_S is None else _ratio_spread(sums_F, counts_F)
        return _interval(spread, float(values.mean()))
    if np.ptp(sums_F / counts_F) <= 1e-12 * np.abs(values).max():
        mean = float(values.mean())
        return Interval(mean, mean, "bootstrap")

    def mean_of(sums: Floats, counts: Floats, axis: int) -> Floats:
        means: Floats = sums.sum(axis) / counts.sum(axis)
        return means

    found = scipy_stats().bootstrap(
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


def _ratio_spread(sums_F: Floats, counts_F: Floats) -> _Spread | None:
    """Of a mean over families of several sizes, from the linearised ratio; of single images that of their mean. None of one family."""
    families = len(sums_F)
    if families < 2:
        return None
    deviations_F = sums_F - sums_F.sum() / counts_F.sum() * counts_F
    return _Spread(families / (families - 1) * float(np.sum(deviations_F**2)) / float(counts_F.sum()) ** 2, families - 1)


def _interaction(values_RS: Floats, families_S: ArrayLike | None) -> float:
    """The variance of the mean of values [R, S] that is common neither to a seed nor to a family; 0 of one of either."""
    residual_RS = values_RS - values_RS.mean(1, keepdims=True) - values_RS.mean(0) + values_RS.mean()
    sums_RF = np.stack([_by_family(each_S, families_S)[0] for each_S in residual_RS])
    if min(sums_RF.shape) < 2:
        return 0.0
    return float(np.sum(sums_RF**2) / np.prod(np.array(sums_RF.shape) - 1.0) * np.prod(sums_RF.shape)) / values_RS.size**2


def _over_both(by_seed: _Spread | None, by_image_S: Floats, interaction: float, families_S: ArrayLike | None) -> _Spread | None:
    """Over seeds and families together: never less than over one of them.

    The degrees of freedom of the fewer would make it far too wide where images decide (``tests/results/test_statistics.py``), those of
    Welch & Satterthwaite too narrow where seeds do: where 3 seeds are near each other by chance, these are many, and a test at a small
    level errs far more often than it should. With Cochran & Cox's value it errs as often as it says at 0.05, and somewhat more often at
    small levels.
    """
    by_family = _ratio_spread(*_by_family(by_image_S, families_S))
    if by_seed is None or by_family is None:
        return None
    variance = max(float(two_way_variance(interaction, by_seed.variance, by_family.variance)), by_seed.variance, by_family.variance)
    return _Spread(variance, by_seed.freedom, by_seed.method, tuple((each.variance, each.freedom) for each in (by_seed, by_family)))


def _count(families_S: ArrayLike | None) -> int | None:
    return None if families_S is None else len(np.unique(np.asarray(families_S)))


@dataclass(frozen=True)
class _Spread:
    """The variance of a mean, for Student's t."""

    variance: float
    freedom: float
    method: str = "t"
    parts: tuple[tuple[float, float], ...] = ()
    """Of two variances together: each, with its degrees of freedom."""

    def critical(self, tail: float) -> float:
        """So many standard errors a mean is above the true one with this probability: Student's t.

        Of two variances, the mean of their t, each weighed by its variance (Cochran & Cox, Experimental Designs, 1950; Snedecor & Cochran,
        Statistical Methods, 7th ed., 6.11).
        """
        weights, freedoms = np.array(self.parts or [(1.0, self.freedom)]).T
        if not weights.any():  # all that varies is the interaction
            weights = np.ones_like(weights)
        return float(weights @ scipy_stats().t.isf(tail, freedoms) / weights.sum())

    def two_sided(self, errors: float) -> float:
        """The p of so many standard errors: twice the tail for which :meth:`critical` is as many."""
        tails = scipy_stats().t.sf(errors, [freedom for _, freedom in self.parts] or [self.freedom])
        low, high = max(float(min(tails)), 1e-300), float(max(tails))
        if self.critical(low) <= errors:  # also where all are the same
            return 2 * low
        if self.critical(high) >= errors:
            return 2 * high
        from scipy.optimize import brentq

        return 2 * float(np.exp(brentq(lambda tail: self.critical(np.exp(tail)) - errors, np.log(low), np.log(high))))


def _interval(spread: _Spread | None, mean: float) -> Interval | None:
    if spread is None:
        return None
    reach = spread.critical((1 - LEVEL) / 2) * spread.variance**0.5 if spread.variance else 0.0
    return Interval(mean - reach, mean + reach, spread.method)


def _p_value(spread: _Spread | None, mean: float) -> float | None:
    """Two-sided, of a true mean of 0. Without any variance: 1 of 0, else 0."""
    if spread is None:
        return None
    if not spread.variance:
        return 0.0 if mean else 1.0
    return spread.two_sided(abs(mean) / spread.variance**0.5)


def _of_mean(values_R: Floats) -> _Spread | None:
    seeds = len(values_R)
    return _Spread(float(values_R.var(ddof=1)) / seeds, seeds - 1) if seeds > 1 else None


def _welch(first_R: Floats, second_R: Floats) -> _Spread:
    """Of the difference of two independent means, with the degrees of freedom of Welch and Satterthwaite."""
    parts = [(float(each_R.var(ddof=1)) / len(each_R), len(each_R) - 1) for each_R in (first_R, second_R)]
    variance, within = sum(part for part, _ in parts), sum(part**2 / freedom for part, freedom in parts)
    return _Spread(variance, variance**2 / within if within else min(freedom for _, freedom in parts))


def t_interval(values_R: ArrayLike) -> Interval | None:
    """Where the mean lies that such values are spread around, by Student's t; None of one value."""
    values = np.asarray(values_R, dtype=np.float64)
    spread = _of_mean(values)
    return _interval(spread, float(values.mean()))


def t_test(differences_R: ArrayLike) -> float | None:
    """Two-sided p of a mean of 0 by Student's t; None of one value. Equal values: 1 if they are 0, else 0."""
    differences = np.asarray(differences_R, dtype=np.float64)
    spread = _of_mean(differences)
    return _p_value(spread, float(differences.mean()))


def sign_flip_test(differences_S: ArrayLike) -> float:
    """Two-sided p of a mean of 0: the share of the sign flips whose mean is at least as far from 0.

    Exact where there are at most :data:`FLIPS` flips; else (b + 1) / (m + 1) of m random ones (Phipson & Smyth 2010), never 0. Where none
    of them is as far, p may be smaller than m flips can tell: there it is at most the tail of a normal distribution times
    :data:`RADEMACHER_TAIL`, a bound that holds for any differences. The smallest that S differences can give is 2 / 2^S.
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
    if exact:
        return as_far / len(sums_F)
    p = (as_far + 1) / (len(sums_F) + 1)
    return p if as_far else min(p, float(2 * RADEMACHER_TAIL * scipy_stats().norm.sf(own / np.sqrt(np.sum(differences**2)))))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): with each below alpha taken for real, the chance of any mistake is below alpha."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


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


def scipy_stats() -> ModuleType:
    """``scipy.stats``. Raises UserError where scipy is not installed."""
    try:
        from scipy import stats
    except ImportError as error:
        raise UserError("intervals and tests need the package scipy: pip install 'oar_scale[eval]'") from error
    module: ModuleType = stats
    return module
