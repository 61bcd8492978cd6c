"""Which samples make up which step: a pure function, the same whoever asks.

A sample's uid is its index in the manifest. Epoch e permutes the shards by (seed, e), lays their samples end to end, cuts
the line into C equal segments (C = ``data.canonical_streams``; the remainder is left out of that epoch) and shuffles
inside pieces, a piece being what a segment and a window of whole shards have in common:

    line       |---- window 0 ----|---- window 1 ----|-- ...          windows of ``window_shards`` shards
    segments   |-- 0 --|-- 1 --|-- 2 --|-- ...                        C of them
    pieces     |-------|----|--|-------|                              shuffled inside

Slot g = t * B + i of step t takes sample g div C of segment g mod C. Rank r of W owns the segments c with c mod W = r, so it
opens few shards, and its slots of a step are i = r, r + W, ...: the global batch is the same for every W that divides C.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from oar_scale.data.hashing import permutations

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Slots:
    """A row of slots of one step."""

    epoch: Ids
    uid: Ids


class SamplePlan:
    """The plan of a folder of shards with ``shard_samples[i]`` samples each."""

    def __init__(self, shard_samples: tuple[int, ...], seed: int, streams: int, window_shards: int) -> None:
        """Raises ValueError when there are fewer samples than streams."""
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        self.first_uid = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed, self.streams, self.window_shards = seed, streams, window_shards
        self.segment = int(self.sizes.sum()) // streams
        if self.segment == 0:
            raise ValueError(f"{int(self.sizes.sum())} samples cannot fill {streams} streams")
        self._epoch = lru_cache(maxsize=4)(self._lay_out)
        self._piece = lru_cache(maxsize=4 * streams)(self._shuffle)

    @property
    def per_epoch(self) -> int:
        """Samples an epoch delivers."""
        return self.segment * self.streams

    def step(self, step: int, batch: int, rank: int = 0, world: int = 1) -> Slots:
        """The samples of a rank's slots of global step ``step`` (0-based), in slot order; rank 0 of 1 = all B of them."""
        slots = step * batch + np.arange(rank, batch, world, dtype=np.int64)
        epochs, within = np.divmod(slots // self.streams, self.segment)
        streams = slots % self.streams
        uids = np.array([self._uid(int(e), int(c), int(j)) for e, c, j in zip(epochs, streams, within, strict=True)], dtype=np.int64)
        return Slots(epochs, uids)

    def shard_of(self, uid: int) -> tuple[int, int]:
        """Shard index and row within it."""
        shard = int(np.searchsorted(self.first_uid, uid, side="right")) - 1
        return shard, uid - int(self.first_uid[shard])

    def _uid(self, epoch: int, stream: int, index: int) -> int:
        shards, starts = self._epoch(epoch)
        at = stream * self.segment + index
        window_edges = starts[:: self.window_shards]
        window = int(np.searchsorted(window_edges, at, side="right")) - 1
        begin = max(stream * self.segment, int(window_edges[window]))
        end = (stream + 1) * self.segment
        if window + 1 < len(window_edges):
            end = min(end, int(window_edges[window + 1]))
        at = begin + int(self._piece(epoch, begin, end - begin)[at - begin])
        place = int(np.searchsorted(starts, at, side="right")) - 1
        return int(self.first_uid[shards[place]]) + at - int(starts[place])

    def _lay_out(self, epoch: int) -> tuple[Ids, Ids]:
        """Shards in this epoch's order, and where each begins on the line."""
        shards = permutations("shards", len(self.sizes), self.seed, epoch)
        return shards, np.concatenate([[0], np.cumsum(self.sizes[shards])[:-1]])

    def _shuffle(self, epoch: int, begin: int, length: int) -> Ids:
        return permutations("piece", length, self.seed, epoch, begin)
