"""One actor of a pool: makes its worker once, claims and does shards, and enters them into the ledger."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypedDict, TypeVar

from oar_scale.errors import UserError
from oar_scale.runtime.retry import retry_transient
from oar_scale.shard_pool.ledger import Claim, Ledger, LedgerEntry, ShardOutput, ShardResult, ShardWork
from oar_scale.shard_pool.publication import publish
from oar_scale.storage import Unreachable

T = TypeVar("T")
OnStep = Callable[[], None]
"""Called by whoever does a shard whenever a part of it is done: that it goes on is how a long shard differs from one that hangs."""
PROGRESS_S = 5.0
"""Seconds between two reports of progress, at least."""


class Worker(Protocol):
    """Does the shards of an actor; made once in the actor's process."""

    def run(self, shard: str, on_step: OnStep) -> ShardOutput:
        """Do the shard; what is returned is written by the actor.

        Args:
            on_step: to be called far more often than every ``hang_s`` of :class:`Timing`, or the shard counts as hanging.

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

    kind: Literal["placed", "started", "progress", "done", "taken", "user error", "failed"]
    """``placed``: the actor has a process, which makes its worker now. ``progress``: it is still busy with its task, and does not hang."""
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

    def start(self) -> ActorOutcome:
        """Make the worker. The outcome is ``started``, ``user error`` or ``failed``."""

        def make() -> ActorOutcome:
            began = time.monotonic()
            self._worker, self._host = self._patiently(self._make_worker), socket.gethostname()
            self._name = f"{self._host}:{os.getpid()}"
            info = ActorInfo(actor=self._name, host=self._host, pid=os.getpid(), seconds=time.monotonic() - began)
            return ActorOutcome("started", info=info)

        return self._outcome(make)

    def run(self, task: ShardTask, report: Callable[[ActorOutcome], None]) -> ActorOutcome:
        """Claim a shard, do it, and enter it into the ledger. The outcome is ``done``, ``taken``, ``user error`` or ``failed``.

        Args:
            report: called with ``progress`` now and then, as long as there is any.
        """
        reported = time.monotonic()

        def on_step() -> None:
            nonlocal reported
            if time.monotonic() - reported > PROGRESS_S:
                reported = time.monotonic()
                report(ActorOutcome("progress"))

        return self._outcome(lambda: self._run(task, on_step))

    def _run(self, task: ShardTask, on_step: OnStep) -> ActorOutcome:
        """Each step waits by itself for a storage that is out of reach: at the end of a shard that must not cost the shard."""
        claim = self._patiently(lambda: self._ledger.claim(task.shard, task.claim, self._holder))
        if claim.holder != self._holder:
            return ActorOutcome("taken", claim=claim)
        # An entry is written before its claim is released: one that came before our claim is seen here.
        entry = self._patiently(lambda: self._ledger.entry(task.shard)) or self._do(task, on_step)
        self._patiently(lambda: self._ledger.release(claim))
        return ActorOutcome("done", entry.result, entry.work)

    def _do(self, task: ShardTask, on_step: OnStep) -> LedgerEntry:
        began = time.monotonic()
        output = self._patiently(lambda: self._worker.run(task.shard, on_step))
        work = ShardWork(
            actor=self._name,
            host=self._host,
            holder=self._holder,
            attempt=task.attempt,
            seconds=round(time.monotonic() - began, 4),
            finished=round(time.time(), 3),
        )
        return self._patiently(lambda: publish(self._ledger, task.shard, output, work))

    def _patiently(self, action: Callable[[], T]) -> T:
        return retry_transient(action, self._patience_s)

    def _outcome(self, action: Callable[[], ActorOutcome]) -> ActorOutcome:
        try:
            return action()
        except UserError as error:
            kind: Literal["user error", "failed"] = "failed" if isinstance(error, Unreachable) else "user error"
            return ActorOutcome(kind, error=str(error))
        except Exception as error:  # whatever it is, the driver decides: it comes back with its traceback
            return ActorOutcome("failed", error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
