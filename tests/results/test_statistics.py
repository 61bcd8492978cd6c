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
    SeedSpread,
    bootstrap_interval,
    compare,
    figure,
    holm,
    pooled_spread,
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


def blocks(rng: np.random.Generator, arms: int, seeds: int, families: int) -> np.ndarray:
    """Values [arm, seed, image] without a difference between arms: what a seed and an image have in common, and what they have not."""
    of_seed = rng.normal(0, 0.2, (1, seeds, 1)) + rng.normal(0, 0.1, (arms, seeds, 1))
    of_image = rng.normal(0, 1, (1, 1, families)) + rng.normal(0, 0.3, (arms, 1, families))
    return np.asarray(of_seed + of_image + rng.normal(0, 0.3, (arms, seeds, families)))


def test_the_spread_of_all_arms_is_the_mean_over_all_pairs_of_them() -> None:
    values = blocks(np.random.default_rng(0), 5, 3, 12)
    means_KR = values.mean(2)
    pairs = [np.var(means_KR[a] - means_KR[b], ddof=1) for a in range(5) for b in range(a)]
    spread = pooled_spread(list(values))
    assert spread == SeedSpread(pytest.approx(np.mean(pairs)), (5 - 1) * (3 - 1), 5)  # type: ignore[arg-type]
    two = compare(values[0], values[1], spread=pooled_spread(values[:2]))
    assert two.p_seeds == pytest.approx(stats.ttest_rel(means_KR[0], means_KR[1]).pvalue), "two arms tell what their differences tell"
    found = compare(values[0], values[1], spread=spread)
    error = (np.mean(pairs) / 3) ** 0.5
    wanted = stats.t.interval(0.95, 8, float(values[0].mean() - values[1].mean()), error)
    assert found.difference.over_seeds is not None and found.difference.over_seeds.method == "t pooled" and found.seed_freedom == 8
    assert (found.difference.over_seeds.low, found.difference.over_seeds.high) == pytest.approx(wanted)
    assert found.over_seeds_alone == compare(values[0], values[1]).difference.over_seeds
    assert pooled_spread([values[0]]) is None and pooled_spread(list(values[:, :1])) is None


def test_an_interval_over_both_has_the_variance_of_a_crossed_design() -> None:
    """(MS_seeds + MS_images - MS_residual) / (R S), by sums of squares written out; with twins their sums stand for them."""
    values_RS = np.random.default_rng(2).normal(size=(4, 30)) + np.random.default_rng(3).normal(size=(4, 1))
    seeds, images = values_RS.shape
    ms_seeds = images * values_RS.mean(1).var(ddof=1)
    ms_images = seeds * values_RS.mean(0).var(ddof=1)
    total = ((values_RS - values_RS.mean()) ** 2).sum()
    ms_rest = (total - (seeds - 1) * ms_seeds - (images - 1) * ms_images) / ((seeds - 1) * (images - 1))
    variance = max(ms_seeds + ms_images - ms_rest, ms_seeds, ms_images) / values_RS.size
    wanted = stats.t.interval(0.95, seeds - 1, values_RS.mean(), variance**0.5)
    over_both = figure(values_RS).over_both
    assert over_both is not None and (over_both.low, over_both.high) == pytest.approx(wanted)
    found = compare(values_RS, np.zeros(30))
    assert found.p_both == pytest.approx(2 * stats.t.sf(abs(values_RS.mean()) / variance**0.5, seeds - 1))
    twice = compare(np.repeat(values_RS, 2, axis=1), np.zeros(60), families_S=np.repeat(np.arange(30), 2))
    assert twice.p_both == pytest.approx(found.p_both), "an image that is there twice tells nothing new"
    assert figure(values_RS[:1]).over_both is None and figure(values_RS, families_S=np.zeros(30)).over_both is None


def test_a_difference_is_found_about_as_often_as_p_says_and_no_more() -> None:
    """Arms that are alike, 3 seeds of each, told apart at 0.05 by nearly 5 % of the comparisons; over images alone by far more."""
    rng, both, seeds, images, count = np.random.default_rng(7), 0, 0, 0, 0
    for _ in range(40):
        values = blocks(rng, 10, 3, 9)
        spread = pooled_spread(list(values))
        for arm in range(1, 10, 2):
            found = compare(values[arm], values[0], spread=spread)
            assert found.p_both is not None and found.p_seeds is not None
            count, both = count + 1, both + (found.p_both < 0.05)
            seeds, images = seeds + (found.p_seeds < 0.05), images + (found.p_images < 0.05)
    assert both <= stats.binom.ppf(0.999, count, 0.06)
    assert both < min(seeds, images), "seeds or images alone leave out the other half"


def test_three_seeds_of_fifteen_arms_can_tell_two_of_them_apart() -> None:
    """30 primary differences: by two arms alone a difference of 10 standard errors would not hold after correction."""
    values = blocks(np.random.default_rng(1), 15, 3, 40)
    values[4] += 0.9
    spread = pooled_spread(list(values))
    found = [compare(each, values[0], spread=spread) for each in values[1:]]
    both = holm([each.p_both or 0.0 for each in found] * 2)
    assert both[3] < 0.01 and sum(p < 0.05 for p in both) == 2
    alone = compare(values[4], values[0])
    assert alone.p_seeds is not None and 30 * alone.p_seeds > 0.05
