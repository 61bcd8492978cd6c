"""The sample plan: which samples make up which training step, as a pure function.

A sample's uid is its index in the manifest: samples of shard 0 first, in the order of the tar. With

    B   global batch, a multiple of C    C   data.canonical_streams, a constant of the recipe
    t   global step, from 0              W   number of ranks (training workers), a divisor of C

the plan is made in four moves, none of which depends on W.

1. *Line.* Epoch e permutes the shards by a hash of (seed, e) and lays their samples end to end.
2. *Segments.* The line is cut into C equal segments of floor(samples / C); the remainder, fewer than C samples, is skipped in
   that epoch.
3. *Shuffle.* Windows of ``window_shards`` whole shards partition the line, too. What a segment and a window have in common is a piece,
   and samples are shuffled inside their piece:

       line       |---- window 0 ----|---- window 1 ----|-- ...
       segments   |-- 0 --|-- 1 --|-- 2 --|-- ...
       pieces     |-------|----|--|-------|

4. *Streams.* Stream c is segment c of epoch 0, then segment c of epoch 1, and so on without end. A step takes the next samples of the
   streams round-robin: its slots i = 0 ... B - 1 are numbered through all steps, and

       slot  g = t * B + i   holds   sample  g div C   of stream  g mod C

Rank r of W owns the streams c with c mod W = r and so the slots i = r, r + W, r + 2 W, ... of every step. From this follows:

* The global batch of step t is the same for every W, every number of loader processes, and after every restart.
* All ranks have B / W samples in every step: no rank runs out of data before the others.
* A rank reads C / W segments at a time, each of them inside one window, so it has at most C / W * window_shards + 2 shards open.
* Resuming at step t needs the number t and nothing else: there is no iterator state to save.

Nothing is tabulated: the position of a sample inside its piece is computed by a keyed permutation (:func:`shuffled`), so a plan takes
memory in proportion to its shards, not to its samples, and the plan of any step is computed directly, without the steps before it.

:class:`SamplePlan` is the plan of one folder of shards, :class:`MixturePlan` that of several, mixed by weight. Where C or the window is
changed in the middle of a run, :class:`ContinuedPlan` first shares out what the streams have left of the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from oar_scale.data.hashing import hash_keys, permutations

Ids = NDArray[np.int64]

MIXTURE_PERIOD = 1000
"""Weights of a mixture are kept exactly over so many consecutive samples of a stream, to a thousandth."""
_ROUNDS = 8
"""Rounds of the Feistel network. Four are enough for a pseudo-random permutation (Luby & Rackoff, 1988); small domains want more."""


@dataclass(frozen=True)
class Slots:
    """The samples of some slots of one step, in slot order."""

    epoch: Ids
    """Epoch that each sample belongs to, from 0: part of the seed of every random choice about the sample."""
    uid: Ids
    """Index of each sample in the manifest (in a mixture, after all samples of the folders before its own)."""


class Cut(NamedTuple):
    """How the line of samples is cut into streams, from one batch of the run on."""

    first_batch: int
    streams: int
    """C."""
    window_shards: int


class StreamPlan(Protocol):
    """C endless streams of samples: what :func:`step_slots` takes the slots of a step from."""

    streams: int
    """C."""

    def at(self, stream: Ids, position: Ids) -> Slots:
        """The sample at ``position`` (0, 1, ...) of each ``stream`` (0 to C - 1); both arrays have one entry a slot."""
        ...

    def taken(self, position: int) -> list[Ids]:
        """For each folder, how many of its samples each stream [C] has before a position."""
        ...


class FolderPlan(StreamPlan, Protocol):
    """The streams of one folder of shards."""

    seed: int
    streams: int

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        ...

    def shard_of(self, uid: Ids) -> tuple[Ids, Ids]:
        """Index of each sample's shard, and its row within it."""
        ...

    def boundary(self, position: int) -> tuple[int, int]:
        """The first position from this one on at which an epoch begins, and which epoch that is."""
        ...


