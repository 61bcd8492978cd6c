"""How long shards take, and hence which one takes too long."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from oar_scale.shard_pool.actor import ShardTask
from oar_scale.shard_pool.pool_types import Timing

REMEMBERED = 300
"""Shards whose seconds make the median."""
ENOUGH = 3
"""With fewer, a median means nothing."""


@dataclass
class Assignment:
    """The work of an actor: a shard, or (None) making its worker."""

    task: ShardTask | None
    since: float | None
    """None: it has no process yet, because the cluster has no capacity for it."""
    progress: float | None = None
    """When it last reported progress."""

    def note(self, kind: str, now: float) -> None:
        """Note that the actor has a process now (``placed``), or that it reports ``progress``."""
        if kind == "placed":
            self.since = now
        else:
            self.progress = now


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

    def too_silent(self, assignment: Assignment, now: float) -> str:
        """What to say of an actor that is stuck; empty for one that is not, or has no process yet.

        A shard that reports progress may take as long as it likes: it is the silence since the last report that counts.
        """
        reports = assignment.progress is not None
        limit_s = self._timing.patience_s + (self._shard_limit_s(reports) if assignment.task else self._timing.hang_s)
        silent_since = assignment.progress if reports else assignment.since
        if silent_since is None or now - silent_since <= limit_s:
            return ""
        return f"no {'progress' if reports else 'answer'} in {limit_s:.0f} s (parallel.hang_timeout_s and storage.patience_s)"

    def _shard_limit_s(self, reports: bool) -> float:
        """Seconds of silence, besides the patience with the storage, after which an actor that does a shard counts as stuck."""
        # What earlier pools took may have been other hardware's: it can lengthen the wait for a first shard, not shorten it.
        least = self._timing.stuck_s if self._own >= ENOUGH else self._timing.hang_s
        limit_s = max(least, self._timing.stuck * self.median_s)
        return min(limit_s, self._timing.hang_s) if reports else limit_s
