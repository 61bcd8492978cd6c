"""Which samples make up which step: a pure function, the same whoever asks.

A sample's uid is its index in the manifest. Epoch e permutes the shards by (seed, e), lays their samples end to end, cuts
the line into C equal segments (C = ``data.canonical_streams``; the remainder is left out of that epoch) and shuffles
inside pieces, a piece being what a segment and a window of whole shards have in common:

    line       |---- window 0 ----|---- window 1 ----|-- ...          windows of ``window_shards`` shards
    segments   |-- 0 --|-- 1 --|-- 2 --|-- ...                        C of them
    pieces     |-------|----|--|-------|                              shuffled inside

Slot g = t * B + i of step t takes sample g div C of stream g mod C; a stream is its segment of epoch 0, then that of epoch 1,
and so on. Rank r of W owns the streams c with c mod W = r, so it opens few shards, and its slots of a step are i = r, r + W, ...:
the global batch is the same for every W that divides C.

Nothing is drawn up in advance: where a sample of a piece goes is computed from its number alone (:func:`shuffled`), so a plan
costs memory for its shards, not for its samples, and going on at any step costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oar_scale.data.hashing import hash_words, permutations

Ids = NDArray[np.int64]

MIXTURE_PERIOD = 1000
"""Weights of a mixture are kept exactly over so many consecutive samples of a stream, to a thousandth."""
_ROUNDS = 8


@dataclass(frozen=True)
class Slots:
    """Samples of some slots of one step."""

    epoch: Ids
    uid: Ids


class StreamPlan(Protocol):
    """What a stream needs to know: the sample at each place of each of C streams, without end."""

    streams: int

    def at(self, stream: Ids, place: Ids) -> Slots:
        """The samples at ``place`` (0, 1, ...) of each ``stream``."""
        ...


def step_slots(plan: StreamPlan, step: int, batch: int, rank: int = 0, world: int = 1) -> Slots:
    """The samples of a rank's slots of global step ``step`` (0-based), in slot order; rank 0 of 1 = all B of them."""
    slots = step * batch + np.arange(rank, batch, world, dtype=np.int64)
    return plan.at(slots % plan.streams, slots // plan.streams)


class SamplePlan:
    """The plan of a folder of shards with ``shard_samples[i]`` samples each."""

    def __init__(self, shard_samples: Sequence[int], seed: int, streams: int, window_shards: int) -> None:
        """Raises ValueError when there are fewer samples than streams."""
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        self.first_uid = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed, self.streams, self.window_shards = seed, streams, window_shards
        self.segment = self.samples // streams
        if self.segment == 0:
            raise ValueError(f"{self.samples} samples cannot fill {streams} streams")
        self.laid_out = lru_cache(maxsize=4)(self._lay_out)
        """Shards in the order of an epoch's line (those without samples left out), and where each begins on it."""

    @property
    def samples(self) -> int:
        return int(self.first_uid[-1])

    @property
    def per_epoch(self) -> int:
        """Samples an epoch delivers."""
        return self.segment * self.streams

    def at(self, stream: Ids, place: Ids) -> Slots:
        epoch, within = np.divmod(place, self.segment)
        uid = np.empty_like(place)
        for number in np.unique(epoch):
            here = epoch == number
            uid[here] = self._uids(int(number), stream[here], within[here])
        return Slots(epoch, uid)

    def shard_of(self, uid: Ids) -> tuple[Ids, Ids]:
        """Index of each sample's shard, and its row within it."""
        shard = np.searchsorted(self.first_uid, uid, side="right") - 1
        return shard, uid - self.first_uid[shard]

    def _uids(self, epoch: int, stream: Ids, within: Ids) -> Ids:
        shards, starts = self.laid_out(epoch)
        edges = np.append(starts[:: self.window_shards], self.samples)
        at = stream * self.segment + within
        window = np.searchsorted(edges, at, side="right") - 1
        begin = np.maximum(stream * self.segment, edges[window])
        end = np.minimum((stream + 1) * self.segment, edges[window + 1])
        at = begin + shuffled(at - begin, end - begin, hash_words("piece", self.seed, epoch, begin))
        place = np.searchsorted(starts, at, side="right") - 1
        uid: Ids = self.first_uid[shards[place]] + at - starts[place]
        return uid

    def _lay_out(self, epoch: int) -> tuple[Ids, Ids]:
        shards = permutations("shards", len(self.sizes), self.seed, epoch)
        shards = shards[self.sizes[shards] > 0]
        return shards, np.concatenate([[0], np.cumsum(self.sizes[shards])[:-1]])


class MixturePlan:
    """Several folders of shards, mixed by weight; uids of folder d begin where those of d - 1 end.

    Of any MIXTURE_PERIOD consecutive samples of a stream that begin at a multiple of it, each folder has its share, in an order that
    is a hash of (seed, stream, period). Each folder goes through its own epochs at its own pace.
    """

    def __init__(self, plans: Sequence[SamplePlan], weights: Sequence[float]) -> None:
        """Raises ValueError for weights that are not positive, or plans with different numbers of streams."""
        if len(plans) != len(weights) or min(weights, default=0) <= 0:
            raise ValueError(f"{len(plans)} data sets need as many positive weights, got {list(weights)}")
        if len({plan.streams for plan in plans}) != 1:
            raise ValueError("the plans of a mixture must have the same number of streams")
        self.plans, self.seed, self.streams = list(plans), plans[0].seed, plans[0].streams
        self.first_uid = np.concatenate([[0], np.cumsum([plan.samples for plan in plans])])
        self.counts = _shares(np.asarray(weights, dtype=np.float64))
        self._pattern = lru_cache(maxsize=4 * self.streams)(self._draw)

    def at(self, stream: Ids, place: Ids) -> Slots:
        period, within = np.divmod(place, MIXTURE_PERIOD)
        folder, turn = np.empty_like(place), np.empty_like(place)
        for each in range(len(place)):
            folders, turns = self._pattern(int(stream[each]), int(period[each]))
            folder[each], turn[each] = folders[within[each]], turns[within[each]]
        found = Slots(np.empty_like(place), np.empty_like(place))
        for number, plan in enumerate(self.plans):
            here = folder == number
            part = plan.at(stream[here], period[here] * self.counts[number] + turn[here])
            found.epoch[here], found.uid[here] = part.epoch, part.uid + self.first_uid[number]
        return found

    def _draw(self, stream: int, period: int) -> tuple[Ids, Ids]:
        """For each place of a period: its folder, and how many places of that folder come before it."""
        folders = np.repeat(np.arange(len(self.counts)), self.counts)
        folders = folders[permutations("mixture", MIXTURE_PERIOD, self.seed, stream, period)]
        turns = np.empty_like(folders)
        for number, count in enumerate(self.counts):
            turns[folders == number] = np.arange(count)
        return folders, turns


def shuffled(index: Ids, length: Ids, key: NDArray[np.uint64]) -> Ids:
    """Where each index goes in a permutation of ``range(length)`` that belongs to ``key``; all three broadcast.

    A Feistel network on Z_a x Z_b with a b >= length, walked until it lands inside (Black & Rogaway, "Ciphers with Arbitrary Finite
    Domains", CT-RSA 2002): no table, so a million samples cost no more memory than one.
    """
    index, length, key = (np.array(part) for part in np.broadcast_arrays(index, length, key))
    side = np.ceil(np.sqrt(length)).astype(np.int64)
    other = -(-length // side)
    left = np.arange(len(index))
    while len(left):
        index[left] = _feistel(index[left], side[left], other[left], key[left])
        left = left[index[left] >= length[left]]
    return index


def _feistel(index: Ids, side: Ids, other: Ids, key: NDArray[np.uint64]) -> Ids:
    high, low = np.divmod(index, other)  # high in Z_side, low in Z_other
    for number in range(0, _ROUNDS, 2):
        high = (high + (hash_words("high", key, number, low) >> np.uint64(1)).astype(np.int64) % side) % side
        low = (low + (hash_words("low", key, number, high) >> np.uint64(1)).astype(np.int64) % other) % other
    found: Ids = high * other + low
    return found


def _shares(weights: NDArray[np.float64]) -> Ids:
    """Whole numbers in proportion to the weights that sum to MIXTURE_PERIOD, none of them 0 (largest remainder)."""
    exact = weights / weights.sum() * MIXTURE_PERIOD
    counts: Ids = np.maximum(np.floor(exact), 1).astype(np.int64)
    while (missing := MIXTURE_PERIOD - int(counts.sum())) != 0:
        most = np.argmax(exact - counts) if missing > 0 else np.argmin(np.where(counts > 1, exact - counts, np.inf))
        counts[most] += np.sign(missing)
    return counts