def step_slots(plan: StreamPlan, step: int, batch: int, rank: int = 0, world: int = 1) -> Slots:
    """The samples of one rank's slots of a global step, in slot order.

    Args:
        step: global step, from 0.
        batch: B, the global batch.
        rank, world: whose slots; rank 0 of 1 gets all B of them.
    """
    slots = step * batch + np.arange(rank, batch, world, dtype=np.int64)
    return plan.at(slots % plan.streams, slots // plan.streams)


class SamplePlan:
    """The plan of one folder of shards.

    Args:
        shard_samples: number of samples of each shard, in the order of the manifest.
        seed: of the permutations of shards and samples.
        streams: C.
        window_shards: whole shards of a shuffle window.
    """

    def __init__(self, shard_samples: Sequence[int], seed: int, streams: int, window_shards: int) -> None:
        """Raises ValueError when there are fewer samples than streams."""
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        self.first_uid = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed, self.streams, self.window_shards = seed, streams, window_shards
        self.segment = self.samples // streams
        if self.segment == 0:
            raise ValueError(f"{self.samples} samples cannot fill {streams} streams")
        self.shard_line = lru_cache(maxsize=4)(self._shard_line)
        """For an epoch: shards in the order of its line (empty ones skipped), and the position on it at which each begins."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return int(self.first_uid[-1])

    @property
    def per_epoch(self) -> int:
        """Samples that an epoch delivers: all but the remainder."""
        return self.segment * self.streams

    def at(self, stream: Ids, position: Ids) -> Slots:
        """The sample at each position of each stream: position div segment is the epoch, the rest lies inside the segment."""
        epoch, within = np.divmod(position, self.segment)
        uid = np.empty_like(position)
        for number in np.unique(epoch):
            here = epoch == number
            uid[here] = self._uids(int(number), stream[here], within[here])
        return Slots(epoch, uid)

    def taken(self, position: int) -> list[Ids]:
        """All streams have as many."""
        return [np.full(self.streams, position, dtype=np.int64)]

    def boundary(self, position: int) -> tuple[int, int]:
        """See :meth:`FolderPlan.boundary`."""
        epoch = -(-position // self.segment)
        return epoch * self.segment, epoch

    def shard_of(self, uid: Ids) -> tuple[Ids, Ids]:
        """Index of each sample's shard, and its row within it."""
        shard = np.searchsorted(self.first_uid, uid, side="right") - 1
        return shard, uid - self.first_uid[shard]

    def _uids(self, epoch: int, stream: Ids, within: Ids) -> Ids:
        """The samples at index ``within`` of each stream's segment in one epoch."""
        shards, starts = self.shard_line(epoch)
        edges = np.append(starts[:: self.window_shards], self.samples)  # window w is edges[w] to edges[w + 1] - 1 on the line
        at = stream * self.segment + within
        window = np.searchsorted(edges, at, side="right") - 1
        # The piece: from the later of the two beginnings to the earlier of the two ends. Its beginning is part of the key, so that
        # pieces are shuffled independently of one another.
        begin = np.maximum(stream * self.segment, edges[window])
        end = np.minimum((stream + 1) * self.segment, edges[window + 1])
        at = begin + shuffled(at - begin, end - begin, hash_keys("piece", self.seed, epoch, begin))
        entry = np.searchsorted(starts, at, side="right") - 1  # which shard of the line the shuffled position lies in
        uid: Ids = self.first_uid[shards[entry]] + at - starts[entry]
        return uid

    def _shard_line(self, epoch: int) -> tuple[Ids, Ids]:
        shards = permutations("shards", len(self.sizes), self.seed, epoch)
        shards = shards[self.sizes[shards] > 0]
        return shards, np.concatenate([[0], np.cumsum(self.sizes[shards])[:-1]])


class ContinuedPlan:
    """The plan of a folder whose line is cut anew in the middle of an epoch; its positions count from there.

    What the streams have left of the epoch is laid end to end, in the order in which they would have come to it, and cut into the new
    number of equal parts; the next epoch is that of the new plan. So what the epoch has had is not repeated, and of the rest fewer
    samples than there are new streams are skipped:

        before    |xxxx------|xxxx------|xxxx------|      x: taken
        the rest  |------------------|                    = |---------|---------|   for two new streams
    """

    def __init__(self, before: FolderPlan, taken_C: Ids, after: SamplePlan) -> None:
        """Continue ``before``, of which each stream has had ``taken_C`` samples, with the streams of ``after``."""
        self.before, self.after, self.seed, self.streams = before, after, after.seed, after.streams
        end, self.epoch = before.boundary(int(taken_C.max()))
        self.taken_C = taken_C
        self.edges = np.concatenate([[0], np.cumsum(end - taken_C)])
        """Where what is left of each old stream begins on the line of the rest, and the line's length."""
        self.rest = int(self.edges[-1]) // self.streams
        """Samples of the rest for each new stream."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return self.after.samples

    def at(self, stream: Ids, position: Ids) -> Slots:
        """See :meth:`StreamPlan.at`."""
        slots, rest = Slots(np.empty_like(position), np.empty_like(position)), position < self.rest
        line = stream[rest] * self.rest + position[rest]
        old = np.searchsorted(self.edges, line, side="right") - 1
        parts = (
            (rest, self.before.at(old, self.taken_C[old] + line - self.edges[old])),
            (~rest, self.after.at(stream[~rest], position[~rest] - self.rest + self.epoch * self.after.segment)),
        )
        for here, part in parts:
            slots.epoch[here], slots.uid[here] = part.epoch, part.uid
        return slots

    def taken(self, position: int) -> list[Ids]:
        """All streams have as many."""
        return self.after.taken(position)

    def boundary(self, position: int) -> tuple[int, int]:
        """See :meth:`FolderPlan.boundary`."""
        if position <= self.rest:
            return self.rest, self.epoch
        shift = self.epoch * self.after.segment - self.rest
        end, epoch = self.after.boundary(position + shift)
        return end - shift, epoch

    def shard_of(self, uid: Ids) -> tuple[Ids, Ids]:
        """Index of each sample's shard, and its row within it."""
        return self.after.shard_of(uid)


class MixturePlan:
    """The plan of several folders of shards, mixed by weight; uids of folder d begin where those of folder d - 1 end.

    A stream is cut into periods of MIXTURE_PERIOD samples. Each folder has its exact share of every period, in an order that is a
    permutation by (seed, stream, period). Within a stream, a folder's samples come in the order of its own plan, so each folder goes
    through its own epochs at its own pace.
    """

    def __init__(self, plans: Sequence[FolderPlan], weights: Sequence[float]) -> None:
        """Raises ValueError for weights that are not positive, or plans with different numbers of streams."""
        if len(plans) != len(weights) or min(weights, default=0) <= 0:
            raise ValueError(f"{len(plans)} data sets need as many positive weights, got {list(weights)}")
        if len({plan.streams for plan in plans}) != 1:
            raise ValueError("the plans of a mixture must have the same number of streams")
        self.plans, self.seed, self.streams = list(plans), plans[0].seed, plans[0].streams
        self.first_uid = np.concatenate([[0], np.cumsum([plan.samples for plan in plans])])
        self.counts = _shares(np.asarray(weights, dtype=np.float64))
        self._pattern = lru_cache(maxsize=4 * self.streams)(self._draw_pattern)

    def at(self, stream: Ids, position: Ids) -> Slots:
        """The sample at each position of each stream, and its epoch in its own folder."""
        period, within = np.divmod(position, MIXTURE_PERIOD)
        folder, earlier = np.empty_like(position), np.empty_like(position)
        for each in range(len(position)):
            folders, earlier_of = self._pattern(int(stream[each]), int(period[each]))
            folder[each], earlier[each] = folders[within[each]], earlier_of[within[each]]
        slots = Slots(np.empty_like(position), np.empty_like(position))
        for number, plan in enumerate(self.plans):
            here = folder == number
            # Every period before this one took counts[number] samples of the folder, and this one ``earlier`` so far.
            part = plan.at(stream[here], period[here] * self.counts[number] + earlier[here])
            slots.epoch[here], slots.uid[here] = part.epoch, part.uid + self.first_uid[number]
        return slots

    def taken(self, position: int) -> list[Ids]:
        """See :meth:`StreamPlan.taken`: within a period, the streams take the folders in orders of their own."""
        period, within = divmod(position, MIXTURE_PERIOD)
        begun = [self._pattern(stream, period)[0][:within] for stream in range(self.streams)]
        counts = enumerate(self.counts.tolist())
        return [np.array([period * count + np.count_nonzero(part == number) for part in begun]) for number, count in counts]

    def _draw_pattern(self, stream: int, period: int) -> tuple[Ids, Ids]:
        """For each position of a period: its folder, and how many earlier positions of the period have the same folder."""
        folders = np.repeat(np.arange(len(self.counts)), self.counts)
        folders = folders[permutations("mixture", MIXTURE_PERIOD, self.seed, stream, period)]
        earlier = np.empty_like(folders)
        for number, count in enumerate(self.counts):
            earlier[folders == number] = np.arange(count)
        return folders, earlier


def stream_plan(
    folders: Sequence[Sequence[int]], weights: Sequence[float], seed: int, batch: int, cuts: Sequence[Cut]
) -> tuple[list[FolderPlan], StreamPlan]:
    """The plan of a run whose line of samples was cut in these ways one after the other; positions count from the last cut on.

    Args:
        folders: the number of samples of each shard, for each folder.
        weights: of the folders.
        batch: B, the global batch.
        cuts: oldest first; the first one begins with batch 0.

    Returns:
        The plans of the folders, and the one of them all.

    Raises:
        ValueError: as :class:`SamplePlan` and :class:`MixturePlan`.
    """
    first = cuts[0]
    plans: list[FolderPlan] = [SamplePlan(sizes, seed, first.streams, first.window_shards) for sizes in folders]
    for before, cut in pairwise(cuts):
        taken = _mixed(plans, weights).taken((cut.first_batch - before.first_batch) * batch // before.streams)
        after = [SamplePlan(sizes, seed, cut.streams, cut.window_shards) for sizes in folders]
        plans = [ContinuedPlan(*each) for each in zip(plans, taken, after, strict=True)]
    return plans, _mixed(plans, weights)


def _mixed(plans: Sequence[FolderPlan], weights: Sequence[float]) -> StreamPlan:
    return MixturePlan(plans, weights) if len(plans) > 1 else plans[0]


def shuffled(index: Ids, length: Ids, key: NDArray[np.uint64]) -> Ids:
    """The position of each index in a permutation of ``range(length)`` that belongs to ``key``; all three broadcast.

    Format-preserving encryption instead of a table: a Feistel network permutes Z_a x Z_b, the smallest nearly square grid with
    a b >= length, and an output outside ``range(length)`` is permuted again until it lands inside ("cycle walking"; Black & Rogaway,
    "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Walking along the cycles of a permutation of the grid visits every index below
    ``length`` exactly once, so the result is a permutation as well. A million samples cost no more memory than one.
    """
    index, length, key = (np.array(part) for part in np.broadcast_arrays(index, length, key))
    side = np.ceil(np.sqrt(length)).astype(np.int64)
    other = -(-length // side)
    outside = np.arange(len(index))  # entries that still have to move; a b < length + a, so few need a second round
    while len(outside):
        index[outside] = _feistel(index[outside], side[outside], other[outside], key[outside])
        outside = outside[index[outside] >= length[outside]]
    return index


def _feistel(index: Ids, side: Ids, other: Ids, key: NDArray[np.uint64]) -> Ids:
    """One pass through the network: a permutation of ``range(side * other)``.

    Each round adds a hash of one coordinate to the other one, modulo its size; that can be undone whatever the hash is, which makes
    the whole a permutation. The halves need not be of one size (a generalised Feistel network).
    """
    high, low = np.divmod(index, other)  # high in Z_side, low in Z_other
    for number in range(0, _ROUNDS, 2):
        # The hash loses its lowest bit, so that it is a non-negative int64 before the remainder is taken.
        high = (high + (hash_keys("high", key, number, low) >> np.uint64(1)).astype(np.int64) % side) % side
        low = (low + (hash_keys("low", key, number, high) >> np.uint64(1)).astype(np.int64) % other) % other
    permuted: Ids = high * other + low
    return permuted


def _shares(weights: NDArray[np.float64]) -> Ids:
    """Whole numbers in proportion to the weights that sum to MIXTURE_PERIOD, none of them 0 (largest remainder)."""
    exact = weights / weights.sum() * MIXTURE_PERIOD
    counts: Ids = np.maximum(np.floor(exact), 1).astype(np.int64)
    while (missing := MIXTURE_PERIOD - int(counts.sum())) != 0:
        most = np.argmax(exact - counts) if missing > 0 else np.argmin(np.where(counts > 1, exact - counts, np.inf))
        counts[most] += np.sign(missing)
    return counts
