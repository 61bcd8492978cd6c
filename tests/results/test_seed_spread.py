"""Arms that tell together how much seeds differ: against all pairs of them, against F tests written out, and against what p promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from oar_scale.results.seed_spread import DOUBTFUL, pooled_spread
from oar_scale.results.statistics import SeedSpread, compare, holm


def named(values_KRS: np.ndarray) -> dict[str, np.ndarray]:
    return {f"arm {number}": values for number, values in enumerate(values_KRS)}


def blocks(rng: np.random.Generator, arms: int, seeds: int, families: int) -> np.ndarray:
    """Values [arm, seed, image] without a difference between arms: what a seed and an image have in common, and what they have not."""
    of_seed = rng.normal(0, 0.2, (1, seeds, 1)) + rng.normal(0, 0.1, (arms, seeds, 1))
    of_image = rng.normal(0, 1, (1, 1, families)) + rng.normal(0, 0.3, (arms, 1, families))
    return np.asarray(of_seed + of_image + rng.normal(0, 0.3, (arms, seeds, families)))


def test_the_spread_of_all_arms_is_the_mean_over_all_pairs_of_them() -> None:
    values = blocks(np.random.default_rng(0), 5, 3, 12)
    means_KR = values.mean(2)
    pairs = [np.var(means_KR[a] - means_KR[b], ddof=1) for a in range(5) for b in range(a)]
    spread = pooled_spread(named(values))
    assert spread == SeedSpread(pytest.approx(np.mean(pairs)), (5 - 1) * (3 - 1), 5)  # type: ignore[arg-type]
    two = compare(values[0], values[1], spread=pooled_spread(named(values[:2])))
    assert two.p_seeds == pytest.approx(stats.ttest_rel(means_KR[0], means_KR[1]).pvalue), "two arms tell what their differences tell"
    found = compare(values[0], values[1], spread=spread)
    error = (np.mean(pairs) / 3) ** 0.5
    wanted = stats.t.interval(0.95, 8, float(values[0].mean() - values[1].mean()), error)
    assert found.difference.over_seeds is not None and found.difference.over_seeds.method == "t pooled" and found.seed_freedom == 8
    assert (found.difference.over_seeds.low, found.difference.over_seeds.high) == pytest.approx(wanted)
    assert found.over_seeds_alone == compare(values[0], values[1]).difference.over_seeds
    assert pooled_spread(named(values[:1])) is None and pooled_spread(named(values[:, :1])) is None


def test_a_difference_is_found_about_as_often_as_p_says_and_no_more() -> None:
    """Arms that are alike, 3 seeds of each, told apart at 0.05 by nearly 5 % of the comparisons; over images alone by far more."""
    rng, both, seeds, images, count = np.random.default_rng(7), 0, 0, 0, 0
    for _ in range(40):
        values = blocks(rng, 10, 3, 9)
        spread = pooled_spread(named(values))
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
    spread = pooled_spread(named(values))
    found = [compare(each, values[0], spread=spread) for each in values[1:]]
    both = holm([each.p_both or 0.0 for each in found] * 2)
    assert both[3] < 0.01 and sum(p < 0.05 for p in both) == 2
    alone = compare(values[4], values[0])
    assert alone.p_seeds is not None and 30 * alone.p_seeds > 0.05


def varying(rng: np.random.Generator, spread_K: list[float], seeds: int = 3) -> dict[str, np.ndarray]:
    """Values of one image without a difference between arms, each of which varies by so much from seed to seed."""
    values_KR = rng.normal(size=(1, seeds)) + rng.normal(size=(len(spread_K), seeds)) * np.array(spread_K)[:, None]
    return named(values_KR[:, :, None])


def found_different(arm: int, spread_K: list[float], *, tested: bool = True) -> int:
    """In how many of 300 comparisons an arm is told from the first one, at 0.05 over seeds."""
    rng, found = np.random.default_rng(11), 0
    for _ in range(300):
        arms = varying(rng, spread_K)
        spread = pooled_spread(arms)
        assert spread is not None
        apart = tested and {"arm 0", f"arm {arm}"} & set(spread.unstable)
        p = compare(arms[f"arm {arm}"], arms["arm 0"], spread=None if apart else spread).p_seeds
        assert p is not None
        found += p < 0.05
    return found


@pytest.mark.parametrize("unstable", [0, 1], ids=["the control", "an arm"])
def test_an_arm_that_varies_ten_times_as_much_is_not_told_from_its_like(unstable: int) -> None:
    spread_K = [1.0] * 15
    spread_K[unstable] = 10.0
    assert found_different(1, spread_K) <= stats.binom.ppf(0.999, 300, 0.06)


def test_without_the_test_it_would_be_in_every_third_case() -> None:
    assert found_different(1, [1.0, *[10.0], *[1.0] * 13], tested=False) > 100


def test_arms_that_vary_alike_are_told_apart_no_more_often_than_p_says() -> None:
    assert found_different(1, [1.0] * 15) <= stats.binom.ppf(0.999, 300, 0.05)
    assert found_different(2, [1.0, 10.0, *[1.0] * 13]) <= stats.binom.ppf(0.999, 300, 0.05), "nor beside one that does not"


def test_an_arm_is_unstable_by_the_f_test_of_orthogonal_contrasts() -> None:
    """The arm less the mean of the others, and an orthonormal basis of what the others are apart."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        arms = varying(rng, [1.0, 1.0, 2.0, 1.0, 1.0])
        values_KR = np.stack([values[:, 0] for values in arms.values()])
        p_K = []
        for arm in range(5):
            first = np.where(np.arange(5) == arm, 1.0, -1 / 4)
            basis, _ = np.linalg.qr(np.column_stack([np.ones(5), first, rng.normal(size=(5, 3))]))
            variances = [np.var(basis[:, column] @ values_KR, ddof=1) for column in range(1, 5)]
            p_K.append(stats.f.sf(variances[0] / np.mean(variances[1:]), 2, 6))
        spread = pooled_spread(arms)
        assert spread is not None
        if min(p_K) > DOUBTFUL / 5:
            assert spread.unstable == tuple(f"arm {arm}" for arm in range(5) if p_K[arm] <= DOUBTFUL) and spread.arms == 5
        else:
            worst = f"arm {np.argmin(p_K)}"
            assert spread.unstable[0] == worst
            alike = pooled_spread({name: values for name, values in arms.items() if name != worst})
            assert alike is not None and (spread.variance, spread.arms) == (alike.variance, alike.arms), "it tells nothing of the others"


def test_two_arms_or_equal_ones_cannot_be_told_by_their_spread() -> None:
    two = pooled_spread(varying(np.random.default_rng(0), [1.0, 100.0]))
    equal = pooled_spread(named(np.ones((4, 3, 2))))
    assert two is not None and equal is not None and not two.unstable and not equal.unstable
    one = np.ones((4, 3, 1))
    one[2, 1] = 2.0
    found = pooled_spread(named(one))
    assert found is not None and found.unstable == ("arm 2",), "the others do not vary at all"


def test_rounding_makes_no_arm_unstable() -> None:
    """Arms that are the same but for a constant vary alike, whatever the last bits of their means are."""
    dice = np.random.default_rng(0)
    for _ in range(50):
        found = pooled_spread(named(dice.normal(size=(1, 3, 8)) + dice.normal(size=(6, 1, 1))))
        assert found is not None and not found.unstable
