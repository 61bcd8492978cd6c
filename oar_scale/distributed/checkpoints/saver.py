"""Save checkpoints while training continues.

    main thread    |-- DeepSpeed's save to the local disk --|  training ...
    upload thread                                           |-- all written? -- upload -- all uploaded? -- commit -- prune --|

Every rank has an upload thread; they communicate over a process group of their own. If one rank fails, the whole attempt is abandoned: its
files are removed, the outcome says why, and training continues. The next save waits for the thread: an upload that has failed before is
not retried then, one that makes progress may finish, which is progress of the workers too.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from oar_scale.distributed.checkpoints import layout
from oar_scale.distributed.checkpoints.deepspeed_types import ShardedEngine
from oar_scale.distributed.checkpoints.layout import DamagedCheckpoint
from oar_scale.distributed.checkpoints.retention import Keep, Retention, prune
from oar_scale.distributed.checkpoints.scratch import Scratch, clear_dead
from oar_scale.json_object import JsonObject
from oar_scale.runtime.retry import Backoff, RetryStopped, retry
from oar_scale.storage import join, open_storage
from oar_scale.storage.background import start
from oar_scale.training.job import TrainingJob

T = TypeVar("T")

PATIENCE_S = 900.0
"""How long an upload that fails is tried again, unless the next save comes before."""
BACKOFF_S, BACKOFF_MAX_S = 0.5, 30.0
LIBRARIES = ("oar_scale", "torch", "deepspeed", "numpy")
_LONGEST = timedelta(days=1)  # ranks wait for the slowest upload; a dead peer ends the wait at once
_POLL_S = 0.02
_LOOK_S = 1.0
"""How often ranks that wait for an upload tell one another how far it is."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveOutcome:
    """The result of a save; only rank 0 has it."""

    step: int
    seconds: float
    """How long training was blocked, including ``wait_s`` for the save before."""
    wait_s: float
    upload_s: float
    """From then on until it was committed or abandoned."""
    bytes: int
    """Size of all ranks' files."""
    uri: str
    fault: str | None = None
    """Why it is not committed, or None."""


@dataclass
class _Save:
    """One rank's part of a save."""

    step: int
    name: str
    scratch: Scratch
    manifest: JsonObject
    files: dict[str, dict[str, int]]
    fault: str | None
    begun: float
    seconds: float
    wait_s: float
    reported: bool = False


