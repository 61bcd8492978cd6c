"""The local file system as a storage.

A write goes to a hidden temporary file in the same folder, is flushed to the disk, and is then renamed onto its name (or
hard-linked, where the name must not exist yet). Whatever dies in between leaves a ``.NAME.*.tmp`` that nobody reads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, BinaryIO

from oar_scale.errors import UserError
from oar_scale.storage import Missing

_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space, or set run_dir or storage.root to another disk.",
    errno.EDQUOT: "The quota is used up: free some space, or set run_dir or storage.root to another disk.",
    errno.EACCES: "Permission denied: use a folder that this user may write, or change its owner.",
    errno.EPERM: "Permission denied: use a folder that this user may write, or change its owner.",
    errno.EROFS: "The file system is read-only: set run_dir or storage.root to a writable folder.",
    errno.ENOTDIR: "A part of this path is a file, not a folder: move that file away, or use another path.",
    errno.EISDIR: "This is a folder, and a file was expected here.",
    errno.ENAMETOOLONG: "A part of this path has more than 255 bytes: use a shorter name.",
    errno.ELOOP: "A part of this path is a link that leads back to itself: remove it, or use another path.",
    errno.EEXIST: "A part of this path is a file or a link that leads nowhere, not a folder: move that away, or use another path.",
}


class LocalStorage:
    """Plain paths. See :class:`oar_scale.storage.Storage` for what each method promises."""

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes ``start`` to ``end`` of a file. Raises Missing, and UserError where the file may not be read."""
        with explained(uri), open(uri, "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else max(0, end - start))

    def write(self, uri: str, data: bytes, *, if_absent: bool = False, if_version: str = "") -> bool:
        """Write a file by way of a temporary one; return False if the name is taken, or the version replaced, by then."""
        if if_version:
            return self._replace(uri, data, if_version)
        if if_absent and os.path.lexists(uri):
            return False
        try:
            with explained(uri), atomic_file(uri, replace=not if_absent) as file:
                file.write(data)
        except _Taken:
            return False
        return True

    def download(self, uri: str, path: str) -> None:
        """Copy a file to ``path``; both are on the local file system."""
        self._copy(uri, path)

    def upload(self, path: str, uri: str, moved: Callable[[int], object] | None = None) -> None:
        """Copy the file ``path`` to ``uri``; both are on the local file system."""
        self._copy(path, uri, moved)

    @contextmanager
    def create(self, uri: str, *, scratch: str | None = None, patience_s: float = 0.0) -> Iterator[IO[bytes]]:
        """A file to fill, in the folder of ``uri``, which it is renamed to at the end."""
        with explained(uri), atomic_file(uri) as file:
            yield file

    def copy(self, source: str, target: str) -> None:
        """Give a file a second name, which costs no space: files are replaced and never changed. Copy it where that is impossible."""
        folder, name = os.path.split(target)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with explained(target):
                make_folder(folder)
            with explained(source):
                os.link(source, temporary)
            os.replace(temporary, target)
        except (OSError, UserError) as error:
            if isinstance(error, Missing):
                raise
            self._copy(source, target)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    def exists(self, uri: str) -> bool:
        """Whether there is a file of this name; a folder is not one."""
        return os.path.isfile(uri)

    def list(self, prefix: str) -> list[str]:
        """Return the paths of all files below a folder, sorted, without temporary files of writes that have not finished."""
        folder = prefix.rstrip("/") or prefix
        paths = (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
        return sorted(path for path in paths if not _is_temporary(path))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of each file that :meth:`list` names, without those deleted meanwhile."""
        sizes: dict[str, int] = {}
        for path in self.list(prefix):
            with suppress(FileNotFoundError):  # gone since it was listed
                sizes[path] = os.stat(path).st_size
        return sizes

    def delete(self, uri: str) -> None:
        """Delete a file; nothing happens if there is none."""
        try:
            with explained(uri):
                os.unlink(uri)
        except Missing:
            pass  # absent is the requested state

    def version(self, uri: str) -> str:
        """Return a text of inode, size and modification time, which a replaced file does not share. Raises Missing."""
        with explained(uri):
            status = os.stat(uri)
        return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"

    def _replace(self, uri: str, data: bytes, version: str) -> bool:
        """Replace a file that is still of this version. Those who would replace the same one wait for each other at its lock."""
        try:
            with explained(uri), open(uri, "rb") as current:
                fcntl.flock(current, fcntl.LOCK_EX)
                return self.version(uri) == version and self.write(uri, data)
        except Missing:
            return False

    @staticmethod
    def _copy(source: str, target: str, moved: Callable[[int], object] | None = None) -> None:
        with explained(source), open(source, "rb") as reader, explained(target), atomic_file(target) as writer:
            while chunk := reader.read(1 << 20):
                writer.write(chunk)
                if moved is not None:
                    moved(len(chunk))


def make_folder(folder: str) -> None:
    """Make a folder to write into, and those above it. Raises OSError, and UserError where its place is not there."""
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except FileNotFoundError as error:  # what is to be written is not missing, as explained() would have it
        why = "a folder on the way to it was deleted, or is a link that leads nowhere (a disk that is not mounted?)"
        raise UserError(f"{folder or '.'}: this folder cannot be made: {why}. Put that right, or use another path.") from error


class _Taken(Exception):
    """``atomic_file(replace=False)`` found its name in use."""


@contextmanager
def atomic_file(path: str, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a file that appears at ``path`` only when the block ends without an error; folders are made as needed."""
    folder, name = os.path.split(path)
    make_folder(folder)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
        _sync_folder(folder or ".")
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise _Taken from error


def _sync_folder(folder: str) -> None:
    """Make the new name itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_temporary(path: str) -> bool:
    name = os.path.basename(path)
    return name.startswith(".") and name.endswith(".tmp")


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn the errors of the file system that a user can fix into one clear error."""
    try:
        yield
    except FileNotFoundError as error:
        raise Missing(uri) from error
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise UserError(f"{uri}: {error.strerror}. {_REMEDIES[error.errno]}") from error
