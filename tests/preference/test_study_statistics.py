"""The figures of a study against other ways to compute them, and against raters whose preference is known."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import binomtest
from simulated import a_study, answers_of

from oar_scale.preference import intervals
from oar_scale.preference.attention import THRESHOLD, attentive, chance, limit, needed
from oar_scale.preference.bradley_terry import connected, fit, independent_covariance, strength_groups
from oar_scale.preference.build import CHECKS
from oar_scale.preference.intervals import Interval, clopper_pearson, pair_figures, resample, share_interval
from oar_scale.preference.results import _agreement
from oar_scale.preference.study import Comparison, Study
from oar_scale.preference.votes import Floats, Votes, votes_of

COUNTS = np.array([[40, 5, 20], [30, 3, 10], [10, 1, 12]], np.float64)
PAIRS = [(0, 1), (0, 2), (1, 2)]


def most_likely(arms: int, pairs: list[tuple[int, int]], counts_P3: Floats) -> Floats:
    """The strengths, by a general optimiser."""

    def loss(free: Floats) -> float:
        strengths = np.append(free, 0.0)
        total = 0.0
        for (first, second), (wins, ties, losses) in zip(pairs, counts_P3, strict=True):
            of_first = wins + (ties + 1) / 2  # one tie a pair is added
            of_second = losses + (ties + 1) / 2
            total += of_first * np.log1p(np.exp(strengths[second] - strengths[first]))
            total += of_second * np.log1p(np.exp(strengths[first] - strengths[second]))
        return total

    best = np.append(minimize(loss, np.zeros(arms - 1), method="BFGS", options={"gtol": 1e-8}).x, 0.0)
    return np.asarray(best - best.mean())


@pytest.mark.parametrize(
    ("arms", "pairs", "counts"),
    [
        (3, PAIRS, COUNTS.tolist()),
        (3, PAIRS, [[40, 0, 0], [30, 0, 0], [10, 0, 0]]),  # the first wins all, the last none
        (4, [(0, 1), (1, 2), (2, 3)], [[3, 1, 0], [0, 0, 9], [2, 7, 2]]),  # a chain
        (2, [(0, 1)], [[0, 12, 0]]),
    ],
    ids=["three", "wins alone", "chain", "ties alone"],
)
def test_strengths_maximise_the_likelihood(arms: int, pairs: list[tuple[int, int]], counts: list[list[float]]) -> None:
    counts_P3 = np.array(counts, np.float64)
    np.testing.assert_allclose(fit(arms, pairs, counts_P3), most_likely(arms, pairs, counts_P3), atol=2e-5)


def test_two_arms_have_the_empirical_logit() -> None:
    for wins, ties, losses in ((7, 0, 3), (10, 0, 0), (4, 4, 1), (0, 5, 0)):
        strengths = fit(2, [(0, 1)], np.array([[wins, ties, losses]], np.float64))
        expected = np.log((wins + ties / 2 + 0.5) / (losses + ties / 2 + 0.5))
        assert strengths[0] - strengths[1] == pytest.approx(expected, abs=1e-6)


def test_the_variance_of_strengths_is_what_new_answers_show() -> None:
    """Of answers that are independent: drawn again 300 times."""
    fitted = fit(3, PAIRS, COUNTS)
    rng = np.random.default_rng(0)
    again = [fit(3, PAIRS, np.array([rng.multinomial(int(row.sum()), row / row.sum()) for row in COUNTS], np.float64)) for _ in range(300)]
    np.testing.assert_allclose(np.sqrt(np.diag(independent_covariance(fitted, PAIRS, COUNTS))), np.std(again, axis=0), rtol=0.15)


def test_differences_of_strengths_are_honest_and_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms are equally good, and raters differ: their difference is rarely taken for one. Holm's correction by its definition."""
    monkeypatch.setattr(intervals, "RESAMPLES", 60)
    study, worth, found = a_study(arms=3, captions=30, checks=0), [0.6, 0.0, 0.0], []
    for trial in range(16):
        rng = np.random.default_rng([trial, 11])
        tastes = rng.normal(0, 0.8, (8, 3))  # raters differ in what an arm is worth to them

        def value(rater: int, pair: Comparison, tastes: Floats = tastes, rng: np.random.Generator = rng) -> float:
            assert pair.arms is not None
            first, second = (worth[arm] + tastes[rater, arm] for arm in pair.arms)
            return float(rng.random() < 1 / (1 + np.exp(second - first)))

        votes = votes_of(study, answers_of(study, 8, 30, value, trial))
        (group,) = strength_groups(votes, resample(votes.by_rater(), rng), resample(votes.by_caption(), rng))
        assert len(group.differences) == 3
        strengths = {each.arm: each.strength.value for each in group.strengths}
        for each in group.differences:
            assert each.difference.value == pytest.approx(strengths[each.first] - strengths[each.second]) and each.difference.value >= 0
            assert (each.difference.low > 0) == (each.p_value < 0.05)
        ordered = sorted(group.differences, key=lambda each: each.p_value)
        expected = np.maximum.accumulate([min(1.0, (3 - rank) * each.p_value) for rank, each in enumerate(ordered)])
        assert [each.p_holm for each in ordered] == pytest.approx(expected)
        found += [(each, strengths) for each in group.differences if {each.first, each.second} == {"arm B", "arm C"}]
    assert np.mean([each.difference.low <= 0 for each, _ in found]) >= 0.85  # these two are equally good
    assert np.mean([each.p_holm < 0.05 for each, _ in found]) <= 0.12


