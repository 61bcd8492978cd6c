"""Which pools are alive? Each has a lease, which it renews by a heartbeat in storage; no two clocks are compared.

    LEDGER-pool/holders/ID.000017.json     heartbeat 17 of a pool; the name alone shows whether it goes on
    LEDGER-pool/holders/ID.ended.json      it has released all its claims

A lease has expired when its pool has ended, when the pool's process on this very machine is gone, or when its heartbeat has stood
still for ``lease_s`` while somebody watched. A pool that was only slow does no harm: see ``ledger.py``.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from oar_scale.errors import UserError
from oar_scale.runtime.process_identity import machine_id, process_start
from oar_scale.runtime.retry import retry_transient
from oar_scale.shard_pool.ledger import Ledger, Record, names_in, readable_record, write_record
from oar_scale.storage import join, open_storage

log = logging.getLogger(__name__)

LAST_HEARTBEAT_S = 5.0
"""How long a pool that ends waits for a heartbeat on its way, perhaps with a scheduler waiting to kill it."""
_ENDED = "ended"


class Lease:
    """This pool's lease, renewed for as long as the ``with`` block lasts. At its end all claims of the pool are released."""

    def __init__(self, ledger: Ledger, describe: Callable[[], Record], heartbeat_s: float, patience_s: float = 0) -> None:
        """Make a lease; it begins with the ``with`` block.

        Args:
            describe: called at each heartbeat, in another thread: what else to record about the pool.
            heartbeat_s: seconds between two heartbeats.
            patience_s: how long the first heartbeat waits for a storage that does not answer.
        """
        self.holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        """Names this lease in claims and ledger entries."""
        self._ledger, self._describe, self._heartbeat_s, self._patience_s = ledger, describe, heartbeat_s, patience_s
        self._process = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born_ticks": process_start(os.getpid()),
            "machine": machine_id(),
        }
        self._process |= {"started": round(time.time(), 3), "beat_s": heartbeat_s}
        self._number, self._written = 0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="pool-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        retry_transient(lambda: self._write(f"{self._number:06d}"), self._patience_s)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(LAST_HEARTBEAT_S)  # one that comes still later sorts before ``ended``
        try:
            for claim in self._ledger.claims().values():
                if claim.holder == self.holder:
                    self._ledger.release(claim)
            self._write(_ENDED)
        except UserError as problem:  # the claims are free when the lease has expired
            log.warning("the pool could not release its claims: %s", problem)

    def _renew(self) -> None:
        while not self._over.wait(self._heartbeat_s):
            self._number += 1
            try:
                self._write(f"{self._number:06d}")
            except Exception as problem:  # the next one may succeed; until then shards may be done twice, which does no harm
                log.warning("a heartbeat of this pool failed: %s", problem)

    def _write(self, heartbeat: str) -> None:
        before, uri = self._written, join(self._ledger.pool_folder, "holders", f"{self.holder}.{heartbeat}.json")
        write_record(uri, {**self._process, "time": round(time.time(), 3), **self._describe()})
        self._written = uri
        if before:  # the value from when we began: a heartbeat that comes late must not delete ``ended``
            open_storage(before).delete(before)


class LeaseWatch:
    """The leases of a ledger, as somebody sees them who polls now and then."""

    def __init__(self, ledger: Ledger, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._lease_s, self._clock = join(ledger.pool_folder, "holders"), lease_s, clock
        self._heartbeats: dict[str, tuple[str, float]] = {}
        """The newest heartbeat of each holder, and when this watch first saw it."""
        self._renewed: set[str] = set()
        """Holders whose lease was renewed while this watch polled."""
        self._records: dict[str, Record] = {}

    def poll(self) -> None:
        """Read which heartbeats there are."""
        now, newest = self._clock(), _newest_heartbeats(self._folder)
        for holder, heartbeat in newest.items():
            before = self._heartbeats.get(holder, ("", now))[0]
            if heartbeat != before:
                self._heartbeats[holder] = heartbeat, now
                self._renewed |= {holder} if before else set()
        for holder in newest.keys() - self._records.keys():
            record = None if newest[holder] == _ENDED else _read_lease(self._folder, holder, newest[holder])
            if record is not None:
                self._records[holder] = record

    def expired(self, holder: str) -> bool:
        """Whether a lease has expired, as far as the last polls showed; one that was never seen has from now on ``lease_s``."""
        heartbeat, since = self._heartbeats.setdefault(holder, ("", self._clock()))
        return heartbeat == _ENDED or _process_is_gone(self._records.get(holder, {})) or self._clock() - since > self._lease_s

    def record(self, holder: str) -> Record:
        """Return the record of a holder as this watch first read it; empty where there was none."""
        return self._records.get(holder, {})

    def is_alive(self, holder: str) -> bool:
        """Whether a holder is known to be alive: its lease was renewed while this watch polled, or its process is seen on this machine."""
        return holder in self._renewed or _process_is_here(self.record(holder))

    def alive(self) -> dict[str, Record]:
        """Return the records of the pools that seem to be alive; before a lease was seen renewed that is a guess from its clock."""
        return {
            holder: record
            for holder, record in self._records.items()
            if not self.expired(holder) and (holder in self._renewed or abs(time.time() - record["time"]) < self._lease_s)
        }


def read_leases(ledger: Ledger) -> dict[str, Record]:
    """Return the last record of every pool there ever was on a ledger; ``ended`` in it is whether the pool ended its lease itself."""
    folder = join(ledger.pool_folder, "holders")
    last = {holder: (_read_lease(folder, holder, heartbeat), heartbeat) for holder, heartbeat in _newest_heartbeats(folder).items()}
    return {holder: {**record, "ended": heartbeat == _ENDED} for holder, (record, heartbeat) in last.items() if record is not None}


def seems_alive(record: Record, lease_s: float) -> bool:
    """Guess from a single record of :func:`read_leases`, and from its clock, whether its pool is alive."""
    return not record["ended"] and not _process_is_gone(record) and time.time() - record["time"] < lease_s


def _read_lease(folder: str, holder: str, heartbeat: str) -> Record | None:
    """The record of a heartbeat; None where it is gone by now, or damaged: its name alone shows that the pool goes on."""
    return readable_record(join(folder, f"{holder}.{heartbeat}.json"), "host", "pid", "started", "time")


def _newest_heartbeats(folder: str) -> dict[str, str]:
    """The newest heartbeat of each holder; digits sort before letters, hence before ``ended``."""
    newest: dict[str, str] = {}
    for name in names_in(folder):
        holder, _, heartbeat = name.rpartition(".")
        newest[holder] = max(heartbeat, newest.get(holder, ""))
    return newest


def _process_is_gone(record: Record) -> bool:
    """Whether the pool ran on this machine and its process has ended."""
    return _of_this_machine(record) and process_start(record["pid"]) != record["born_ticks"]


def _process_is_here(record: Record) -> bool:
    """Whether the pool runs on this machine."""
    return _of_this_machine(record) and process_start(record["pid"]) == record["born_ticks"]


def _of_this_machine(record: Record) -> bool:
    machine = machine_id()
    return bool(machine) and record.get("machine") == machine and "born_ticks" in record
