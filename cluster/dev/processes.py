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


def find(pid: int, created: float) -> psutil.Process | None:
    """The process that got this number at this time, while it lives; not another one that got the number later."""
    try:
        process = psutil.Process(pid)
        alive = abs(process.create_time() - created) < 0.1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def taken(host: str, ports: Iterable[int]) -> list[int]:
    """Which of these ports are in use."""
    found = []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                found.append(port)
    return found


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
