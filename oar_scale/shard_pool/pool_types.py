"""How a pool is configured, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from oar_scale.errors import UserError, first_line
from oar_scale.shard_pool.ledger import Record, ShardResult


@dataclass(frozen=True)
class Bounds:
    """How many actors: ``least`` are requested at once, more as the cluster has capacity for them."""

    least: int
    most: int


@dataclass(frozen=True)
class ArrayTask:
    """One of several processes on one ledger, each with one actor of its own and no Ray."""

    index: int
    of: int


@dataclass(frozen=True)
class Timing:
    """The intervals and time limits of a pool."""

    heartbeat_s: float = 10.0
    """Between two heartbeats of a pool."""
    lease_s: float = 60.0
    """Without a heartbeat for so long, the claims of a pool are free."""
    poll_s: float = 5.0
    """Between polls of what other pools do, while there is a reason to; more where a poll takes long."""
    grace_s: float = 20.0
    """For running shards to end after a signal to stop."""
    straggler: float = 3.0
    """A shard is a straggler, and given to an idle actor as well, after so many times the median ..."""
    straggler_s: float = 10.0
    """... and so many seconds."""
    patience_s: float = 600.0
    """How long a storage that does not answer is retried, before the shard counts as failed."""
    stuck: float = 20.0
    """An actor is stuck, and replaced, if it has neither ended its shard nor reported progress for so many times the median ..."""
    stuck_s: float = 600.0
    """... and so many seconds, and the patience with the storage."""
    hang_s: float = 1800.0
    """The same for what has no median: making a worker, and shards before three have been finished. And the most for actors that report
    progress: so long without any is a hang."""
    pause_s: float = 30.0
    """Where workers cannot be made though others are busy, before the next try; twice as long each time, to ten minutes."""


@dataclass
class PoolReport:
    """How every shard ended, in ``done`` or in ``poison``, and what it took."""

    done: dict[str, ShardResult] = field(default_factory=dict)
    poison: dict[str, str] = field(default_factory=dict)
    """The last error of each shard that was given up; its first line is the message, a traceback may follow."""
    already_done: int = 0
    """Shards that an earlier pool had finished."""
    done_elsewhere: int = 0
    """Shards that another pool finished meanwhile."""
    failures: dict[str, int] = field(default_factory=dict)
    """How often a shard's actor died or its worker failed."""
    actors: int = 0
    """That have a worker now."""
    peak_actors: int = 0
    deaths: int = 0
    """Actors that died, failed, were stuck, or could not be made."""
    stragglers: int = 0
    """Shards that were given to a second actor because the first took so long."""
    actor_seconds: float = 0.0

    @property
    def retries(self) -> int:
        """How many tries of shards failed."""
        return sum(self.failures.values())

    def raise_for_poison(self) -> None:
        """Raise a UserError that names the poison shards, if there are any."""
        if self.poison:
            named = "\n".join(f"  {shard}: {first_line(error)}" for shard, error in list(self.poison.items())[:5])
            raise UserError(
                f"{len(self.poison)} of {len(self.poison) + len(self.done)} shards could not be done:\n{named}\n"
                "The others are finished and are kept. Fix or remove these, then run the stage again."
            )


OnProgress = Callable[[str, ShardResult, PoolReport], None]
"""Called with each shard that is in the ledger: first those that an earlier pool finished, then each as it is finished; and the report
so far."""
FindLost = Callable[[Mapping[str, ShardResult]], Mapping[str, str]]
"""Called with the results of all shards in the ledger: returns those whose output is not what it was, and what is wrong with it."""
OnEvent = Callable[[str, Record], None]
"""Called with what else happens, by name: ``actor_started``, ``actor_lost``, ``retry``, ``poison``, ``late``, ``taken_over``,
``helping``, ``waiting``, ``not_hiring``, ``sick_host``, ``lost_output``, ``storage``, ``draining``, ``drained``."""
