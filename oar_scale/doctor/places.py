"""The places and services that a recipe names: storage, local disk, shared memory, W&B."""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from oar_scale.doctor.finding import Finding
from oar_scale.errors import UserError

STORAGE_TIMEOUT_S = 20.0
LOW_DISK_GIB = 5.0
LOW_SHM_MIB = 256.0
"""Ray's object store takes 80 MB of /dev/shm, NCCL some more; containers often have 64 MB."""


def storage_root(root: str) -> Iterator[Finding]:
    """Write a small object, read it back, delete it.

    Raises:
        UserError: what the storage says; it names the place and the remedy.
    """
    outcome: list[Exception | float] = []

    def try_it() -> None:
        try:
            outcome.append(_round_trip(root))
        except Exception as error:
            outcome.append(error)

    worker = threading.Thread(target=try_it, daemon=True)  # a server that does not answer keeps its client waiting for minutes
    worker.start()
    worker.join(STORAGE_TIMEOUT_S)
    if not outcome:
        remedy = "check the network and AWS_ENDPOINT_URL" if root.startswith("s3://") else "check the file system"
        yield Finding("FAIL", "storage root", f"{root}: no answer in {STORAGE_TIMEOUT_S:.0f} s; {remedy}")
    elif isinstance(outcome[0], Exception):
        raise outcome[0]
    else:
        yield Finding("ok", "storage root", f"{root}: wrote, read and deleted an object in {outcome[0]:.2f} s")


def _round_trip(root: str) -> float:
    """Seconds that it took."""
    from oar_scale.storage import join, open_storage

    storage, uri, data = open_storage(root), join(root, f".oar-doctor-{uuid.uuid4().hex[:8]}"), os.urandom(1024)
    absent = [] if root.startswith("s3://") else [folder for folder in _upwards(root) if not folder.exists()]
    started = time.perf_counter()
    try:
        storage.write(uri, data)
        back = storage.read(uri)
        storage.delete(uri)
    finally:
        for folder in absent:  # the innermost first: a folder that was not there before is not left behind
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    if back != data:
        raise UserError(f"{root}: gives back other bytes than were written. Use another disk or server for storage.root.")
    return time.perf_counter() - started


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
