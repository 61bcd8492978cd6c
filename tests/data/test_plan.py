"""The sample plan: the same global batches whoever asks, every sample once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oar_scale.data.hashing import device_permutations, integers, permutations, uniform
from oar_scale.data.plan import SamplePlan

plans = st.builds(
    SamplePlan,
    shard_samples=st.lists(st.integers(1, 40), min_size=2, max_size=12).map(tuple),
    seed=st.integers(0, 2**31),
    streams=st.sampled_from([1, 2]),
    window_shards=st.integers(1, 5),
)


def global_batch(plan: SamplePlan, step: int, batch: int, world: int) -> np.ndarray:
    """The batch put together from what every rank computes on its own."""
    whole = np.empty(batch, dtype=np.int64)
    for rank in range(world):
        whole[rank::world] = plan.step(step, batch, rank, world).uid
    return whole


@given(plan=plans, factor=st.integers(1, 4), step=st.integers(0, 500))
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_workers(plan: SamplePlan, factor: int, step: int) -> None:
    batch = plan.streams * factor
    for world in range(1, plan.streams + 1):
        if plan.streams % world == 0:
            assert np.array_equal(global_batch(plan, step, batch, world), plan.step(step, batch).uid)


@given(plan=plans)
@settings(deadline=None)
def test_every_sample_comes_once_an_epoch_but_for_the_remainder(plan: SamplePlan) -> None:
    total = int(plan.sizes.sum())
    for epoch in (0, 1):
        steps = range(epoch * plan.segment, (epoch + 1) * plan.segment)
        slots = [plan.step(step, plan.streams) for step in steps]
        uids = np.concatenate([slot.uid for slot in slots])
        assert {int(e) for slot in slots for e in slot.epoch} == {epoch}
        assert len(np.unique(uids)) == len(uids) == total - total % plan.streams
        assert uids.min() >= 0 and uids.max() < total


def test_epochs_and_seeds_differ() -> None:
    def epoch(plan: SamplePlan, number: int) -> list[int]:
        return plan.step(number, plan.per_epoch).uid.tolist()

    plan, other = (SamplePlan((32,) * 8, seed, 4, 2) for seed in (0, 1))
    assert epoch(plan, 0) != epoch(plan, 1)
    assert epoch(plan, 0) != epoch(other, 0)
    assert epoch(plan, 0) != sorted(epoch(plan, 0))


def test_a_uid_names_shard_and_row() -> None:
    plan = SamplePlan((3, 5, 2), 0, 1, 1)
    assert [plan.shard_of(uid) for uid in (0, 2, 3, 7, 8, 9)] == [(0, 0), (0, 2), (1, 0), (1, 4), (2, 0), (2, 1)]


def test_too_few_samples_for_the_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples cannot fill 4 streams"):
        SamplePlan((3,), 0, 4, 1)


@given(seed=st.integers(0, 2**62), epoch=st.integers(0, 1000), cells=st.integers(1, 80))
def test_permutations_are_permutations_and_belong_to_the_sample(seed: int, epoch: int, cells: int) -> None:
    uids = np.array([5, 900, 17])
    orders = permutations("order", cells, seed, epoch, uids)
    assert (np.sort(orders, axis=1) == np.arange(cells)).all()
    assert np.array_equal(permutations("order", cells, seed, epoch, uids[::-1])[::-1], orders)


def test_hashed_numbers_are_uniform_and_differ_by_purpose() -> None:
    numbers = uniform("view", 0, np.arange(20_000))
    counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert abs(counts - 2000).max() < 200  # 4.7 standard deviations
    assert not np.array_equal(numbers, uniform("caption", 0, np.arange(20_000)))
    assert set(integers("view", 6, 0, np.arange(1000)).tolist()) == set(range(6))


def test_random_orders_favour_no_cell() -> None:
    first = permutations("order", 16, 0, 0, np.arange(16_000))[:, 0]
    assert abs(np.bincount(first, minlength=16) - 1000).max() < 150


@settings(max_examples=100, deadline=None)
@given(cells=st.integers(1, 70), seed=st.integers(0, 2**62), epoch=st.integers(0, 2**31), uids=st.lists(st.integers(0, 2**62), max_size=9))
def test_orders_made_on_a_device_are_those_of_numpy(cells: int, seed: int, epoch: int, uids: list[int]) -> None:
    uid_b, epoch_b = np.array(uids, dtype=np.int64), np.full(len(uids), epoch, dtype=np.int64)
    expected = permutations("order", cells, seed, epoch_b, uid_b)
    made = device_permutations("order", cells, seed, torch.from_numpy(epoch_b), torch.from_numpy(uid_b))
    assert np.array_equal(made.numpy(), expected)
