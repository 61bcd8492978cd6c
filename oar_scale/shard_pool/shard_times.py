"""How long shards take, and hence which one takes too long."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from oar_scale.shard_pool.pool_types import Timing

REMEMBERED = 300
"""Shards whose seconds make the median."""
ENOUGH = 3
"""With fewer, a median means nothing."""


class ShardTimes:
    """The median of the last shards, and the limits that follow from it.

    Args:
        earlier_s: what the last shards took that earlier pools finished.
    """

    def __init__(self, timing: Timing, earlier_s: Sequence[float]) -> None:
        self._timing = timing
        self._seconds: deque[float] = deque(earlier_s, maxlen=REMEMBERED)
        self._own = 0

    def add(self, seconds: float) -> None:
        """Note what a shard took that this pool finished."""
        self._seconds.append(seconds)
        self._own += 1

    @property
    def median_s(self) -> float:
        """Median of the last shards; 0 before the first."""
        return statistics.median(self._seconds or [0.0])

    def is_straggler(self, seconds: float) -> bool:
        """Whether a shard that has run for so long takes far longer than the others."""
        return len(self._seconds) >= ENOUGH and seconds > max(self._timing.straggler_s, self._timing.straggler * self.median_s)

    def start_limit_s(self) -> float:
        """Seconds after which an actor that makes its worker counts as stuck."""
        return self._timing.hang_s + self._timing.patience_s

    def shard_limit_s(self) -> float:
        """Seconds after which an actor that does a shard counts as stuck."""
        # What earlier pools took may have been other hardware's: it can lengthen the wait for a first shard, not shorten it.
        least = self._timing.stuck_s if self._own >= ENOUGH else self._timing.hang_s
        return max(least, self._timing.stuck * self.median_s) + self._timing.patience_s
