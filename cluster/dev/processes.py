"""What the services in this folder share: a process that is still the one that was started, ports that are free, one ``up`` at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import psutil

T = TypeVar("T")


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

    Raises:
        RuntimeError: there is none.
    """
    for i in range(len(among)):
        port = among[(os.getpid() + i) % len(among)]
        if not taken(needed(port)):
            return port
    raise RuntimeError(f"no free ports from {among[0]} to {among[-1]}")


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
