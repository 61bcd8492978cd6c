"""Intervals, tests and corrections against scipy, against sums over all sign flips, and against what they promise."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from oar_scale.errors import UserError
from oar_scale.results.statistics import (
    FEW,
    bootstrap_interval,
    compare,
    figure,
    holm,
    sign_flip_test,
    t_interval,
    t_test,
)

finite = st.floats(-100, 100, allow_nan=False)


@given(st.lists(finite, min_size=2, max_size=9))
def test_few_values_have_students_interval_and_test(values: list[float]) -> None:
    interval = t_interval(values)
    error = stats.sem(values)
    assert interval is not None and bootstrap_interval(values) == interval
    if error > 1e-9:
        assert (interval.low, interval.high) == pytest.approx(stats.t.interval(0.95, len(values) - 1, np.mean(values), error))
        assert t_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=1e-12)


def test_bootstrap_interval_is_scipys_and_follows_skewed_values() -> None:
    values = np.random.default_rng(1).exponential(size=40)
    interval = bootstrap_interval(values)
    assert interval is not None and interval.method == "bootstrap"
    other = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=7).confidence_interval
    assert (interval.low, interval.high) == pytest.approx((other.low, other.high), abs=0.04)
    assert interval.high - values.mean() > values.mean() - interval.low


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(3.0, 1.0, 30)) for _ in range(60)]
    held = sum(each is not None and each.low <= 3.0 <= each.high for each in intervals)
    assert held >= stats.binom.ppf(0.001, 60, 0.92)


@given(st.lists(finite, min_size=1, max_size=8))
def test_sign_flips_of_few_differences_are_all_tried(differences: list[float]) -> None:
    means = [abs(np.dot(signs, differences)) for signs in product((1, -1), repeat=len(differences))]
    slack = 1e-9 * (1 + np.abs(differences).sum())
    share = [np.mean([mean >= abs(sum(differences)) + off for mean in means]) for off in (slack, -slack)]
    assert share[0] <= sign_flip_test(differences) <= share[1]


def test_random_sign_flips_agree_with_scipys_permutation_test() -> None:
    differences = np.random.default_rng(3).normal(0.25, 1.0, 60)
    other = stats.permutation_test(
        (differences, np.zeros(60)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=9999, rng=5
    )
    assert sign_flip_test(differences) == pytest.approx(other.pvalue, abs=0.02)


@pytest.mark.parametrize("count", [20, 40, 200])
def test_where_no_flip_reaches_p_is_a_bound_of_the_exact_one(count: int) -> None:
    """Equal differences: the sum of their signs is as far in the two ends of a binomial distribution. Below what 9,999 flips can tell."""
    differences = np.ones(count)
    differences[: count // 20] = -1
    exact = 2 * stats.binom.cdf(count // 20, count, 0.5)
    assert exact <= sign_flip_test(differences) <= min(1e-4, exact**0.75), "never below, and not far above"
    assert sign_flip_test(differences) * 1000 < 0.05 or count == 20, "1,000 differences may be corrected for"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_its_steps_reject(p_values: list[float]) -> None:
    """At every level: walking up from the smallest, reject while p <= level / (number left)."""
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set[int]()
        for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
            if (len(p_values) - rank) * p_values[index] > level:
                break
            rejected.add(index)
        assert rejected == {index for index, p in enumerate(corrected) if p <= level}
    assert all(p <= own or own == pytest.approx(p) for p, own in zip(p_values, corrected, strict=True))


def test_one_seed_has_no_interval_over_seeds() -> None:
    values = np.random.default_rng(0).normal(size=(1, 20))
    found = figure(values)
    assert (found.seeds, found.images, found.over_seeds) == (1, 20, None)
    assert compare(values, values + 1).p_seeds is None
    assert figure([[1.0]]).over_images is None, "nor has one image one over images"


def test_three_images_give_a_wide_interval_that_is_named() -> None:
    values = [1.0, 2.0, 4.0]
    interval = figure(values).over_images
    assert interval is not None and interval.method == "t"
    assert interval.high - interval.low > 2 * (max(values) - min(values))
    assert compare(values, [0.0, 0.0, 0.0]).p_images == 0.25, "the smallest that three differences can give"


@pytest.mark.parametrize("images", [3, 3 * FEW])
def test_identical_values_show_no_difference(images: int) -> None:
    values = np.full((2, images), 0.7)
    found = compare(values, values)
    assert found.difference.mean == 0 and found.p_images == 1 and found.p_seeds == 1
    interval = figure(values).over_images
    assert interval is not None and interval.low == pytest.approx(0.7) and interval.high == pytest.approx(0.7)


def test_differences_are_paired_by_image_and_by_seed() -> None:
    rng = np.random.default_rng(4)
    hard_S, lucky_R1 = rng.normal(0, 5, 40), rng.normal(0, 3, (3, 1))
    second = hard_S + lucky_R1 + rng.normal(0, 0.1, (3, 40))
    first = hard_S + lucky_R1 + 0.2 + rng.normal(0, 0.1, (3, 40))
    found = compare(first, second)
    assert found.p_seeds == pytest.approx(stats.ttest_rel(first.mean(1), second.mean(1)).pvalue)
    assert found.p_images < 0.001 and found.p_seeds is not None and found.p_seeds < 0.05
    over_seeds = found.difference.over_seeds
    assert over_seeds is not None and over_seeds.low <= 0.2 <= over_seeds.high
    swapped = compare(second, first)
    assert swapped.difference.mean == pytest.approx(-found.difference.mean) and swapped.p_images == found.p_images


def test_other_numbers_of_seeds_are_not_paired() -> None:
    rng = np.random.default_rng(5)
    first, second, alone = rng.normal(1, 1, (4, 30)), rng.normal(0, 1, (3, 30)), rng.normal(0, 1, (1, 30))
    assert compare(first, second).p_seeds == pytest.approx(stats.ttest_ind(first.mean(1), second.mean(1), equal_var=False).pvalue)
    given = stats.ttest_1samp(first.mean(1), alone.mean()).pvalue
    assert compare(first, alone).p_seeds == pytest.approx(given), "a single seed is taken as given"


def test_what_is_no_number_is_named() -> None:
    values = np.zeros((2, 5))
    values[1, 3] = np.nan
    with pytest.raises(UserError, match=r"nll of ordered: 1 of 10 values .* \(nan\) that of seed 1, image 3"):
        figure(values, "nll of ordered")
    with pytest.raises(UserError, match="no finite numbers"):
        compare(values, np.zeros((2, 5)))
    with pytest.raises(UserError, match="5 images on one side and 4 on the other"):
        compare(np.zeros(5), np.zeros(4))
    with pytest.raises(UserError, match="no values"):
        figure([])


def with_twins(rng: np.random.Generator, families: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Values of mean 0 in families of 1 to 12 images, half of the variance common to a family."""
    sizes = rng.integers(1, 13, families)
    families_S = np.repeat(np.arange(families), sizes)
    return rng.normal(size=families)[families_S] + rng.normal(size=len(families_S)), families_S


