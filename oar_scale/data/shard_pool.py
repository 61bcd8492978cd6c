"""A pool of Ray actors that does one task per shard, and a ledger in storage of what is done.

    worker.run(shard)          writes its own output, atomically, and returns a few facts about it
    LEDGER/SHARD.json          written after the output, and only if it is not there yet: the shard is done

A shard counts once it is in the ledger, whoever dies at what moment: an output without an entry is written again, and a
worker that is a function of its shard writes the same bytes. A pool that starts on a ledger does what is missing in it.

    the actor dies, or its worker fails          another actor tries the shard, ``max_retries`` times; then it is poison
    the worker raises UserError                  the data is at fault: poison at once
    the worker cannot be made                    UserError: the pool stops; anything else is tried again ``max_retries`` times

Poison shards are named in the report with their error, and the others go on. Through Ray go shard names and facts, no data.
"""

from __future__ import annotations

import json
import math
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from oar_scale.data.ray_session import ray_session
from oar_scale.errors import UserError
from oar_scale.storage import join, open_storage

Facts = dict[str, Any]
"""What a worker says about a finished shard: small, JSON, the same whoever did the work."""

OnProgress = Callable[[str, Facts], None]
"""Called with each shard that is in the ledger: first those found there, then each as it is finished."""


class Worker(Protocol):
    def run(self, shard: str) -> Facts:
        """Do the shard and write its output atomically."""
        ...


@dataclass
class PoolReport:
    """How every shard ended: in ``done`` or in ``poison``."""

    done: dict[str, Facts] = field(default_factory=dict)
    poison: dict[str, str] = field(default_factory=dict)
    """The last error of each shard that was set aside; its first line says what, a traceback may follow."""
    found: int = 0
    """Shards that an earlier pool had already finished."""
    failures: dict[str, int] = field(default_factory=dict)
    """How often a shard's actor died or its worker failed."""

    def raise_for_poison(self) -> None:
        """Raise a UserError that names the poison shards, if there are any."""
        if self.poison:
            named = "\n".join(f"  {shard}: {error.strip().splitlines()[0]}" for shard, error in list(self.poison.items())[:5])
            raise UserError(
                f"{len(self.poison)} of {len(self.poison) + len(self.done)} shards could not be done:\n{named}\n"
                "The others are finished and are kept. Mend or remove these, then run the stage again."
            )


@dataclass(frozen=True)
class _Outcome:
    """What an actor answers; errors travel as text, because not every exception survives being pickled."""

    kind: Literal["done", "user error", "failed"]
    facts: Facts = field(default_factory=dict)
    error: str = ""


class _Actor:
    """The Ray side: makes its worker, runs it, and enters finished shards into the ledger."""

    def __init__(self, make_worker: Callable[[], Worker], ledger: str) -> None:
        self._make_worker, self._ledger = make_worker, ledger

    def start(self) -> _Outcome:
        def make() -> Facts:
            self._worker = self._make_worker()
            return {}

        return _outcome(make)

    def run(self, shard: str) -> _Outcome:
        def work() -> Facts:
            facts = self._worker.run(shard)
            _enter(self._ledger, shard, facts)
            return facts

        return _outcome(work)