def test_two_arms_have_one_difference_which_their_strengths_say() -> None:
    study = a_study(checks=0)
    votes = votes_of(study, answers_of(study, 5, 10, lambda rater, pair: float(pair.item % 3 > 0)))
    rng = np.random.default_rng(0)
    (group,) = strength_groups(votes, resample(votes.by_rater(), rng), resample(votes.by_caption(), rng))
    assert group.differences == ()


@given(checks=st.integers(0, 20), threshold=st.floats(0, 1))
def test_a_random_clicker_counts_no_more_often_than_is_said(checks: int, threshold: float) -> None:
    """However many of a study's checks that one answers: by enumeration of all outcomes."""
    for answered in range(checks + 1):
        ways = [comb(answered, passed) for passed in range(answered + 1)]
        counted = sum(ways[passed] for passed in range(answered + 1) if attentive(passed, answered, checks, threshold))
        assert counted / 2**answered <= limit(checks, threshold) + 1e-9
    assert attentive(checks, checks, checks, threshold)


def test_by_default_a_random_clicker_counts_in_less_than_two_of_a_hundred() -> None:
    assert (needed(CHECKS, THRESHOLD), limit(CHECKS, THRESHOLD)) == (9, 0.02)
    assert chance(9, 10) == pytest.approx(11 / 1024)
    assert [attentive(passed, CHECKS, CHECKS, THRESHOLD) for passed in (8, 9, 10)] == [False, True, True]
    assert [attentive(answered, answered, CHECKS, THRESHOLD) for answered in (0, 1, 5, 6)] == [False, False, False, True]
    assert [needed(checks, THRESHOLD) for checks in (6, 7, 8, 9)] == [6, 7, 8, 8]  # by the threshold alone 7 and 8 would ask for 6 and 7
    assert [limit(checks, THRESHOLD) for checks in (6, 7, 8, 9)] == [0.02] * 4
    assert attentive(0, 0, 0, THRESHOLD)  # a study without checks leaves nobody out


@given(trials=st.integers(1, 400), data=st.data())
def test_shares_of_independent_answers_have_the_exact_interval(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    bounds = binomtest(successes, trials).proportion_ci(0.95, "exact")
    found = clopper_pearson(successes, trials)
    assert found is not None and (found.low, found.high) == pytest.approx((bounds.low, bounds.high), abs=1e-9)


def test_with_independent_answers_the_interval_is_nearly_exact() -> None:
    """Many raters, many captions, and resamples that show no clusters: what Clopper and Pearson say."""
    found = share_interval(np.array([64.0, 0.0, 36.0]), 0.64 * 0.36 / 100, 0.64 * 0.36 / 100, (100, 100))
    bounds = binomtest(64, 100).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), abs=0.01)


@settings(max_examples=200)
@given(
    counts=st.tuples(*[st.integers(0, 50)] * 3).filter(any),
    spread=st.tuples(*[st.floats(0, 0.25)] * 2),
    groups=st.tuples(st.integers(1, 30), st.integers(1, 60)),
)
def test_an_interval_holds_its_share(counts: tuple[int, int, int], spread: tuple[float, float], groups: tuple[int, int]) -> None:
    """Also of one answer, one rater, all wins, all ties."""
    found = share_interval(np.array(counts, np.float64), *spread, groups)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.01
    mirrored = share_interval(np.array(counts[::-1], np.float64), *spread, groups)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-6)


def rate_of(votes: Votes, seed: int) -> Interval:
    rng = np.random.default_rng(seed)
    (figures,) = pair_figures(votes, resample(votes.by_rater(), rng), resample(votes.by_caption(), rng))
    return figures.rate


