"""Which pools are alive? Each says so in storage every few seconds; nobody's clock is compared with anybody else's.

    LEDGER-pool/holders/ID.000017.json     the 17th beat of a pool; the name alone shows whether it goes on
    LEDGER-pool/holders/ID.ended.json      it has let go of all it had

A pool is gone when it has ended, when its process on this very machine is no more, or when its beat has stood still for a whole
lease while somebody was watching. A pool that was only slow does no harm: see ``ledger.py``.
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
from oar_scale.shard_pool.ledger import Facts, Ledger, names_in, read_record, write_record
from oar_scale.storage import join, open_storage

log = logging.getLogger(__name__)

LAST_BEAT_S = 5.0
"""For a beat that is on its way as a pool takes its leave, perhaps with a scheduler waiting to kill it."""
_ENDED = "ended"


class Holder:
    """This pool as the others see it, for as long as the ``with`` block lasts."""

    def __init__(self, ledger: Ledger, describe: Callable[[], Facts], beat_s: float, patience_s: float = 0) -> None:
        """``describe`` is called at each beat, in another thread: what there is to say about the pool.

        ``patience_s`` is how long the first beat waits for a storage that does not answer.
        """
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._ledger, self._describe, self._beat_s, self._patience_s = ledger, describe, beat_s, patience_s
        self._self = {"host": socket.gethostname(), "pid": os.getpid(), "born_ticks": process_start(os.getpid()), "machine": machine_id()}
        self._self |= {"started": round(time.time(), 3), "beat_s": beat_s}
        self._beat, self._written = 0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="pool-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        retry_transient(lambda: self._write(f"{self._beat:06d}"), self._patience_s)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(LAST_BEAT_S)  # one that comes still later sorts before our last word
        try:
            for claim in self._ledger.claims().values():
                if claim.holder == self.id:
                    self._ledger.release(claim)
            self._write(_ENDED)
        except UserError as problem:  # what was claimed is free when the lease is over
            log.warning("the pool could not take leave of its ledger: %s", problem)

    def _go_on(self) -> None:
        while not self._over.wait(self._beat_s):
            self._beat += 1
            try:
                self._write(f"{self._beat:06d}")
            except Exception as problem:  # the next beat may succeed; until then shards may be done twice, which harms nobody
                log.warning("no heartbeat of this pool: %s", problem)

    def _write(self, beat: str) -> None:
        before, uri = self._written, join(self._ledger.beside, "holders", f"{self.id}.{beat}.json")
        write_record(uri, {**self._self, "time": round(time.time(), 3), **self._describe()})
        self._written = uri
        if before:  # as it was when we began: what a late beat finds now is our last word
            open_storage(before).delete(before)


class Watch:
    """The pools of a ledger as somebody sees them who looks now and then."""

    def __init__(self, ledger: Ledger, lease_s: float) -> None:
        self._folder, self._lease_s = join(ledger.beside, "holders"), lease_s
        self._beats: dict[str, tuple[str, float]] = {}
        self._moved: set[str] = set()
        self._records: dict[str, Facts] = {}

    def look(self) -> None:
        now, newest = time.monotonic(), _newest(self._folder)
        for holder, beat in newest.items():
            before = self._beats.get(holder, ("", now))[0]
            if beat != before:
                self._beats[holder] = beat, now
                self._moved |= {holder} if before else set()
        for holder in newest.keys() - self._records.keys():
            record = None if newest[holder] == _ENDED else read_record(join(self._folder, f"{holder}.{newest[holder]}.json"))
            if record is not None:
                self._records[holder] = record

    def gone(self, holder: str) -> bool:
        """Whether a pool holds nothing any more, as far as was seen at the last looks."""
        beat, since = self._beats.setdefault(holder, ("", time.monotonic()))
        return beat == _ENDED or _died_here(self._records.get(holder, {})) or time.monotonic() - since > self._lease_s

    def living(self) -> dict[str, Facts]:
        """What is known of the pools that seem to be alive; before one was seen to move that is a guess from its clock."""
        return {
            holder: record
            for holder, record in self._records.items()
            if not self.gone(holder) and (holder in self._moved or abs(time.time() - record["time"]) < self._lease_s)
        }


def read_holders(ledger: Ledger) -> dict[str, Facts]:
    """The last word of every pool there ever was on a ledger; ``ended`` says whether it took leave."""
    folder = join(ledger.beside, "holders")
    found = {holder: (read_record(join(folder, f"{holder}.{beat}.json")), beat) for holder, beat in _newest(folder).items()}
    return {holder: {**record, "ended": beat == _ENDED} for holder, (record, beat) in found.items() if record is not None}


def seems_alive(record: Facts, lease_s: float) -> bool:
    """A guess from one look at a record of :func:`read_holders`."""
    return not record["ended"] and not _died_here(record) and time.time() - record["time"] < lease_s


def _newest(folder: str) -> dict[str, str]:
    """The newest beat of each holder; digits sort before letters."""
    newest: dict[str, str] = {}
    for name in names_in(folder):
        holder, _, beat = name.rpartition(".")
        newest[holder] = max(beat, newest.get(holder, ""))
    return newest


def _died_here(record: Facts) -> bool:
    """Whether the pool ran on this machine and its process is no more."""
    machine = machine_id()
    here = bool(machine) and record.get("machine") == machine and "born_ticks" in record
    return here and process_start(record["pid"]) != record["born_ticks"]
