"""A folder of cached objects that all processes of a host share, bounded in bytes, with no process in charge.

    DIGEST.CRC32C.shard    an object, whole; its modification time is that of the last request for it
    DIGEST.part            an object on its way: its writer holds a lock on this file, which ends with the process
    .lock                  held for the milliseconds in which space is freed

A ``.part`` file is as long as the object from the start, so that what is on its way counts as taken: the names in the folder
never add up to more than ``max_bytes``. An evicted file stays on the disk for as long as a process has it mapped.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from oar_scale.storage.own_folder import foreign_part

_POLL_S = 0.02
STUCK_S = 150.0
"""A ``.part`` file that does not grow for so long has a writer that hangs; longer than any read waits for a byte."""


class CacheUnusable(Exception):
    """The folder cannot take this object; the text is the reason."""


class DamagedObject(Exception):
    """An object is not what was expected; the text names both."""


def compare(size: int, crc32c: int | None, expected_size: int | None, expected_crc32c: int | None) -> None:
    """Raise DamagedObject unless size and checksum are the expected ones; ``None`` = not known."""
    if expected_size not in (None, size):
        raise DamagedObject(f"{size} bytes, and {expected_size} were expected")
    if crc32c is not None and expected_crc32c is not None and crc32c != expected_crc32c:
        raise DamagedObject(f"its crc32c is {crc32c:08x}, and {expected_crc32c:08x} was expected")


class Part:
    """An object being written by this process, and the lock on it."""

    def __init__(self, descriptor: int, path: str) -> None:
        self.descriptor, self._path, self._held = descriptor, path, False
        self.inode = os.fstat(descriptor).st_ino

    def __del__(self) -> None:
        # Not earlier: a thread that still writes must not meet another file under the same number.
        os.close(self.descriptor)

    def lock(self) -> None:
        """Wait for the lock. Raises CacheUnusable when its holder hangs."""
        seen, since = -1, time.monotonic()
        while not _lock(self.descriptor):
            changed = os.fstat(self.descriptor).st_mtime_ns
            if changed != seen:
                seen, since = changed, time.monotonic()
            elif time.monotonic() - since > STUCK_S:
                raise CacheUnusable(f"another process has held {self._path} for {STUCK_S:.0f} s without writing to it")
            time.sleep(_POLL_S)
        self._held = True

    def in_place(self) -> bool:
        """Whether this is still the file of that name."""
        return _is(self._path, self.descriptor)

    def write(self, data: bytes, offset: int) -> None:
        """Write all of ``data``. Raises OSError, for instance when the disk is full."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self.descriptor, view, offset)
            view, offset = view[written:], offset + written

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes that were written. Raises OSError."""
        data = os.pread(self.descriptor, count, offset)
        if len(data) != count:
            raise OSError(errno.EIO, f"{self._path} was cut off by someone else")
        return data

    def resize(self, size: int) -> None:
        """Cut the file off at ``size`` bytes, or extend it with zeros. Raises OSError, for instance when the disk is full."""
        os.ftruncate(self.descriptor, size)

    def rename(self, path: str) -> None:
        """Give the whole object its name, and let the others have it."""
        os.rename(self._path, path)
        self._unlock()

    def discard(self) -> None:
        """Remove the file unless it was published; a process that waits for the object then fetches it itself."""
        if self._held:
            with suppress(OSError):  # the folder itself may be gone
                if self.in_place():
                    os.unlink(self._path)
            self._unlock()

    def _unlock(self) -> None:
        self._held = False
        with suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)


class CacheFolder:
    """The cache folder that the top of this file describes. The object holds no state: everything is in the folder."""

    def __init__(self, folder: str, max_bytes: int | None) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def find(self, digest: str, crc32c: int | None) -> str | None:
        """The path of a whole object; without ``crc32c`` the folder is searched for it."""
        if crc32c is not None:
            path = self._path(digest, crc32c)
            return path if os.path.exists(path) else None
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith(f"{digest}.") and entry.name.endswith(".shard"):
                    return entry.path
        return None

    def _path(self, digest: str, crc32c: int) -> str:
        return os.path.join(self.folder, f"{digest}.{crc32c:08x}.shard")

    def crc32c(self, path: str) -> int:
        """The checksum that the name of a whole object states."""
        return int(os.path.basename(path).split(".")[1], 16)

    def obtain(self, digest: str, crc32c: int | None, size: int) -> str | Part:
        """The path of a whole object, or ``size`` bytes to be filled with it; waits while someone else fills them.

        Raises:
            CacheUnusable: the folder cannot be written, is full, or the other writer hangs.
        """
        path = os.path.join(self.folder, f"{digest}.part")
        with _unusable_if_it_fails():
            if foreign := foreign_part(self.folder):
                raise CacheUnusable(f"{foreign} was made by another user, who could replace what is in it")
            os.makedirs(self.folder, exist_ok=True)
            while (cached := self.find(digest, crc32c)) is None:
                part = Part(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), path)
                part.lock()
                if not part.in_place():
                    continue  # it was published or discarded while we waited for its lock
                try:
                    if self.find(digest, crc32c) is None:
                        self._reserve(part, size)
                        return part
                except BaseException:
                    part.discard()
                    raise
                part.discard()
        return cached

    def publish(self, part: Part, digest: str, crc32c: int) -> str:
        """Make ``part`` a whole object and return its path. Raises CacheUnusable when the folder cannot be written."""
        path = self._path(digest, crc32c)
        with (
            _unusable_if_it_fails(),
            self._locked(),
        ):  # a process that frees space meanwhile finds it once, under the old name or the new one
            part.rename(path)
        return path

    def drop(self, path: str, why: str) -> None:
        """Remove a damaged object. Raises CacheUnusable when that is not allowed."""
        with _unusable_if_it_fails(f"{why}; it cannot be removed: "), suppress(FileNotFoundError):
            os.unlink(path)

    def _reserve(self, part: Part, size: int) -> None:
        with self._locked():
            if self.max_bytes is not None:
                self._free_space(size, self.max_bytes)
            part.resize(size)

    def _free_space(self, size: int, max_bytes: int) -> None:
        coming, objects = 0, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # discarded at this moment
                    if entry.name.endswith(".part") and not _abandoned(entry.path):
                        coming += os.stat(entry.path).st_size
                    elif entry.name.endswith(".shard"):
                        status = os.stat(entry.path)
                        objects.append((status.st_mtime_ns, entry.path, status.st_size))
        if coming + size > max_bytes:
            raise CacheUnusable(f"{size} bytes do not fit: it may hold {max_bytes}, and {coming} are on their way for other readers")
        taken = coming + sum(length for _, _, length in objects)
        for _, path, length in sorted(objects):
            if taken + size <= max_bytes:
                break
            os.unlink(path)
            taken -= length

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(os.path.join(self.folder, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _is(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _abandoned(path: str) -> bool:
    """Whether the writer of a ``.part`` file has died; then the file is removed."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        dead = _lock(descriptor)
        if dead and _is(path, descriptor):
            os.unlink(path)
        return dead
    finally:
        os.close(descriptor)


@contextmanager
def _unusable_if_it_fails(before: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheUnusable(f"{before}{error.strerror}") from error
