"""Statistics that are gathered a part at a time are those of all images together."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oar_scale.evaluation.moments import Moments, merge_moments


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 1000))
def test_merged_statistics_are_those_of_all_images(sizes: list[int], seed: int) -> None:
    """Within 1e-12 of their size, also where the mean is far from 0."""
    features = np.random.default_rng(seed).normal(size=(sum(sizes), 4)) + 1e4
    cuts = list(itertools.accumulate(sizes))
    merged = merge_moments(Moments.of(part) for part in np.split(features, cuts[:-1]))
    assert merged.count == len(features)
    np.testing.assert_allclose(merged.mean_D, features.mean(0), rtol=1e-12)
    if len(features) > 1:
        np.testing.assert_allclose(merged.covariance_DD, np.cov(features.T), rtol=1e-9, atol=1e-9)


def test_another_order_of_merging_agrees_to_rounding() -> None:
    parts = [Moments.of(part) for part in np.random.default_rng(0).normal(size=(6, 50, 8))]
    forward, backward = merge_moments(parts), merge_moments(reversed(parts))
    np.testing.assert_allclose(forward.scatter_DD, backward.scatter_DD, rtol=0, atol=1e-12 * np.abs(forward.scatter_DD).max())
    again = merge_moments(parts)
    assert np.array_equal(again.scatter_DD, forward.scatter_DD) and np.array_equal(again.mean_D, forward.mean_D)


def test_what_has_no_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(0, 3\) have no statistics"):
        Moments.of(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = Moments.of(np.zeros((1, 3))).covariance_DD
    with pytest.raises(ValueError, match="3 and of 4 features"):
        Moments.of(np.zeros((2, 3))).merged(Moments.of(np.zeros((2, 4))))
    with pytest.raises(ValueError, match="no statistics to merge"):
        merge_moments([])
