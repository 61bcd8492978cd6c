"""One number an arm, from comparisons of two (Bradley and Terry, 1952; fitted by evalica).

    P(a is preferred to b) = 1 / (1 + exp(s_b - s_a)),     the strengths s of arms that can be compared have mean 0

A tie is half a win for each. One tie is added to every pair of arms that was compared, so that an arm which won all its comparisons has a
finite strength; of two arms, s_a - s_b is then the empirical logit log((w + 1/2) / (l + 1/2)) (Anscombe, 1956). Intervals are as in
``intervals``: a variance under clustering by rater and by caption, each by bootstrap, and Student's t. Whether one arm is stronger than
another is read off their difference, not off two intervals: what the arms share cancels in it. p-values are corrected for their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import evalica
import numpy as np
import pandas as pd
from scipy import stats

from oar_scale.preference.intervals import CONFIDENCE, Interval, Resamples, answer_variance, freedom, two_way
from oar_scale.preference.votes import Floats, Votes
from oar_scale.results.statistics import holm

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
class Difference:
    """How much stronger ``first`` is than ``second``, of a group of more than two arms."""

    first: str
    second: str
    difference: Interval
    p_value: float
    """Two-sided, Student's t: are they equally strong?"""
    p_holm: float
    """Corrected for all differences of the group (Holm 1979)."""


@dataclass(frozen=True)
class Group:
    """Arms that were compared with one another, be it through others. Strengths of two groups cannot be compared."""

    strengths: tuple[Strength, ...]
    """The strongest first."""
    differences: tuple[Difference, ...] = ()
    """Of all pairs of arms, where there are more than two; the stronger one first."""


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
        contrasts_QA = np.vstack([np.eye(len(arms)), *_contrasts(fitted)])
        covariance_AA = independent_covariance(fitted, pairs, counts_P3[inside])
        variance_Q, degrees = np.einsum("qa,ab,qb->q", contrasts_QA, covariance_AA, contrasts_QA), np.inf
        if over_raters is not None and over_captions is not None:
            groups = _groups_of(votes, inside)
            raters_Q, captions_Q = (_spread(contrasts_QA, pairs, each.counts_BP3[:, inside]) for each in (over_raters, over_captions))
            variance_Q, degrees = two_way(variance_Q, raters_Q, captions_Q, groups), freedom(groups)
        error_Q = np.sqrt(variance_Q)
        values_Q, half_Q = contrasts_QA @ fitted, stats.t.ppf(0.5 + CONFIDENCE / 2, degrees) * error_Q
        intervals = [Interval(float(value), float(value - half), float(value + half)) for value, half in zip(values_Q, half_Q, strict=True)]
        answers = [int(sum(counts_P3[number].sum() for number in inside if arm in votes.arm_pairs[number])) for arm in arms]
        strengths = [Strength(votes.arms[arm], answers[at], intervals[at]) for at, arm in enumerate(arms)]
        differences: tuple[Difference, ...] = ()
        if len(arms) > 2 and over_raters is not None:
            p_values = 2 * stats.t.sf(np.abs(values_Q / error_Q)[len(arms) :], degrees)
            differences = _differences([votes.arms[arm] for arm in arms], contrasts_QA[len(arms) :], intervals[len(arms) :], p_values)
        found.append(Group(tuple(sorted(strengths, key=lambda each: -each.strength.value)), differences))
    return found


def _contrasts(strengths_A: Floats) -> list[Floats]:
    """For each pair of arms the vector whose product with the strengths is their difference: from the strongest on, the stronger first."""
    order, identity_AA = np.argsort(-strengths_A, kind="stable"), np.eye(len(strengths_A))
    return [identity_AA[first] - identity_AA[second] for first, second in combinations(order, 2)]


def _differences(arms: list[str], contrasts_QA: Floats, intervals: list[Interval], p_values: Floats) -> tuple[Difference, ...]:
    corrected = holm(p_values.tolist())
    return tuple(
        Difference(arms[int(contrast.argmax())], arms[int(contrast.argmin())], interval, float(p_value), p_holm)
        for contrast, interval, p_value, p_holm in zip(contrasts_QA, intervals, p_values, corrected, strict=True)
    )


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


def independent_covariance(strengths: Floats, pairs: ArmPairs, counts_P3: Floats) -> Floats:
    """The covariance of the strengths as if answers were independent: H^- B H^-, H the curvature of the likelihood, B that of its slope."""
    curvature, slopes = (np.zeros((len(strengths), len(strengths))) for _ in range(2))
    for (first, second), counts_3 in zip(pairs, counts_P3, strict=True):
        contrast = np.zeros(len(strengths))
        contrast[first], contrast[second] = 1, -1
        chance = 1 / (1 + np.exp(strengths[second] - strengths[first]))
        outer = np.outer(contrast, contrast)
        curvature += (counts_3.sum() + 1) * chance * (1 - chance) * outer
        slopes += counts_3.sum() * answer_variance(counts_3, added=0.5)[0] * outer  # as the fit has half a win more for each
    inverse = np.linalg.pinv(curvature, hermitian=True)
    return np.asarray(inverse @ slopes @ inverse)


def connected(arm_pairs: ArmPairs, compared_P: Sequence[bool] | np.ndarray, arms: int) -> list[list[int]]:
    """Arms in groups within which comparisons lead from each to each; arms that were not compared at all are in none."""
    group = list(range(arms))
    for (first, second), compared in zip(arm_pairs, compared_P, strict=True):
        if compared:
            group = [group[first] if each == group[second] else each for each in group]
    groups = [[arm for arm in range(arms) if group[arm] == name] for name in sorted(set(group))]
    return [each for each in groups if len(each) > 1]


def _spread(contrasts_QA: Floats, pairs: ArmPairs, counts_BP3: Floats) -> Floats:
    """The variance of each contrast of the strengths over bootstrap samples, [Q]."""
    fits_BA = np.array([fit(contrasts_QA.shape[1], pairs, counts_P3) for counts_P3 in counts_BP3])
    return np.asarray(np.var(fits_BA @ contrasts_QA.T, axis=0))


def _groups_of(votes: Votes, pairs: list[int]) -> tuple[int, int]:
    """How many raters have answered, and captions were asked about, for these pairs of arms."""
    mask = np.isin(votes.pair_A, pairs)
    return len(np.unique(votes.rater_A[mask])), len(np.unique(votes.caption_A[mask]))
