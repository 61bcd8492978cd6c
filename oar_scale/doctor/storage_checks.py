"""Checks of what a recipe writes to and connects to: storage, local disk, shared memory, W&B."""

from __future__ import annotations

import os
import shutil
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from oar_scale.doctor.finding import Finding
from oar_scale.errors import UserError

T = TypeVar("T")
STORAGE_TIMEOUT_S = 20.0
SERVER_TIMEOUT_S = 5.0
LOW_DISK_GIB = 5.0
LOW_SHM_MIB = 256.0
"""Ray's object store takes 80 MB of /dev/shm, NCCL some more; containers often have 64 MB."""


class _Timeout(UserError):
    """The storage did not answer within ``STORAGE_TIMEOUT_S``."""


def storage_root(root: str) -> Iterator[Finding]:
    """Write a small object, read it back, delete it.

    Raises:
        UserError: what the storage answers; it names the URI and the remedy.
    """
    try:
        seconds = _in_time(root, _round_trip)
    except _Timeout as timeout:
        yield Finding("FAIL", "storage root", str(timeout))
    else:
        yield Finding("ok", "storage root", f"{root}: wrote, read and deleted an object in {seconds:.2f} s")


def storage_speed(root: str, megabytes: int = 32) -> Iterator[Finding]:
    """Time the write and the read of a large object, and see that a second writer of the same object is refused.

    Raises:
        UserError: as :func:`storage_root`.
    """
    written_s, read_s, refused = _in_time(root, partial(_large_trip, megabytes=megabytes))
    speed = f"wrote {megabytes / written_s:.0f} MB/s, read {megabytes / read_s:.0f} MB/s"
    if refused:
        yield Finding("ok", "storage speed", f"{speed}; a second writer of the same object is refused")
    else:
        text = f"{speed}; a second writer of the same object is NOT refused, so two could do the same work"
        yield Finding("FAIL", "storage speed", f"{text}: use a server that knows If-None-Match, or a file system with hard links")


def _in_time(root: str, action: Callable[[str], T]) -> T:
    """Run the action in a thread, and stop waiting after ``STORAGE_TIMEOUT_S``: clients retry for minutes when a server does not answer.

    Raises:
        _Timeout: no answer in time. Errors of the action are raised as they are.
    """
    outcome: list[T | Exception] = []

    def try_it() -> None:
        try:
            outcome.append(action(root))
        except Exception as error:
            outcome.append(error)

    worker = threading.Thread(target=try_it, daemon=True)
    worker.start()
    worker.join(STORAGE_TIMEOUT_S)
    if not outcome:
        remedy = "check the network and AWS_ENDPOINT_URL" if root.startswith("s3://") else "check the file system"
        raise _Timeout(f"{root}: no answer in {STORAGE_TIMEOUT_S:.0f} s; {remedy}")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _large_trip(root: str, megabytes: int) -> tuple[float, float, bool]:
    """Seconds to write, seconds to read, whether a second writer was refused."""
    from oar_scale.storage import open_storage

    storage, uri, data = open_storage(root), own_object(root), os.urandom(megabytes * 10**6)
    started = time.perf_counter()
    storage.write(uri, data, if_absent=True)
    written = time.perf_counter()
    back = storage.read(uri)
    read = time.perf_counter()
    refused = not storage.write(uri, b"second", if_absent=True)
    storage.delete(uri)
    _check_same(root, back, data)
    return written - started, read - written, refused


def _round_trip(root: str) -> float:
    """Seconds to write, read back and delete a small object."""
    from oar_scale.storage import open_storage

    storage, uri, data = open_storage(root), own_object(root), os.urandom(1024)
    started = time.perf_counter()
    storage.write(uri, data)
    back = storage.read(uri)
    storage.delete(uri)
    _check_same(root, back, data)
    return time.perf_counter() - started


def own_object(root: str) -> str:
    """A new URI below ``root`` that no other process uses."""
    from oar_scale.storage import join

    return join(root, f".oar-doctor-{uuid.uuid4().hex[:8]}")


@contextmanager
def remove_created_folders(root: str | None) -> Iterator[None]:
    """Remove, on leaving, the folders on the way to ``root`` that did not exist on entering.

    Of nodes that share the folders, the first to enter must be the last to leave.
    """
    absent = [] if root is None or root.startswith("s3://") else [folder for folder in _upwards(root) if not folder.exists()]
    try:
        yield
    finally:
        for folder in absent:  # the innermost first
            with suppress(OSError):  # something is in it, or another node was quicker
                folder.rmdir()


def _check_same(root: str, back: bytes, data: bytes) -> None:
    if back != data:
        raise UserError(f"{root}: gives back other bytes than were written. Use another disk or server for storage.root.")


def _upwards(path: str) -> list[Path]:
    absolute = Path(path).absolute()
    return [absolute, *absolute.parents]


def disk(folder: str) -> Iterator[Finding]:
    """Free space where the run keeps its events, cache and checkpoints."""
    existing = next(at for at in _upwards(folder) if at.is_dir())
    free = shutil.disk_usage(existing).free / 2**30
    text = f"{folder}: {free:.1f} GiB free"
    if free < LOW_DISK_GIB:
        yield Finding("warn", "run_dir", f"{text}, under {LOW_DISK_GIB:.0f}; free some space, or set run_dir to another disk")
    else:
        yield Finding("ok", "run_dir", text)


def shared_memory(folder: str = "/dev/shm") -> Iterator[Finding]:
    """Memory that Ray's and NCCL's processes share."""
    if not os.path.isdir(folder):
        yield Finding("ok", folder, "this system has none; Ray uses files instead")
        return
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB free"
    if usage.free / 2**20 < LOW_SHM_MIB:
        yield Finding("warn", folder, f"{text}, under {LOW_SHM_MIB:.0f}; start the container with --shm-size=1g")
    else:
        yield Finding("ok", folder, text)


def weights_and_biases(mode: str) -> Iterator[Finding]:
    """Whether the recipe's mode has the key it needs."""
    if mode != "online":
        yield Finding("ok", "W&B", mode)
        return
    import wandb

    from oar_scale.observe.wandb_run import has_key

    server = wandb.setup().settings.base_url
    if has_key(server):
        yield Finding("ok", "W&B", f"online at {server}, with a key")
    else:
        yield Finding("warn", "W&B", f"online, and no key for {server}, so runs are kept offline; set WANDB_API_KEY, or wandb login")


def wandb_server(mode: str) -> Iterator[Finding]:
    """Whether this machine reaches the W&B server; nothing is logged there."""
    if mode != "online":
        return
    import wandb

    server = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(server, timeout=SERVER_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # an answer of any status shows that the server is reachable
    except OSError as error:
        text = f"{server} does not answer ({error}), so runs are kept offline; open the way there, or set observe.wandb: offline"
        yield Finding("warn", "W&B server", text)
        return
    yield Finding("ok", "W&B server", f"{server} answers")
