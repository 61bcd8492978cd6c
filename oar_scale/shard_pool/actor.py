"""One actor of a pool: makes its worker once, claims and does shards, and enters them into the ledger."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypedDict

from oar_scale.errors import UserError
from oar_scale.runtime.retry import retry_transient
from oar_scale.shard_pool.ledger import Claim, Ledger, LedgerEntry, ShardResult, ShardWork
from oar_scale.storage import Unreachable


class Worker(Protocol):
    """Does the shards of an actor; made once in the actor's process."""

    def run(self, shard: str) -> ShardResult:
        """Do the shard and write its output atomically.

        Raises:
            UserError: what a user can fix; tried on one other host, as it may be this one that is at fault.
            Exception: anything else; another actor tries it.
        """
        ...


@dataclass(frozen=True)
class ShardTask:
    """A shard that an actor is to do."""

    shard: str
    attempt: int = 1
    claim: int = 0
    """The number of the claim it tries to get."""


class ActorInfo(TypedDict, total=False):
    """An actor that has started: event ``actor_started``."""

    actor: str
    host: str
    pid: int
    seconds: float
    """That its worker took to make."""


@dataclass(frozen=True)
class ActorOutcome:
    """The answer of an actor; errors travel as text, because not every exception survives being pickled."""

    kind: Literal["placed", "started", "done", "taken", "user error", "failed"]
    """``placed``: the actor has a process, which makes its worker now."""
    result: ShardResult = field(default_factory=dict)
    work: ShardWork = field(default_factory=ShardWork)
    info: ActorInfo = field(default_factory=ActorInfo)
    """``started``: which actor it is."""
    error: str = ""
    claim: Claim | None = None
    """``taken``: which pool does the shard."""


class Actor:
    """The object that runs in the actor's process, on any backend.

    Args:
        make_worker: called once, by :meth:`start`.
        holder: name of the pool's lease; shards are claimed under it.
        patience_s: how long a storage that does not answer is retried.
    """

    def __init__(self, make_worker: Callable[[], Worker], ledger: Ledger, holder: str, patience_s: float) -> None:
        self._make_worker, self._ledger, self._holder, self._patience_s = make_worker, ledger, holder, patience_s
        self._host = socket.gethostname()
        self._name = f"{self._host}:{os.getpid()}"

    def start(self) -> ActorOutcome:
        """Make the worker. The outcome is ``started``, ``user error`` or ``failed``."""

        def make() -> ActorOutcome:
            began = time.monotonic()
            self._worker = self._make_worker()
            info = ActorInfo(actor=self._name, host=self._host, pid=os.getpid(), seconds=time.monotonic() - began)
            return ActorOutcome("started", info=info)

        return self._outcome(make)

    def run(self, task: ShardTask) -> ActorOutcome:
        """Claim a shard, do it, and enter it into the ledger. The outcome is ``done``, ``taken``, ``user error`` or ``failed``."""
        return self._outcome(lambda: self._run(task))

    def _run(self, task: ShardTask) -> ActorOutcome:
        claim = self._ledger.claim(task.shard, task.claim, self._holder)
        if claim.holder != self._holder:
            return ActorOutcome("taken", claim=claim)
        # An entry is written before its claim is released: one that came before our claim is seen here.
        entry = self._ledger.entry(task.shard) or self._do(task)
        self._ledger.release(claim)
        return ActorOutcome("done", entry.result, entry.work)

    def _do(self, task: ShardTask) -> LedgerEntry:
        began = time.monotonic()
        result = self._worker.run(task.shard)
        work = ShardWork(
            actor=self._name,
            host=self._host,
            holder=self._holder,
            attempt=task.attempt,
            seconds=round(time.monotonic() - began, 4),
            finished=round(time.time(), 3),
        )
        mine = LedgerEntry(result, work)
        if self._ledger.enter(task.shard, mine):
            return mine
        return self._ledger.entry(task.shard) or mine  # another actor was first

    def _outcome(self, action: Callable[[], ActorOutcome]) -> ActorOutcome:
        try:
            return retry_transient(action, self._patience_s)
        except UserError as error:
            kind: Literal["user error", "failed"] = "failed" if isinstance(error, Unreachable) else "user error"
            return ActorOutcome(kind, error=str(error))
        except Exception as error:  # whatever it is, the driver decides: it comes back with its traceback
            return ActorOutcome("failed", error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
