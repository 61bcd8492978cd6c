"""What the services in this folder share: a process that is still the one that was started, ports that are free, one ``up`` at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import psutil

T = TypeVar("T")
_reserved: list[socket.socket] = []


def born(pid: int) -> int:
    """When a process was started, in clock ticks since the machine was: a change of the clock does not change it.

    Raises:
        OSError: there is none.
    """
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[19])  # field 22; a name may have spaces


def find(pid: int, created: int) -> psutil.Process | None:
    """The process that got this number at this time, while it lives; not another one that got the number later."""
    try:
        process = psutil.Process(pid)
        alive = born(pid) == created and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, OSError):
        return None
    return process if alive else None


def taken(ports: Iterable[int]) -> list[int]:
    """Which of these ports are in use on any address: who listens on all addresses needs a port that is free on each."""
    found = []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                found.append(port)
    return found


def free_port(among: range, needed: Callable[[int], Iterable[int]]) -> int:
    """Find a port that is free, with all that ``needed`` tells for it. Processes that look at the same time begin at different places.

    It stays this process': between the look and the time when a service listens lie seconds, and a service may be stopped and started
    again on its port. Who else looks here meanwhile is told another one.

    Raises:
        RuntimeError: there is none.
    """
    for i in range(len(among)):
        port = among[(os.getpid() + i) % len(among)]
        if not taken(needed(port)) and _reserve(port):
            return port
    raise RuntimeError(f"no free ports from {among[0]} to {among[-1]}")


def _reserve(port: int) -> bool:
    """Whether nobody else has reserved it; until this process ends it is ours.

    The mark is a Unix socket without a file (Linux has them): one process has a name at a time, and none outlives it. Like the port
    itself, the name is one of the network that this process is in.
    """
    if sys.platform != "linux":
        return True
    mark = socket.socket(socket.AF_UNIX)
    try:
        mark.bind(f"\0oar-dev-port-{port}")
    except OSError:
        mark.close()
        return False
    _reserved.append(mark)
    return True


def family(process: psutil.Process) -> list[psutil.Process]:
    """The process and all that it has started, and that they have; those that live."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def bury(everyone: Iterable[psutil.Process], patience_s: float) -> None:
    """Wait until all of them are gone, and kill those that have not ended after a while. A zombie is gone: others are to collect it.

    Raises:
        RuntimeError: one outlives its kill by a minute.
    """
    left, deadline = list(everyone), time.monotonic() + patience_s
    while left := [each for each in left if lives(each)]:
        if (late := time.monotonic() - deadline) > 60:
            raise RuntimeError(f"{left[0]} does not end")
        if late > 0:
            for each in left:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        time.sleep(0.05)


def lives(process: psutil.Process) -> bool:
    """Whether it runs: a zombie does not, nor does another process that has got its number."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def last_lines(path: str, count: int = 20) -> str:
    """The end of a log, for the error that would otherwise only name it."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return "".join(file.readlines()[-count:]).rstrip() or "(empty)"
    except OSError as error:
        return f"({error.strerror})"


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """One ``up`` or ``down`` at a time."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def until(condition: Callable[[], T], timeout_s: float, problem: str) -> T:
    """Return the first true value of ``condition()``; RuntimeError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{problem} (waited {timeout_s:.0f} s)")
        time.sleep(0.05)
    return value