def test_images_of_one_family_do_not_narrow_an_interval() -> None:
    """Of 80 sets of images with twins the interval over families holds the true mean in nearly 95 %; one over images in far fewer."""
    rng, held, naive = np.random.default_rng(5), 0, 0
    for _ in range(80):
        values, families_S = with_twins(rng)
        for interval, clustered in ((figure(values, families_S=families_S).over_images, True), (figure(values).over_images, False)):
            assert interval is not None
            holds = interval.low <= 0 <= interval.high
            held, naive = held + (holds and clustered), naive + (holds and not clustered)
    assert held >= 68 and naive <= 60


def test_families_of_equal_means_have_an_interval_without_width() -> None:
    """However their images differ: every bootstrap sample of these families has the same mean."""
    interval = figure(np.tile([3.0, 1.0], 12), families_S=np.repeat(np.arange(12), 2)).over_images
    assert interval is not None and (interval.low, interval.high) == (2.0, 2.0)


def test_families_of_one_image_change_nothing() -> None:
    values = np.random.default_rng(1).normal(size=(3, 40))
    alone, apart = figure(values), figure(values, families_S=np.arange(40)[::-1])
    assert alone.over_images is not None and apart.over_images is not None and apart.families == 40
    assert (apart.over_images.low, apart.over_images.high) == pytest.approx((alone.over_images.low, alone.over_images.high), abs=0.02)
    few = values[0, :6]
    interval = figure(few, families_S=np.arange(6)).over_images
    assert interval is not None and interval.method == "t"
    assert (interval.low, interval.high) == pytest.approx(stats.t.interval(0.95, 5, few.mean(), stats.sem(few)))


