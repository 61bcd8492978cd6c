"""How sure is a share of answers, when answers of one rater, and answers about one caption, are alike?

    variance      V = max(A, R + C - A)     R, C: bootstrap over raters and over captions;  A: as if all answers were independent
    interval      Clopper-Pearson with n* answers, n* = m (1 - m) / V, less where raters or captions are few

R + C - A is the variance under clustering in two ways (Cameron, Gelbach and Miller, J. Bus. Econ. Stat. 29, 2011): what is common to a
rater and what is common to a caption are both in it, once. The interval is that of Korn and Graubard (Surv. Methodol. 24, 1998), which
stays honest where all answers are the same, as no normal interval does. Where there is one rater only, R is not known: the interval is
about other captions for that rater.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from oar_scale.preference.votes import LOSS, SCORE, WIN, Floats, Votes
from oar_scale.results.statistics import two_way_variance

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A value, and where it may lie with ``CONFIDENCE``."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairFigures:
    """Two arms against each other; shares are those of ``first``."""

    first: str
    second: str
    wins: int
    ties: int
    losses: int
    raters: int
    captions: int
    rate: Interval
    """Share of the answers, a tie counting half for each arm; other raters and other captions are in its interval."""
    decided: Interval | None
    """Share of the answers that are no ties, with Clopper and Pearson's interval, as if answers were independent."""


@dataclass(frozen=True)
class Resamples:
    """Counts of bootstrap samples, and of how many groups they were made."""

    counts_BP3: Floats
    groups: int


def resample(groups_GP3: Floats, rng: np.random.Generator) -> Resamples:
    """Draw as many groups as there are, with replacement, and add up their counts; ``RESAMPLES`` times."""
    groups = len(groups_GP3)
    drawn = rng.multinomial(groups, np.full(groups, 1 / groups), RESAMPLES).astype(np.float64)
    return Resamples(np.tensordot(drawn, groups_GP3, 1), groups)


def two_way(independent: Floats, over_raters: Floats, over_captions: Floats, groups: tuple[int, int]) -> Floats:
    """The variance under clustering by rater and by caption.

    Args:
        independent: as if answers were independent.
        over_raters, over_captions: of bootstrap samples, which of G groups are too small by (G - 1) / G.
        groups: raters and captions.
    """
    known = [variance * count / (count - 1) for variance, count in zip((over_raters, over_captions), groups, strict=True) if count > 1]
    if len(known) == 2:
        return two_way_variance(independent, *known)
    return np.maximum(independent, *known) if known else independent


def freedom(groups: tuple[int, int]) -> float:
    """Degrees of freedom of such a variance: the fewer of raters and captions, less one; of those that there are several of."""
    return min((count - 1 for count in groups if count > 1), default=1)


def pair_figures(votes: Votes, over_raters: Resamples, over_captions: Resamples) -> list[PairFigures]:
    """Each pair of arms that has an answer."""
    found, counts_P3 = [], votes.counts()
    for number, (first, second) in enumerate(votes.arm_pairs):
        wins, ties, losses = counts_P3[number]
        if wins + ties + losses:
            mask = votes.pair_A == number
            groups = len(np.unique(votes.rater_A[mask])), len(np.unique(votes.caption_A[mask]))
            raters, captions = (_variance_of_rate(resamples.counts_BP3[:, number]) for resamples in (over_raters, over_captions))
            rate = share_interval(counts_P3[number], raters, captions, groups)
            names = votes.arms[first], votes.arms[second]
            found.append(
                PairFigures(*names, int(wins), int(ties), int(losses), *groups, rate, clopper_pearson(int(wins), int(wins + losses)))
            )
    return found


def share_interval(counts_3: Floats, over_raters: float, over_captions: float, groups: tuple[int, int]) -> Interval:
    """The share of the first arm, ties counting half, with its interval (see the module).

    Args:
        counts_3: wins, ties, losses; at least one answer.
        over_raters, over_captions: variance of the share over bootstrap samples.
        groups: raters and captions.
    """
    answers, share = counts_3.sum(), float(counts_3 @ SCORE / counts_3.sum())
    spread, middle = answer_variance(counts_3)
    independent = spread / answers
    variance = float(two_way(np.array(independent), np.array(over_raters), np.array(over_captions), groups))
    few = stats.t.ppf(0.5 + CONFIDENCE / 2, max(1.0, answers - 1)) / stats.t.ppf(0.5 + CONFIDENCE / 2, freedom(groups))
    effective = middle * (1 - middle) / variance * min(1.0, few) ** 2
    return Interval(share, *_beta_bounds(share * effective, effective))


def answer_variance(counts_3: Floats, added: float = 1.0) -> tuple[float, float]:
    """Variance and mean of one answer's score. ``added`` wins and losses more: answers that are all the same would have no variance."""
    smoothed = counts_3.astype(np.float64)
    smoothed[[WIN, LOSS]] += added
    middle = float(smoothed @ SCORE / smoothed.sum())
    return float(smoothed @ (SCORE - middle) ** 2 / smoothed.sum()), middle


def clopper_pearson(successes: int, trials: int) -> Interval | None:
    """A share of independent trials with its exact interval. None without a trial."""
    if not trials:
        return None
    return Interval(successes / trials, *_beta_bounds(successes, trials))


def _beta_bounds(successes: float, trials: float) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low = float(stats.beta.ppf(tail, successes, trials - successes + 1)) if successes > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def _variance_of_rate(counts_B3: Floats) -> float:
    totals = counts_B3.sum(axis=1)
    kept = totals > 0
    return float(np.var(counts_B3[kept] @ SCORE / totals[kept]))