class Saver:
    """Saves an engine's checkpoints. Collective: every rank makes one and calls the same methods in the same order.

    Args:
        job: the stage whose checkpoints are saved.
        heartbeat: called with what comes next while the next save waits for an upload that makes progress.
        patience_s: how long a failing upload is retried.
    """

    def __init__(
        self, job: TrainingJob, heartbeat: Callable[[str], object] = lambda doing: None, *, patience_s: float = PATIENCE_S
    ) -> None:
        global _last
        if _last is not None:
            _last._finish_upload()  # after a roll-back, the save of the attempt before could otherwise commit during ours
        _last = self
        self._job, self._heartbeat, self._patience_s = job, heartbeat, patience_s
        self._rank = dist.get_rank()
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_LONGEST))  # every rank is in it
        self._waiting = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_LONGEST))  # of the main threads
        self._moved = 0
        self._metadata: JsonObject = {}
        if self._rank == 0:
            self._metadata = {"stage": job.stage, "identity": job.identity, "libraries": {name: version(name) for name in LIBRARIES}}
        self._retention = Retention(Keep.of(job.training))
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._save: _Save | None = None
        self._finished: deque[SaveOutcome] = deque()
        clear_dead(job.scratch)

    def save(self, engine: ShardedEngine, step: int, state: JsonObject) -> None:
        """Write the engine's checkpoint of ``step`` to the local disk, and start to upload it. Collective.

        Args:
            engine: DeepSpeed's engine.
            step: the training step.
            state: JSON that :func:`restore` returns; that of rank 0 is stored. ``state["metrics"]`` decides which checkpoints are the best.
        """
        from oar_scale.distributed.checkpoints.deepspeed_files import save_shards

        started = time.monotonic()
        self._finish_upload()
        waited = time.monotonic()
        name = self._broadcast(layout.new_save())
        scratch = Scratch(self._job.scratch, f"{name}-{self._rank}")
        files = save_shards(engine, scratch.path, name, {"step": step})
        self._save = _Save(
            step=step,
            name=name,
            scratch=scratch,
            manifest=self._manifest(engine, step, state) if self._rank == 0 else {},
            files=files.files,
            fault=scratch.fault or files.fault,
            begun=started,
            seconds=time.monotonic() - started,
            wait_s=waited - started,
        )
        self._hurry.clear()
        self._thread = threading.Thread(target=self._run_upload, args=(self._save,), name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    def outcomes(self) -> list[SaveOutcome]:
        """The results of saves since the last call; empty at other ranks than 0."""
        outcomes = []
        while self._finished:
            outcomes.append(self._finished.popleft())
        return outcomes

    def finish(self, timeout_s: float) -> list[SaveOutcome]:
        """Wait for the last save, at most ``timeout_s`` seconds, and return as :meth:`outcomes`.

        A save that is not done by then is reported as failed; it may still succeed while the process lives.
        """
        if self._thread is not None and self._save is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._hurry.set()
                self._report(self._save, {}, f"was not uploaded within {timeout_s:g} s")
        return self.outcomes()

    def _finish_upload(self) -> None:
        """Wait for the upload thread; uploads that have failed before are not retried meanwhile. Collective.

        While the files of one rank move, none of them hangs: those that are done wait for it.
        """
        if self._thread is None:
            return
        self._hurry.set()
        last = -1
        while True:
            self._thread.join(_LOOK_S)
            numbers = torch.tensor([self._thread.is_alive(), self._moved])
            dist.all_reduce(numbers, group=self._waiting)
            running, moved = numbers.tolist()
            if not running:
                return
            if moved != last:
                last = moved
                self._heartbeat("the upload of the checkpoint before")

    def _broadcast(self, value: T) -> T:
        """The value of rank 0. Collective."""
        values = [value]
        dist.broadcast_object_list(values, group=self._group)
        return values[0]

    def _gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank. Collective."""
        values = [value] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _manifest(self, engine: ShardedEngine, step: int, state: JsonObject) -> JsonObject:
        json.dumps(state)  # fails here, in the caller, where it is no JSON
        return {
            **self._metadata,
            "step": step,
            "saved_at": time.time(),
            "world_size": dist.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "model_spec": engine.module.model.spec.model_dump(mode="json"),
            "state": state,
        }

    # -- in the upload thread ----------------------------------------------------------------------------------------------------------

    def _run_upload(self, save: _Save) -> None:
        uri = layout.step_uri(self._job.checkpoints, save.step)
        files: dict[str, dict[str, int]] = {}
        try:
            fault, files = self._upload_and_commit(save, uri)
        except Exception as error:  # most likely another rank has died; then training's own collectives end the attempt
            fault = f"{type(error).__name__}: {error}"
            _log.warning("%s: %s", uri, fault)
        finally:
            save.scratch.remove()
        if fault is None and self._rank == 0:
            self._prune()
        self._report(save, files, fault)

    def _upload_and_commit(self, save: _Save, uri: str) -> tuple[str | None, dict[str, dict[str, int]]]:
        """Upload and commit; returns why that failed, or None, and the files of all ranks."""
        gathered = self._gather((save.files, save.fault))
        files = {name: {**entry, "rank": rank} for rank, (part, _) in enumerate(gathered) for name, entry in part.items()}
        fault = _first(fault for _, fault in gathered)
        if fault is None:
            fault = _first(self._gather(self._upload(save, uri)))
        if fault is not None:
            self._abandon(save, uri)
        elif self._rank == 0:
            fault = self._commit(save, uri, files)
        return fault, files

    def _commit(self, save: _Save, uri: str, files: dict[str, dict[str, int]]) -> str | None:
        """Commit; returns why that failed, or None."""
        refused: list[str] = []

        def attempt() -> None:
            try:
                layout.commit(uri, save.name, {**save.manifest, "files": files})
            except DamagedCheckpoint as error:
                refused.append(str(error))

        fault = self._retry(attempt)
        if refused:
            self._remove(save, uri, files)
            return refused[0]
        return fault  # the files stay: the marker may have been written although no answer came

    def _report(self, save: _Save, files: dict[str, dict[str, int]], fault: str | None) -> None:
        if self._rank != 0 or save.reported:
            return
        save.reported = True
        upload_s, size = time.monotonic() - save.begun - save.seconds, sum(entry["bytes"] for entry in files.values())
        uri = layout.step_uri(self._job.checkpoints, save.step)
        self._finished.append(SaveOutcome(save.step, save.seconds, save.wait_s, upload_s, size, uri, fault))

    def _upload(self, save: _Save, uri: str) -> str | None:
        """Upload this rank's files; returns why one could not be uploaded, or None."""
        for name in save.files:
            path, target = os.path.join(save.scratch.path, save.name, name), join(uri, save.name, name)
            fault = self._retry(partial(_deliver, path, target, self._count))
            if fault is not None:
                return fault
            self._count(0)  # the whole of a file that only got another name
        return None

    def _count(self, moved: int) -> None:
        self._moved += 1  # whichever way: bytes that have to go again are no standstill

    def _retry(self, action: Callable[[], object]) -> str | None:
        """Call ``action`` until it succeeds; returns None, or the last error if that takes too long or the next save is about to start."""
        deadline, backoff = time.monotonic() + self._patience_s, Backoff(BACKOFF_S, BACKOFF_MAX_S)
        failure: Exception | None = None

        def attempt() -> None:
            nonlocal failure
            work = start(action)
            self._await(work, failed_before=failure is not None)
            if not work.done():
                raise RetryStopped
            try:
                work.result()
            except Exception as error:
                failure = error
                raise

        def transient(error: BaseException) -> bool:
            return isinstance(error, Exception) and not isinstance(error, RetryStopped)

        try:
            retry(attempt, backoff, transient=transient, give_up=lambda: time.monotonic() + backoff.pause_s >= deadline, stop=self._hurry)
        except Exception:
            return f"given up: {failure}"
        return None

    def _await(self, work: Future[object], failed_before: bool) -> None:
        """Wait until ``work`` is done; where it has failed before, stop waiting when the next save is about to start."""
        while not work.done() and not (failed_before and self._hurry.is_set()):
            time.sleep(_POLL_S)

    def _abandon(self, save: _Save, uri: str) -> None:
        """Remove what this rank may have uploaded."""
        self._remove(save, uri, save.files)

    def _remove(self, save: _Save, uri: str, files: Iterable[str]) -> None:
        """Remove files of a save. What cannot be removed is a left-over that a later prune removes."""
        try:
            layout.delete(uri, [f"{save.name}/{name}" for name in (*files, layout.MANIFEST)])
        except Exception as error:
            _log.warning("%s: the files of an abandoned save could not be removed: %s", uri, error)

    def _prune(self) -> None:
        try:
            prune(layout.checkpoint_locations(self._job.checkpoints), self._retention, time.time())
        except Exception as error:
            _log.warning("%s: old checkpoints could not be removed; the next save retries: %s", self._job.checkpoints, error)


_last: Saver | None = None
"""The newest saver of this process."""


def _first(faults: Iterable[str | None]) -> str | None:
    return next((fault for fault in faults if fault is not None), None)


def _deliver(path: str, uri: str, moved: Callable[[int], object]) -> None:
    """Upload a file to S3, copy it to another disk, or rename it where it is on the same one."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # a disk that cannot keep the bytes reports it here
    if not uri.startswith("s3://"):
        os.makedirs(os.path.dirname(uri), exist_ok=True)
        if os.stat(path).st_dev == os.stat(os.path.dirname(uri)).st_dev:
            os.replace(path, uri)
            return
    open_storage(uri).upload(path, uri, moved)