def test_signs_are_flipped_family_by_family() -> None:
    """Compared with all flips of 8 families, one after the other."""
    values, families_S = with_twins(np.random.default_rng(3), 8)
    own = abs(values.sum())
    flips = [sum(sign * values[families_S == family].sum() for family, sign in enumerate(signs)) for signs in product((1, -1), repeat=8)]
    expected = np.mean([abs(flipped) >= own - 1e-9 for flipped in flips])
    assert compare(values, np.zeros_like(values), families_S=families_S).p_images == pytest.approx(expected)


def test_one_family_has_no_interval() -> None:
    found = figure([1.0, 2.0, 3.0], families_S=[7, 7, 7])
    assert found.over_images is None and found.families == 1


def test_an_interval_over_both_has_the_variance_of_a_crossed_design() -> None:
    """(MS_seeds + MS_images - MS_residual) / (R S), by sums of squares written out; with twins their sums stand for them."""
    values_RS = np.random.default_rng(2).normal(size=(4, 30)) + np.random.default_rng(3).normal(size=(4, 1))
    seeds, images = values_RS.shape
    ms_seeds = images * values_RS.mean(1).var(ddof=1)
    ms_images = seeds * values_RS.mean(0).var(ddof=1)
    total = ((values_RS - values_RS.mean()) ** 2).sum()
    ms_rest = (total - (seeds - 1) * ms_seeds - (images - 1) * ms_images) / ((seeds - 1) * (images - 1))
    variance = max(ms_seeds + ms_images - ms_rest, ms_seeds, ms_images) / values_RS.size
    weights = np.array([ms_seeds, ms_images]) / (ms_seeds + ms_images)

    def critical(p: float) -> float:
        return float(weights @ stats.t.isf(p / 2, [seeds - 1, images - 1]))

    over_both, found = figure(values_RS).over_both, compare(values_RS, np.zeros(30))
    assert over_both is not None
    assert (over_both.high - over_both.low) / 2 == pytest.approx(critical(0.05) * variance**0.5)
    assert (over_both.high + over_both.low) / 2 == pytest.approx(values_RS.mean())
    assert found.p_both is not None and critical(found.p_both) == pytest.approx(abs(values_RS.mean()) / variance**0.5)
    twice = compare(np.repeat(values_RS, 2, axis=1), np.zeros(60), families_S=np.repeat(np.arange(30), 2))
    assert twice.p_both == pytest.approx(found.p_both), "an image that is there twice tells nothing new"
    assert figure(values_RS[:1]).over_both is None and figure(values_RS, families_S=np.zeros(30)).over_both is None


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_an_interval_over_both_of_three_seeds_is_neither_wide_nor_narrow(share: float) -> None:
    """Whatever share of the variance is that of seeds. With the two degrees of freedom of the seeds it would hold the mean in 99.9 % of
    the cases where they have none."""
    rng, times, families, held = np.random.default_rng(3), 400, 9, 0
    of_seeds = share / (1 - share) * 3 / families
    for _ in range(times):
        common = rng.normal(0, of_seeds**0.5, (3, 1)) + rng.normal(size=(1, families))
        interval = figure(common + rng.normal(0, 0.5, (3, families))).over_both
        assert interval is not None
        held += interval.low <= 0 <= interval.high
    assert stats.binom.ppf(0.001, times, 0.94) <= held <= stats.binom.ppf(0.999, times, 0.98)


def test_p_over_both_is_below_a_level_where_the_interval_leaves_out_zero() -> None:
    rng = np.random.default_rng(8)
    for _ in range(40):
        found = compare(rng.normal(0.5, 0.5, (3, 1)) + rng.normal(size=(3, 9)), np.zeros(9))
        interval = found.difference.over_both
        assert interval is not None and found.p_both is not None
        assert (found.p_both < 0.05) == (not interval.low <= 0 <= interval.high)
    assert compare(np.full((3, 9), 1e6) + rng.normal(size=(3, 9)), np.zeros(9)).p_both == pytest.approx(0, abs=1e-9)


def test_what_varies_in_the_interaction_alone_has_an_interval() -> None:
    """All means are equal over seeds and over images: no variance of either is left to weigh by."""
    values = [[1.0, -1.0], [-1.0, 1.0]]
    found, difference = figure(values), compare(values, np.zeros((2, 2)))
    assert found.over_both is not None and np.isfinite([found.over_both.low, found.over_both.high]).all()
    assert difference.p_both == pytest.approx(1.0)
