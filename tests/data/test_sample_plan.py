"""The sample plan: the same global batches whoever asks, every sample once an epoch."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oar_scale.data import sample_plan
from oar_scale.data.hashing import device_permutations, integers, permutations, uniform
from oar_scale.data.sample_plan import MIXTURE_PERIOD, Cut, MixturePlan, SamplePlan, Slots, shuffled, step_slots, stream_plan

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
        whole[rank::world] = step_slots(plan, step, batch, rank, world).uid
    return whole


@given(plan=plans, factor=st.integers(1, 4), step=st.integers(0, 500))
def test_a_steps_samples_do_not_depend_on_the_workers(plan: SamplePlan, factor: int, step: int) -> None:
    """The samples of a step do not depend on the number of workers."""
    batch = plan.streams * factor
    for world in range(1, plan.streams + 1):
        if plan.streams % world == 0:
            assert np.array_equal(global_batch(plan, step, batch, world), step_slots(plan, step, batch).uid)


@given(plan=plans)
@settings(deadline=None)
def test_every_sample_comes_once_an_epoch_but_for_the_remainder(plan: SamplePlan) -> None:
    total = int(plan.sizes.sum())
    for epoch in (0, 1):
        slots = step_slots(plan, epoch, plan.per_epoch)
        uids = slots.uid
        assert set(slots.epoch.tolist()) == {epoch}
        assert len(np.unique(uids)) == len(uids) == total - total % plan.streams
        assert uids.min() >= 0 and uids.max() < total


def delivered(folders: list[tuple[int, ...]], batch: int, cuts: list[Cut], batches: int) -> Slots:
    """The samples of the first batches of a run whose streams were cut anew on the way."""
    ends = [*(cut.first_batch for cut in cuts[1:]), batches]
    parts = []
    for number, (cut, end) in enumerate(zip(cuts, ends, strict=True), 1):
        _, plan = stream_plan(folders, [1.0 + index for index in range(len(folders))], 7, batch, cuts[:number])
        parts += [step_slots(plan, step - cut.first_batch, batch) for step in range(cut.first_batch, end)]
    return Slots(np.concatenate([part.epoch for part in parts]), np.concatenate([part.uid for part in parts]))


@given(
    sizes=st.lists(st.integers(5, 40), min_size=2, max_size=8).map(tuple),
    streams=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4),
    gaps=st.lists(st.integers(0, 9), min_size=3, max_size=3),
)
@settings(deadline=None)
def test_other_streams_repeat_nothing_of_the_epoch(sizes: tuple[int, ...], streams: list[int], gaps: list[int]) -> None:
    """Cut anew in the middle, once or more often: an epoch has each sample at most once, and lacks fewer than C for each cut."""
    at = np.cumsum([0, *gaps]).tolist()
    cuts = [Cut(at[index], count, 1 + index) for index, count in enumerate(streams)]
    slots = delivered([sizes], 12, cuts, at[-1] + 3 * sum(sizes) // 12 + 3)
    for epoch in range(3):
        uids = slots.uid[slots.epoch == epoch]
        assert len(np.unique(uids)) == len(uids), "a sample came twice in an epoch"
        assert len(uids) > sum(sizes) - sum(streams), "an epoch lacks more than the remainders"


def test_other_streams_leave_the_steps_before_as_they_were() -> None:
    before = delivered([(32,) * 8], 12, [Cut(0, 4, 2)], 9)
    both = delivered([(32,) * 8], 12, [Cut(0, 4, 2), Cut(9, 6, 2)], 30)
    assert np.array_equal(both.uid[: 9 * 12], before.uid)
    assert not np.array_equal(both.uid, delivered([(32,) * 8], 12, [Cut(0, 6, 2)], 30).uid)


def test_other_streams_of_a_mixture_repeat_nothing_either() -> None:
    """Within a period the streams have had different numbers of samples of each folder; no sample of a folder's epoch comes twice."""
    folders = [(40,) * 30, (50,) * 30]
    slots = delivered(folders, 12, [Cut(0, 4, 2), Cut(37, 6, 2), Cut(61, 3, 1)], 200)
    first = sum(folders[0])
    for here in (slots.uid < first, slots.uid >= first):
        for epoch in np.unique(slots.epoch[here]):
            uids = slots.uid[here & (slots.epoch == epoch)]
            assert len(np.unique(uids)) == len(uids), epoch


