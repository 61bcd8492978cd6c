"""The actors of a pool: which are starting, busy or idle, on which hosts, and whether new ones are started."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from oar_scale.errors import UserError, first_line
from oar_scale.shard_pool.actor import ActorOutcome, ShardTask
from oar_scale.shard_pool.backends import ActorBackend
from oar_scale.shard_pool.pool_types import Bounds, PoolReport, Timing
from oar_scale.shard_pool.shard_times import Assignment

LONGEST_PAUSE_S = 600.0
"""Between tries to start actors where workers cannot be made though others are busy."""
WAITING_S = 60.0
"""Seconds without any actor after which event ``waiting`` is emitted, once. For so long one without a place is expected on another host."""


class Emit(Protocol):
    """Emits an event of the pool."""

    def __call__(self, kind: str, /, **fields: object) -> None:
        """Emit an event of this kind, with these fields."""
        ...


class ActorSet:
    """Actors by number. Each is busy (has an assignment) or idle; those with a host have made their worker.

    ``report`` gets how many there are, and which were lost.
    """

    def __init__(
        self,
        backend: ActorBackend,
        bounds: Bounds,
        timing: Timing,
        max_retries: int,
        report: PoolReport,
        emit: Emit,
        clock: Callable[[], float],
    ) -> None:
        self.backend, self.bounds, self.timing, self.max_retries = backend, bounds, timing, max_retries
        self.report, self.emit, self.clock = report, emit, clock
        self.busy: dict[int, Assignment] = {}
        self.idle: list[int] = []
        self.hosts: dict[int, str] = {}
        self.started_at: dict[int, float] = {}
        self.stopped_s = 0.0
        """The lifetimes of the actors that are stopped."""
        self.failed_starts = 0
        """Since the last worker that could be made."""
        self.pause_s, self.no_start_before = timing.pause_s, 0.0
        self.began, self.waiting_emitted = clock(), False

    # -- what there is --------------------------------------------------------------------------------------------------

    def starting(self) -> list[int]:
        """The actors that have not made their worker yet."""
        return [actor for actor, assignment in self.busy.items() if assignment.task is None]

    def shards(self) -> set[str]:
        """The shards that are with busy actors."""
        return {assignment.task.shard for assignment in self.busy.values() if assignment.task}

    def seconds(self) -> float:
        """The lifetimes of all actors. May be called in another thread."""
        now = self.clock()
        return self.stopped_s + sum(now - start for start in list(self.started_at.values()))

    def more_expected(self) -> bool:
        """Whether actors are starting, perhaps on other hosts; those that have waited long for capacity do not count."""
        recent = self.clock() - WAITING_S
        return any(self.busy[actor].since is not None or self.started_at[actor] > recent for actor in self.starting())

    def idle_for(self, avoided: Collection[str]) -> list[int]:
        """The idle actors that are on none of these hosts."""
        return [actor for actor in self.idle if self.hosts[actor] not in avoided]

    # -- what becomes of them -------------------------------------------------------------------------------------------

    def start_for(self, pending: int) -> None:
        """Start actors for that many pending shards, within the bounds and as there is capacity."""
        starting = len(self.starting())
        existing, wanted = len(self.idle) + len(self.busy), pending - len(self.idle) - starting
        count = min(wanted, self.bounds.most - existing)
        if count > (guaranteed := max(0, self.bounds.least - existing)):
            # Some more than there is capacity for: a cluster that can grow does so for what is requested.
            extra = max(self.backend.capacity() - starting, max(1, len(self.hosts) // 2) - starting)
            count = min(count, max(guaranteed, extra))
        for _ in range(count if self.clock() >= self.no_start_before else 0):
            actor = self.backend.start()
            self.busy[actor], self.started_at[actor] = Assignment(None, None), self.clock()
        if not self.hosts and not self.waiting_emitted and self.clock() - self.began > WAITING_S:
            self.waiting_emitted = True
            self.emit("waiting", seconds=round(WAITING_S))

    def assign(self, actor: int, task: ShardTask) -> None:
        """Give a task to an idle actor."""
        self.idle.remove(actor)
        self.busy[actor] = Assignment(task, self.clock())
        self.backend.run(actor, task)

    def stop(self, actor: int) -> None:
        """End an actor, whatever it does."""
        self.backend.kill(actor)
        self.stopped_s += self.clock() - self.started_at.pop(actor)
        if self.hosts.pop(actor, None) is not None and not self.hosts:
            self.failed_starts, self.no_start_before = 0, 0.0  # whatever failed beside it: all depends on new actors now
        self.busy.pop(actor, None)
        if actor in self.idle:
            self.idle.remove(actor)
        self.report.actors = len(self.hosts)

    def lose(self, actor: int, error: str) -> None:
        """Stop an actor that failed. Whatever failed may have broken its process, too: it is not used again."""
        self.report.deaths += 1
        self.emit("actor_lost", host=self.hosts.get(actor, ""), error=first_line(error))
        self.stop(actor)

    def record_start(self, actor: int, outcome: ActorOutcome) -> None:
        """Count an actor that has made its worker."""
        self.hosts[actor] = outcome.info["host"]
        self.report.actors = len(self.hosts)
        self.report.peak_actors = max(self.report.peak_actors, len(self.hosts))
        self.emit("actor_started", **outcome.info)

    def record_failed_start(self, outcome: ActorOutcome) -> None:
        """Pause starting actors, or fail. One host may be broken: that stops nobody who is busy, or who may be in a moment.

        Raises:
            UserError, RuntimeError: there are no other actors.
        """
        self.failed_starts += 1
        user_error, tried = outcome.kind == "user error", self.failed_starts
        if not user_error and tried <= self.max_retries:
            return
        placed = any(self.busy[actor].since is not None for actor in self.starting())
        if not self.hosts and not placed:
            if user_error:
                raise UserError(outcome.error)
            raise RuntimeError(f"no worker could be made in {tried} tries; the last error:\n{outcome.error}")
        self.pause_starts(outcome.error)

    def pause_starts(self, error: str) -> None:
        """Start no actors for a time, longer each time."""
        if self.clock() >= self.no_start_before:
            self.emit("not_hiring", seconds=self.pause_s, error=first_line(error))
            self.no_start_before, self.pause_s = self.clock() + self.pause_s, min(2 * self.pause_s, LONGEST_PAUSE_S)