def _outcome(action: Callable[[], Facts]) -> _Outcome:
    try:
        return _Outcome("done", action())
    except UserError as error:
        return _Outcome("user error", error=str(error))
    except Exception as error:  # whatever it is, the driver decides: it comes back with its traceback
        return _Outcome("failed", error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def run_pool(
    make_worker: Callable[[], Worker],
    shards: Sequence[str],
    ledger: str,
    *,
    actors: int,
    gpus_per_actor: float = 0,
    cpu_threads: int = 1,
    max_retries: int = 3,
    on_progress: OnProgress | None = None,
) -> PoolReport:
    """Do every shard that is not in the ledger yet.

    Args:
        make_worker: called once in each actor's process; picklable, and small when pickled.
        shards: names, unique; they also name the ledger's entries.
        ledger: folder URI of the ledger.
        cpu_threads: cores an actor takes; Ray sets ``OMP_NUM_THREADS`` to it where that is unset.
        max_retries: how often a shard is tried again after its actor died or its worker failed.

    Raises:
        UserError: a worker could not be made and it is the user's to mend.
        RuntimeError: workers could not be made more than ``max_retries`` times in a row.
    """
    report = PoolReport()
    entries = read_ledger(ledger)
    for shard in shards:
        if shard in entries:
            report.done[shard] = entries[shard]
            if on_progress:
                on_progress(shard, entries[shard])
    report.found = len(report.done)
    missing = [shard for shard in shards if shard not in entries]
    if missing:
        count = min(actors, len(missing))
        with ray_session(cpus=count * cpu_threads, gpus=math.ceil(count * gpus_per_actor)):
            _Run(make_worker, ledger, gpus_per_actor, cpu_threads, max_retries, on_progress, report).do(missing, count)
    report.done = {shard: report.done[shard] for shard in shards if shard in report.done}
    return report


def read_ledger(ledger: str) -> dict[str, Facts]:
    """Facts of the finished shards by name."""
    storage, entries = open_storage(ledger), {}
    for uri in storage.list(ledger):
        entry = json.loads(storage.read(uri))
        entries[entry["shard"]] = entry["facts"]
    return entries


def _enter(ledger: str, shard: str, facts: Facts) -> None:
    uri = join(ledger, f"{shard}.json")
    entry = json.dumps({"shard": shard, "facts": facts}, sort_keys=True)
    open_storage(uri).write(uri, entry.encode(), if_absent=True)


@dataclass
class _Run:
    """The driver's side of one pool."""

    make_worker: Callable[[], Worker]
    ledger: str
    gpus_per_actor: float
    cpu_threads: int
    max_retries: int
    on_progress: OnProgress | None
    report: PoolReport
    failed_starts: int = 0
    running: dict[Any, tuple[Any, str | None]] = field(default_factory=dict)
    """What each pending answer is about: its actor, and a shard or (None) the making of the worker."""

    def do(self, missing: Sequence[str], actors: int) -> None:
        import ray

        waiting = deque(missing)
        idle: list[Any] = []
        for _ in range(actors):
            self._spawn()
        try:
            while waiting or any(shard for _, shard in self.running.values()):
                for reference in ray.wait(list(self.running), num_returns=1)[0]:
                    actor, shard = self.running.pop(reference)
                    try:
                        outcome = ray.get(reference)
                    except ray.exceptions.RayActorError as error:
                        outcome = _Outcome("failed", error=f"its process died: {error}")
                    if shard is None:
                        self._started(outcome)
                    elif self._must_be_tried_again(shard, outcome):
                        waiting.append(shard)
                    if outcome.kind != "failed":
                        idle.append(actor)
                    else:  # whatever broke may have broken the process, too
                        ray.kill(actor)
                        if waiting:
                            self._spawn()
                while waiting and idle:
                    ready, next_shard = idle.pop(), waiting.popleft()
                    self.running[ready.run.remote(next_shard)] = ready, next_shard
        finally:
            for actor in [*idle, *(actor for actor, _ in self.running.values())]:
                ray.kill(actor)

    def _spawn(self) -> None:
        import ray

        remote: Any = ray.remote(_Actor).options(num_cpus=self.cpu_threads, num_gpus=self.gpus_per_actor, max_restarts=0)
        actor = remote.remote(self.make_worker, self.ledger)
        self.running[actor.start.remote()] = actor, None

    def _started(self, outcome: _Outcome) -> None:
        if outcome.kind == "user error":
            raise UserError(outcome.error)
        self.failed_starts = self.failed_starts + 1 if outcome.kind == "failed" else 0
        if self.failed_starts > self.max_retries:
            raise RuntimeError(f"no worker could be made in {self.failed_starts} tries; the last error:\n{outcome.error}")

    def _must_be_tried_again(self, shard: str, outcome: _Outcome) -> bool:
        """Enter the outcome of a shard into the report."""
        if outcome.kind == "done":
            self.report.done[shard] = outcome.facts
            if self.on_progress:
                self.on_progress(shard, outcome.facts)
            return False
        if outcome.kind == "failed":
            self.report.failures[shard] = self.report.failures.get(shard, 0) + 1
            if self.report.failures[shard] <= self.max_retries:
                return True
        self.report.poison[shard] = outcome.error
        return False
