"""What the shard cache needs of a remote store, whatever its protocol: a version, and a download into a file or into memory.

``schemes.py`` maps each URI scheme to its class.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from crc32c import crc32c

from oar_scale.errors import UserError
from oar_scale.storage import FetchStats
from oar_scale.storage.cache_folder import Part

_BLOCK = 1 << 20


class Replaced(UserError):
    """Another object was written under the name while it was being read."""


class ObjectHead(NamedTuple):
    """A server's metadata of an object: its size in bytes, and its version."""

    size: int
    etag: str


class RemoteObjects(Protocol):
    """The objects of one URI scheme, as they are downloaded. Instances hold no connection."""

    def head(self, uri: str, stats: FetchStats) -> ObjectHead:
        """Return size and version of an object, and add to ``stats`` what asking took.

        Raises:
            Missing: there is no such object.
            UserError: the server refuses, or does not answer.
        """

    def download(self, uri: str, etag: str, landing: Landing, count: Callable[[FetchStats], None]) -> int:
        """Bring the first ``landing.size`` bytes of an object to ``landing`` and return their crc32c.

        Args:
            etag: the version that is meant; "" = any.
            count: called with what each part took, by several threads, and after an error also later than that.

        Raises:
            DamagedObject: the object is shorter.
            Replaced: the object is no longer that version.
            Missing: there is no such object.
            UserError: given up; the text names the attempts made.
            OSError: what was written could not be read back.
        """


class Landing:
    """The destination of a download; threads write to it concurrently, each its own bytes.

    Args:
        size: bytes of the whole.
        part: the file to be filled; ``None`` = all goes to memory.
    """

    def __init__(self, size: int, part: Part | None) -> None:
        self.size = size
        self.memory = bytearray(size) if part is None else None
        """All of it, once the file has refused some of it."""
        self.problem: OSError | None = None
        """Why the file did."""
        self._part = part
        self._in_file: list[tuple[int, int]] = []
        self._spilling = threading.Lock()

    def write(self, data: bytes, offset: int) -> None:
        """Keep ``data``; a file that does not take it is no error."""
        if self.memory is None and self._part is not None:
            try:
                self._part.write(data, offset)
                self._in_file.append((offset, len(data)))
                return
            except OSError as error:  # a full disk, most likely
                with self._spilling:
                    self.problem = self.problem or error
                    self.memory = bytearray(self.size) if self.memory is None else self.memory
        assert self.memory is not None
        memoryview(self.memory)[offset : offset + len(data)] = data

    def checksum(self, start: int, end: int, crc: int) -> int:
        """Continue a crc32c over bytes that have all landed. Raises OSError when the file cannot be read back."""
        for at in range(start, end, _BLOCK):
            stop = min(at + _BLOCK, end)
            self._gather()
            crc = crc32c(self._read(at, stop - at) if self.memory is None else memoryview(self.memory)[at:stop], crc)
        return crc

    def _gather(self) -> None:
        while self.memory is not None and self._in_file:
            offset, count = self._in_file.pop()
            memoryview(self.memory)[offset : offset + count] = self._read(offset, count)

    def _read(self, offset: int, count: int) -> bytes:
        assert self._part is not None
        return self._part.read(offset, count)
