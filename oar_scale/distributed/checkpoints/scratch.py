"""Folders on the local disk that are removed after their process has ended, however it ends.

A process locks a file beside its folder, and the lock ends with the process. The next process that starts on the same disk removes folders
whose lock is free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress

from oar_scale.storage.own_folder import foreign_part

_PREFIX = "checkpoint-"


class Scratch:
    """A folder ``path`` of this process. Where it cannot be made, ``fault`` says why."""

    def __init__(self, parent: str, name: str) -> None:
        self.path = os.path.join(parent, f"{_PREFIX}{name}")
        self.fault: str | None = None
        self._lock: int | None = None
        if foreign := foreign_part(parent):
            self.fault = f"{foreign}: was made by another user. Set storage.scratch_dir to a folder of your own"
            return
        try:
            os.makedirs(parent, exist_ok=True)
            self._lock = _locked(f"{self.path}.lock")
            os.makedirs(self.path)
        except OSError as error:
            self.fault = f"{self.path}: {error.strerror}"

    def remove(self) -> None:
        """Remove it with all that is in it; may be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            with suppress(OSError):
                os.unlink(f"{self.path}.lock")
            os.close(self._lock)
            self._lock = None


def _locked(path: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # another process has removed it as left over before it was locked here


def clear_dead(parent: str) -> None:
    """Remove the folders of processes that have ended below ``parent``."""
    with suppress(OSError):
        for name in sorted(os.listdir(parent)):
            if name.startswith(_PREFIX) and name.endswith(".lock"):
                _clear(os.path.join(parent, name.removesuffix(".lock")))


def _clear(path: str) -> None:
    with suppress(OSError):
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            os.unlink(f"{path}.lock")
        finally:
            os.close(descriptor)