def test_epochs_and_seeds_differ() -> None:
    def epoch(plan: SamplePlan, number: int) -> list[int]:
        return step_slots(plan, number, plan.per_epoch).uid.tolist()

    plan, other = (SamplePlan((32,) * 8, seed, 4, 2) for seed in (0, 1))
    assert epoch(plan, 0) != epoch(plan, 1)
    assert epoch(plan, 0) != epoch(other, 0)
    assert epoch(plan, 0) != sorted(epoch(plan, 0))


def test_a_uid_names_shard_and_row() -> None:
    plan = SamplePlan((3, 5, 2), 0, 1, 1)
    shards, rows = plan.shard_of(np.array([0, 2, 3, 7, 8, 9]))
    assert (shards.tolist(), rows.tolist()) == ([0, 0, 1, 1, 2, 2], [0, 2, 0, 4, 0, 1])


def test_too_few_samples_for_the_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples cannot fill 4 streams"):
        SamplePlan((3,), 0, 4, 1)


@settings(max_examples=300, deadline=None)
@given(length=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_shuffle_without_a_table_is_a_permutation(length: int, key: int) -> None:
    every = shuffled(np.arange(length), np.int64(length), np.uint64(key))
    assert np.array_equal(np.sort(every), np.arange(length))


def test_a_shuffle_without_a_table_favours_no_place() -> None:
    keys = np.arange(20_000, dtype=np.uint64)
    for length in (2, 3, 10, 17, 50):
        for index in (0, length // 2, length - 1):
            counts = np.bincount(shuffled(np.int64(index), np.int64(length), keys), minlength=length)
            spread = np.sqrt(20_000 / length * (1 - 1 / length))
            assert abs(counts - 20_000 / length).max() < 5 * spread, (length, index)


def test_neighbours_do_not_stay_together() -> None:
    positions = shuffled(np.arange(100_000), np.int64(100_000), np.uint64(7))
    steps = np.abs(np.diff(positions))
    assert (steps < 100).mean() < 0.004  # 0.002 by chance
    assert abs(np.corrcoef(np.arange(100_000), positions)[0, 1]) < 0.02


def test_a_billion_samples_are_planned_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """1e9 samples in 10,000 shards: a step in the middle of epoch 3 permutes a few times its own samples, in a few megabytes."""
    permuted, feistel = [0], sample_plan._feistel

    def counted(index: sample_plan.Ids, *others: Any) -> sample_plan.Ids:
        permuted[0] += len(index)
        return feistel(index, *others)

    monkeypatch.setattr(sample_plan, "_feistel", counted)
    tracemalloc.start()
    plan = SamplePlan([100_000] * 10_000, 0, 240, 8)
    slots = step_slots(plan, 3 * 10**9 // 960 + 12_345, 960)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(slots.epoch.tolist()) == {3} and len(set(slots.uid.tolist())) == 960
    assert 960 <= permuted[0] < 2 * 960
    assert peak < 20e6


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0.0001, 5), min_size=2, max_size=4),
    streams=st.sampled_from([1, 2, 4]),
    world=st.sampled_from([1, 2, 4]),
    step=st.integers(0, 3000),
)
def test_a_mixture_is_the_same_for_any_number_of_workers(weights: list[float], streams: int, world: int, step: int) -> None:
    mixture = MixturePlan([SamplePlan((20 + n, 30, 7), 3, streams, 2) for n in range(len(weights))], weights)
    if streams % world:
        return
    whole = step_slots(mixture, step, 4 * streams)
    for rank in range(world):
        part = step_slots(mixture, step, 4 * streams, rank, world)
        assert np.array_equal(part.uid, whole.uid[rank::world]) and np.array_equal(part.epoch, whole.epoch[rank::world])


def test_a_mixture_keeps_weights_and_each_sets_epochs() -> None:
    """A mixture keeps its weights and every data set its epochs."""
    plans = [SamplePlan((300, 300), 0, 2, 1), SamplePlan((100,), 0, 2, 1)]
    slots = step_slots(MixturePlan(plans, [3, 1]), 0, 2 * MIXTURE_PERIOD)
    second = slots.uid >= 600
    assert second.sum() == 500
    assert np.bincount(slots.uid[second] - 600).tolist() == [5] * 100  # five whole epochs of the small one
    first_epoch = slots.uid[~second & (slots.epoch == 0)]
    assert len(np.unique(first_epoch)) == len(first_epoch) == 600
    with pytest.raises(ValueError, match="positive weights"):
        MixturePlan(plans, [1, 0])


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
