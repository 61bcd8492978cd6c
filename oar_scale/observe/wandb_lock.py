"""One process at a time sends the events of a stage to W&B.

The sender (:mod:`oar_scale.observe.wandb_process`) holds an exclusive lock on ``STAGE.wandb.lock`` beside the event files for as
long as it or wandb's own server runs. The file names the holder, so that the next sender can decide what to do:

    the holder's driver is alive             the holder reads all event files, also ours: leave it to the holder when our stage ends
    it is alive, and the holder is closing   the holder may have read its last event: wait until it has ended
    it is gone (killed)                      the holder closes by itself in bounded time; where it does not, or our own stage ends
                                             before, kill it and take over

Killing a sender is safe at any time: the next one asks the server how many rows it has and resumes there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from typing import Self

import psutil

from oar_scale.runtime.process_identity import machine_id, process_start

POLL_S = 0.2
TAKE_OVER_S = 40.0
"""How long a sender whose driver is gone may continue beside a running stage: longer than it takes by itself."""


@dataclass(frozen=True)
class LockHolder:
    """The process that holds the lock, read from its file."""

    host: str
    machine: str
    """Where the process ids below mean something (:func:`oar_scale.runtime.process_identity.machine_id`)."""
    pid: int
    started: int
    driver: int
    driver_started: int
    closing: bool
    """Whether the holder may already have read its last event."""

    @classmethod
    def this_process(cls, driver: int, closing: bool) -> Self:
        """The calling process, started by ``driver``."""
        pid = os.getpid()
        return cls(socket.gethostname(), machine_id(), pid, process_start(pid), driver, process_start(driver), closing)

    def abandoned(self) -> bool:
        """Whether it is known that its driver has ended; of another machine nothing is known."""
        running = self.driver_started != 0 and process_start(self.driver) == self.driver_started
        return self._is_here() and not running

    def kill(self) -> None:
        """Kill the sender and wandb's server, if it is still the process that took the lock."""
        if self._is_here() and process_start(self.pid) == self.started:
            with contextlib.suppress(psutil.Error):
                kill_tree(psutil.Process(self.pid))

    def _is_here(self) -> bool:
        return self.machine != "" and self.machine == machine_id()


class SenderLock:
    """The lock of one stage."""

    def __init__(self, events: str, stage: str, driver: int) -> None:
        """Open the lock file without taking the lock.

        Args:
            events: local folder of the run's events.
            driver: process id of the driver that this sender works for.
        """
        self._file = os.open(os.path.join(events, f"{stage}.wandb.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._driver = driver
        self._guard = threading.Lock()
        self._held = self._closing = False

    def acquire(self, ended: threading.Event, last_wait_s: float) -> bool:
        """Take the lock, from a holder whose driver is gone by force if need be.

        Args:
            ended: set when the caller's own stage has ended.
            last_wait_s: how long to wait after that for a holder that is closing or unknown.

        Returns:
            False where the stage ended while another sender holds the lock.
        """
        abandoned_at: float | None = None
        ended_at: float | None = None
        while not self._try():
            now, holder, last = time.monotonic(), self.holder(), ended.is_set()
            if last and ended_at is None:
                ended_at = now
            if holder is not None and holder.abandoned():
                abandoned_at = now if abandoned_at is None else abandoned_at
                if last or now - abandoned_at > TAKE_OVER_S:
                    holder.kill()
            elif ended_at is not None and ((holder is not None and not holder.closing) or now - ended_at > last_wait_s):
                return False
            if last:
                time.sleep(POLL_S)
            else:
                ended.wait(POLL_S)
        return True

    def closing(self) -> None:
        """Say that events written from now on may not be read any more. To be called before the last ones are read."""
        with self._guard:
            self._closing = True
            if self._held:
                self._write()

    def holder(self) -> LockHolder | None:
        """The process that holds the lock; None where that is not written (yet)."""
        try:
            return LockHolder(**json.loads(os.pread(self._file, 4096, 0)))
        except (ValueError, TypeError):
            return None

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        with self._guard:
            self._held = True
            self._write()
        return True

    def _write(self) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(asdict(LockHolder.this_process(self._driver, self._closing))).encode(), 0)


def kill_tree(process: psutil.Process) -> None:
    """Kill a sender and what it started (wandb's own server has a session of its own)."""
    with contextlib.suppress(psutil.Error):
        process.suspend()  # so that it starts nothing new meanwhile
        kill_descendants(process)
    with contextlib.suppress(psutil.Error):
        process.kill()


def kill_descendants(process: psutil.Process) -> None:
    """Kill what a process started."""
    with contextlib.suppress(psutil.Error):
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
