"""One driver at a time does a stage of a run: ``oar run``, ``oar train``, on whatever host.

    ROOT/drivers-pool/holders/ID.000017.json     heartbeat 17 of a driver's lease, as that of a pool (shard_pool/leases.py)
    ROOT/drivers-pool/stages/pretrain/ID.json    the driver does this stage, or is about to

A driver writes its own record first and then looks for others: of two that begin at once, one at least sees the other. What pools do is
shared (``Stage.shared``): several drivers help each other there, as the tasks of a job array are meant to, and write no such record.
Who moves results, to do stages again, writes one for each of them, and works only while no other driver has a lease at all.

A driver is gone where it has ended, where its process on this machine has, where it was an earlier attempt of this very job (whose job
file lets one attempt work at a time), or when its heartbeat has stood still for ``Timing.lease_s`` while we watched. It is alive where
its heartbeat moves on, or its process is seen on this machine.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from oar_scale.errors import UserError
from oar_scale.observe.formatting import duration
from oar_scale.registry import Stage
from oar_scale.run.context import Run
from oar_scale.shard_pool.leases import Lease, LeaseWatch, read_leases
from oar_scale.shard_pool.ledger import Ledger, Record, names_in, write_record
from oar_scale.shard_pool.pool_types import Timing
from oar_scale.storage import join, open_storage
from oar_scale.storage.patience import patience_s, patient

log = logging.getLogger(__name__)

LAST_WORDS_S = 30.0
"""How long a driver that ends waits for a storage that does not answer, at most: a scheduler may be about to kill it."""
JOB_LEASE = "OAR_LEASE"
"""The environment variable in which a job file names its own lease (``launch/job.sbatch.j2``)."""


class Drivers:
    """This driver among those of a run. Nothing is written before there is something to do.

    Args:
        clock, sleep: seconds, by which heartbeats are judged, and how to wait for them.
    """

    def __init__(
        self,
        run: Run,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._run, self._timing, self._clock, self._sleep = run, timing or Timing(), clock, sleep
        self._ledger = Ledger(run.at("drivers"))
        self._lease: Lease | None = None
        self._stage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lease is not None:
            # What cannot be removed is overlooked once the lease has expired; how the run ended is what matters.
            with patient(min(patience_s(), LAST_WORDS_S)):
                self._lease.__exit__(kind, error, trace)
                try:
                    self._forget(self._lease.holder)
                except UserError as problem:
                    log.warning("the records of this driver stay, and count for nothing from now on: %s", problem)

    def take(self, stage: Stage) -> None:
        """Begin to do a stage: alone or, where pools do it, together with other drivers.

        Raises:
            UserError: another driver does it.
        """
        holder = self._begin(stage.name)
        if stage.shared:
            self._delete(self._stage_record(stage.name, holder))  # of having moved its results: from here on others may help
        else:
            write_record(self._stage_record(stage.name, holder), {})
        self._outlive(set(names_in(self._stage_record(stage.name))) - {holder}, holder)

    def take_alone(self, stages: Iterable[Stage]) -> None:
        """Keep all other drivers away from some stages, to move their results.

        Raises:
            UserError: another driver works on this run, at whatever stage.
        """
        holder = self._begin("")
        for stage in stages:
            write_record(self._stage_record(stage.name, holder), {})
        self._outlive({other for other, record in read_leases(self._ledger).items() if not record["ended"]} - {holder}, holder)

    def _begin(self, stage: str) -> str:
        """The name of this driver's lease, which begins where it has not."""
        self._stage = stage
        if self._lease is None:
            lease = Lease(self._ledger, self._describe, self._timing.heartbeat_s, self._run.recipe.storage.patience_s)
            self._lease = lease.__enter__()
        return self._lease.holder

    def _describe(self) -> Record:
        return {"stage": self._stage, "job_lease": os.environ.get(JOB_LEASE, "")}

    def _outlive(self, others: set[str], holder: str) -> None:
        """Return when other drivers are known to be gone. Raises UserError, without our own records, when one is known to be alive."""
        watch, waits = LeaseWatch(self._ledger, self._timing.lease_s, self._clock), False
        while others:
            watch.poll()
            for other in sorted(others):
                record = watch.record(other)
                if watch.expired(other) or _is_earlier_attempt(record):
                    self._forget(other)
                    others = others - {other}
                elif watch.is_alive(other):
                    self._forget_stages(holder)
                    raise UserError(self._refusal(record))
            if others and not waits:
                waits, at_most = True, duration(self._timing.lease_s)
                self._run.console.say(
                    f"  another driver has worked on {self._run.at()}: waiting up to {at_most} to see whether it still does"
                )
            if others:
                self._sleep(self._timing.poll_s)

    def _refusal(self, record: Record) -> str:
        since = duration(max(0.0, time.time() - record["started"]))
        stage = f", {record['stage']}" if record.get("stage") else ""
        return (
            f"{self._run.at()}: another driver works on this run (host {record['host']}, pid {record['pid']}, for {since}{stage}).\n"
            "Wait for its end, or stop it: Ctrl-C there, or oar cancel for a job. One that was killed is taken over from by itself."
        )

    def _stage_record(self, stage: str, *holder: str) -> str:
        """The record that a driver does a stage; without a driver, the folder of these."""
        return join(self._ledger.pool_folder, "stages", stage, *(f"{each}.json" for each in holder))

    def _forget(self, holder: str) -> None:
        """Remove all records of a driver that is gone."""
        self._forget_stages(holder)
        folder = join(self._ledger.pool_folder, "holders")
        for uri in open_storage(folder).list(folder):
            if uri.removeprefix(f"{folder}/").startswith(f"{holder}."):
                self._delete(uri)

    def _forget_stages(self, holder: str) -> None:
        folder = join(self._ledger.pool_folder, "stages")
        for uri in open_storage(folder).list(folder):
            if uri.endswith(f"/{holder}.json"):
                self._delete(uri)

    def _delete(self, uri: str) -> None:
        open_storage(uri).delete(uri)


def _is_earlier_attempt(record: Record) -> bool:
    """Whether a driver belonged to the same job file's lease, which we hold now."""
    lease = record.get("job_lease")
    return bool(lease) and lease == os.environ.get(JOB_LEASE)