def simulated_rates(study: Study, share: float, of_raters: float, of_captions: float, trials: int = 120) -> list[tuple[Interval, Interval]]:
    """Intervals of studies with 12 raters of 30 answers: that of the study, and one as if answers were independent.

    Args:
        of_raters, of_captions: how much raters, and captions, differ in the probability that arm A is preferred (standard deviation).
    """
    found = []
    for trial in range(trials):
        rng = np.random.default_rng([trial, 7])
        raters = rng.normal(0, of_raters, 12)
        captions = rng.normal(0, of_captions, 60)

        def value(
            rater: int, pair: Comparison, raters: Floats = raters, captions: Floats = captions, rng: np.random.Generator = rng
        ) -> float:
            return float(rng.random() < share + raters[rater] + captions[pair.item])

        votes = votes_of(study, answers_of(study, 12, 30, value, trial))
        wins = int(votes.counts()[0, 0])
        naive = clopper_pearson(wins, len(votes))
        assert naive is not None
        found.append((rate_of(votes, trial), naive))
    return found


def covered(intervals: list[Interval], share: float) -> float:
    return float(np.mean([each.low <= share <= each.high for each in intervals]))


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 200)


@pytest.fixture(scope="module")
def study() -> Study:
    return a_study(checks=0)


def test_raters_who_answer_at_random_give_an_honest_interval(study: Study) -> None:
    """It holds 50 % in at least 95 of 100 studies, less what chance does to 120 of them."""
    rates = [rate for rate, _ in simulated_rates(study, 0.5, 0, 0)]
    assert covered(rates, 0.5) >= 0.92
    assert np.mean([each.high - each.low for each in rates]) < 0.16  # and is not just wide: Clopper and Pearson's has 0.11


def test_a_preference_of_64_percent_is_found(study: Study) -> None:
    rates = [rate for rate, _ in simulated_rates(study, 0.64, 0, 0)]
    assert covered(rates, 0.64) >= 0.92 and covered(rates, 0.5) <= 0.05
    assert np.mean([each.value for each in rates]) == pytest.approx(0.64, abs=0.01)


def test_raters_and_captions_that_differ_widen_the_interval(study: Study) -> None:
    """Taken as independent, the same answers would promise far too much."""
    both = simulated_rates(study, 0.5, 0.15, 0.25)
    assert covered([rate for rate, _ in both], 0.5) >= 0.92
    assert covered([naive for _, naive in both], 0.5) < 0.85


def test_captions_count_also_where_all_raters_see_the_same(study: Study) -> None:
    """Ten captions that all raters answer alike are ten captions, however many raters there are."""
    few = a_study(captions=10, checks=0)
    votes = votes_of(few, answers_of(few, 40, 10, lambda rater, pair: float(pair.item < 7)))
    found = rate_of(votes, 0)
    assert found.value == 0.7 and found.low < 0.5 < found.high


def test_agreement_is_that_of_its_definition() -> None:
    """Krippendorff's alpha by a sum over all pairs of answers, as he defines it."""
    study = a_study(captions=12, checks=0)
    rng = np.random.default_rng(3)
    votes = votes_of(
        study, answers_of(study, 6, 8, lambda rater, pair: rng.choice([0.0, 0.5, 1.0], p=[0.2, 0.2, 0.6]) if pair.item % 2 else 1.0)
    )
    units = [votes.outcome_A[votes.comparison_A == unit] for unit in np.unique(votes.comparison_A)]
    units = [unit for unit in units if len(unit) > 1]
    pooled = np.concatenate(units)
    observed = sum(2 * sum(a != b for a, b in combinations(unit, 2)) / (len(unit) - 1) for unit in units) / len(pooled)
    expected = 2 * sum(a != b for a, b in combinations(pooled, 2)) / (len(pooled) * (len(pooled) - 1))
    same = [a == b for unit in units for a, b in combinations(unit, 2)]
    found = _agreement(votes, 0)
    assert found is not None and found.alpha is not None
    assert found.alpha.value == pytest.approx(1 - observed / expected)
    assert found.same == pytest.approx(np.mean(same)) and found.comparisons == len(units)
    assert found.alpha.low <= found.alpha.value <= found.alpha.high


def test_arms_are_compared_within_what_answers_connect() -> None:
    pairs = list(combinations(range(5), 2))
    assert connected(pairs, [pair in ((0, 3), (1, 2)) for pair in pairs], 5) == [[0, 3], [1, 2]]
    assert connected(pairs, [pair in ((0, 3), (1, 2), (2, 3)) for pair in pairs], 5) == [[0, 1, 2, 3]]
    assert connected(pairs, [False] * 10, 5) == []
