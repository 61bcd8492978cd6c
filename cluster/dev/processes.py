"""What the services in this folder share: processes identified by number and start time, free ports, a lock of a folder."""

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

from oar_scale.runtime.process_identity import process_start

T = TypeVar("T")
_reserved: list[socket.socket] = []


def find_process(pid: int, created: int) -> psutil.Process | None:
    """The process with this number and start time, while it runs; never another one that got the number later.

    Args:
        pid: its number.
        created: what ``process_start`` returned for it.
    """
    if not created or process_start(pid) != created:
        return None
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def ports_in_use(ports: Iterable[int]) -> list[int]:
    """The given ports that are in use on any address: a server that listens on all addresses needs a port that is free on each."""
    used = []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                used.append(port)
    return used


def free_port(among: range, needed: Callable[[int], Iterable[int]]) -> int:
    """Find a free port and reserve it until this process ends.

    A service may start to listen only seconds later, and may be stopped and started again on its port: until then other processes that call
    this function get other ports.

    Args:
        among: candidates. Processes that search at the same time start at different ones.
        needed: all ports that have to be free for a candidate.

    Raises:
        RuntimeError: none is free.
    """
    for i in range(len(among)):
        port = among[(os.getpid() + i) % len(among)]
        if not ports_in_use(needed(port)) and _reserve(port):
            return port
    raise RuntimeError(f"no free ports from {among[0]} to {among[-1]}")


def _reserve(port: int) -> bool:
    """Reserve a port until this process ends; False if another process has reserved it.

    The mark is an abstract Unix socket (Linux only): a name belongs to one process at a time and ends with it. Like the port
    itself, the name belongs to the network namespace of this process.
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


def process_tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and all its living descendants; empty if it has ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until_gone(everyone: Iterable[psutil.Process], grace_s: float) -> None:
    """Wait until all processes have ended, and kill those that still run after ``grace_s`` seconds. A zombie has ended.

    Raises:
        RuntimeError: one still runs a minute after it was killed.
    """
    left, deadline = list(everyone), time.monotonic() + grace_s
    while left := [each for each in left if is_alive(each)]:
        if (overdue := time.monotonic() - deadline) > 60:
            raise RuntimeError(f"{left[0]} does not end")
        if overdue > 0:
            for each in left:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs: a zombie does not, and another process with its number does not count."""
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
def folder_lock(folder: str) -> Iterator[None]:
    """Hold the lock of a folder: only one ``up`` or ``down`` runs at a time."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wait_until(condition: Callable[[], T], timeout_s: float, problem: str) -> T:
    """Poll ``condition()`` and return its first true value. Raises RuntimeError with ``problem`` after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{problem} (waited {timeout_s:.0f} s)")
        time.sleep(0.05)
    return value
