"""One number an arm, from comparisons of two (Bradley and Terry, 1952; fitted by evalica).

    P(a is preferred to b) = 1 / (1 + exp(s_b - s_a)),     the strengths s of arms that can be compared have mean 0

A tie is half a win for each. One tie is added to every pair of arms that was compared, so that an arm which won all its comparisons has a
finite strength; of two arms, s_a - s_b is then the empirical logit log((w + 1/2) / (l + 1/2)) (Anscombe, 1956). Intervals are as in
``intervals``: a variance under clustering by rater and by caption, each by bootstrap, and Student's t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import evalica
import numpy as np
import pandas as pd
from scipy import stats

from oar_scale.preference.intervals import CONFIDENCE, Interval, Resamples, answer_variance, freedom, two_way
from oar_scale.preference.votes import Floats, Votes

_TOLERANCE, _MOST_STEPS = 1e-9, 100_000
_OUTCOMES = (evalica.Winner.X, evalica.Winner.Draw, evalica.Winner.Y)

ArmPairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Strength:
    """Of one arm, in natural logarithms of odds."""

    arm: str
    answers: int
    strength: Interval


@dataclass(frozen=True)
class Group:
    """Arms that were compared with one another, be it through others. Strengths of two groups cannot be compared."""

    strengths: tuple[Strength, ...]
    """The strongest first."""


def strength_groups(votes: Votes, over_raters: Resamples | None = None, over_captions: Resamples | None = None) -> list[Group]:
    """The strengths of all arms that were compared.

    Args:
        over_raters, over_captions: bootstrap samples; without them, of one rater, intervals are as if answers were independent.
    """
    counts_P3 = votes.counts()
    found = []
    for arms in connected(votes.arm_pairs, counts_P3.sum(axis=1) > 0, len(votes.arms)):
        inside = [number for number, pair in enumerate(votes.arm_pairs) if pair[0] in arms and counts_P3[number].sum()]
        pairs = [(arms.index(votes.arm_pairs[number][0]), arms.index(votes.arm_pairs[number][1])) for number in inside]
        fitted = fit(len(arms), pairs, counts_P3[inside])
        variance = independent_variance(fitted, pairs, counts_P3[inside])
        quantile = stats.norm.ppf(0.5 + CONFIDENCE / 2)
        if over_raters is not None and over_captions is not None:
            groups = _groups_of(votes, inside)
            raters, captions = (_spread(len(arms), pairs, each.counts_BP3[:, inside]) for each in (over_raters, over_captions))
            variance = two_way(variance, raters, captions, groups)
            quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, freedom(groups))
        half = quantile * np.sqrt(variance)
        answers = [int(sum(counts_P3[number].sum() for number in inside if arm in votes.arm_pairs[number])) for arm in arms]
        strengths = [
            Strength(votes.arms[arm], answers[at], Interval(float(fitted[at]), float(fitted[at] - half[at]), float(fitted[at] + half[at])))
            for at, arm in enumerate(arms)
        ]
        found.append(Group(tuple(sorted(strengths, key=lambda each: -each.strength.value))))
    return found


def fit(arms: int, pairs: ArmPairs, counts_P3: Floats) -> Floats:
    """The strengths that maximise the likelihood of the answers and of one tie a pair.

    Args:
        pairs: of arms, which connect all of them.
        counts_P3: answers by pair and outcome.
    """
    weights = counts_P3 + np.array([0.0, 1.0, 0.0])
    first, second = ([pair[side] for pair in pairs for _ in _OUTCOMES] for side in (0, 1))
    result = evalica.bradley_terry(
        first, second, _OUTCOMES * len(pairs), index=pd.RangeIndex(arms), weights=weights.ravel(), tolerance=_TOLERANCE, limit=_MOST_STEPS
    )
    strengths = np.log(result.scores.sort_index().to_numpy())
    return np.asarray(strengths - strengths.mean())


def independent_variance(strengths: Floats, pairs: ArmPairs, counts_P3: Floats) -> Floats:
    """The variance of each strength as if answers were independent: H^- B H^-, H the curvature of the likelihood, B that of its slope."""
    curvature, slopes = (np.zeros((len(strengths), len(strengths))) for _ in range(2))
    for (first, second), counts_3 in zip(pairs, counts_P3, strict=True):
        contrast = np.zeros(len(strengths))
        contrast[first], contrast[second] = 1, -1
        chance = 1 / (1 + np.exp(strengths[second] - strengths[first]))
        outer = np.outer(contrast, contrast)
        curvature += (counts_3.sum() + 1) * chance * (1 - chance) * outer
        slopes += counts_3.sum() * answer_variance(counts_3, added=0.5)[0] * outer  # as the fit has half a win more for each
    inverse = np.linalg.pinv(curvature, hermitian=True)
    return np.asarray(np.diag(inverse @ slopes @ inverse))


def connected(arm_pairs: ArmPairs, compared_P: Sequence[bool] | np.ndarray, arms: int) -> list[list[int]]:
    """Arms in groups within which comparisons lead from each to each; arms that were not compared at all are in none."""
    group = list(range(arms))
    for (first, second), compared in zip(arm_pairs, compared_P, strict=True):
        if compared:
            group = [group[first] if each == group[second] else each for each in group]
    groups = [[arm for arm in range(arms) if group[arm] == name] for name in sorted(set(group))]
    return [each for each in groups if len(each) > 1]


def _spread(arms: int, pairs: ArmPairs, counts_BP3: Floats) -> Floats:
    return np.asarray(np.var([fit(arms, pairs, counts_P3) for counts_P3 in counts_BP3], axis=0))


def _groups_of(votes: Votes, pairs: list[int]) -> tuple[int, int]:
    """How many raters have answered, and captions were asked about, for these pairs of arms."""
    mask = np.isin(votes.pair_A, pairs)
    return len(np.unique(votes.rater_A[mask])), len(np.unique(votes.caption_A[mask]))
