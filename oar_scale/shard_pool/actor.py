"""One actor of a pool: makes its worker once, claims and does shards, and enters them into the ledger."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from oar_scale.errors import UserError
from oar_scale.runtime.retry import retry_transient
from oar_scale.shard_pool.ledger import Claim, Entry, Facts, Ledger
from oar_scale.storage import Unreachable


class Worker(Protocol):
    def run(self, shard: str) -> Facts:
        """Do the shard and write its output atomically."""
        ...


@dataclass(frozen=True)
class Order:
    """A shard that an actor is to do."""

    shard: str
    attempt: int = 1
    claim: int = 0
    """The number of the claim it tries to get."""


@dataclass(frozen=True)
class Outcome:
    """What an actor answers; errors travel as text, because not every exception survives being pickled."""

    kind: Literal["placed", "started", "done", "taken", "user error", "failed"]
    """``placed``: the actor has a process, which makes its worker now."""
    facts: Facts = field(default_factory=dict)
    work: Facts = field(default_factory=dict)
    error: str = ""
    claim: Claim | None = None
    """``taken``: who is at the shard."""


class Actor:
    """What runs in the actor's process, whoever started that."""

    def __init__(self, make_worker: Callable[[], Worker], ledger: Ledger, holder: str, patience_s: float) -> None:
        self._make_worker, self._ledger, self._holder, self._patience_s = make_worker, ledger, holder, patience_s
        self._host = socket.gethostname()
        self._name = f"{self._host}:{os.getpid()}"

    def start(self) -> Outcome:
        def make() -> Outcome:
            began = time.monotonic()
            self._worker = self._make_worker()
            work = {"actor": self._name, "host": self._host, "pid": os.getpid(), "seconds": time.monotonic() - began}
            return Outcome("started", work=work)

        return self._outcome(make)

    def run(self, order: Order) -> Outcome:
        return self._outcome(lambda: self._run(order))

    def _run(self, order: Order) -> Outcome:
        claim = self._ledger.claim(order.shard, order.claim, self._holder)
        if claim.holder != self._holder:
            return Outcome("taken", claim=claim)
        # An entry is written before its claim is released: one that came before our claim is seen here.
        entry = self._ledger.entry(order.shard) or self._do(order)
        self._ledger.release(claim)
        return Outcome("done", entry.facts, entry.work)

    def _do(self, order: Order) -> Entry:
        began = time.monotonic()
        facts = self._worker.run(order.shard)
        work = {"actor": self._name, "host": self._host, "holder": self._holder, "attempt": order.attempt}
        mine = Entry(facts, {**work, "seconds": round(time.monotonic() - began, 4), "finished": round(time.time(), 3)})
        if self._ledger.enter(order.shard, mine):
            return mine
        there = self._ledger.entry(order.shard)
        return there or mine

    def _outcome(self, action: Callable[[], Outcome]) -> Outcome:
        try:
            return retry_transient(action, self._patience_s)
        except UserError as error:
            kind: Literal["user error", "failed"] = "failed" if isinstance(error, Unreachable) else "user error"
            return Outcome(kind, error=str(error))
        except Exception as error:  # whatever it is, the driver decides: it comes back with its traceback
            return Outcome("failed", error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
