"""A whole object from S3, in parts over a few connections, into a cache file or, as far as that does not take it, into memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

from crc32c import crc32c

from oar_scale.storage import FetchStats
from oar_scale.storage.background import in_order
from oar_scale.storage.cache_folder import Damaged, Part
from oar_scale.storage.s3_client import explained
from oar_scale.storage.s3_ranges import read_range

PART_BYTES = 16 << 20
"""Bytes of one ranged GET. Smaller parts cost requests; larger ones leave connections idle at the end of a shard."""
CONNECTIONS = 4
"""Parts of an object on their way at once: S3 gives one connection some 50-90 MB/s."""
_BLOCK = 1 << 20


class Landing:
    """Where the bytes of a download land; threads write to it at once, each its own bytes.

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
        """Go on with a crc32c over bytes that have all landed. Raises OSError when the file cannot be read back."""
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


def download(uri: str, etag: str, landing: Landing, count: Callable[[FetchStats], None]) -> int:
    """Bring the first ``landing.size`` bytes of an object to ``landing`` and return their crc32c.

    Args:
        etag: the version that is meant; "" = any.
        count: told what each part took, by several threads, and after an error also later than that.

    Raises:
        Damaged: the object is shorter.
        Missing, UserError: see ``s3_ranges.read_range``.
        OSError: what was written could not be read back.
    """
    stop = threading.Event()

    def fetch(start: int) -> None:
        end = min(start + PART_BYTES, landing.size)
        took = FetchStats()
        try:
            with explained(uri):
                read_range(uri, start, end, lambda chunk: landing.write(chunk, start + took.bytes), took, etag, stop)
        finally:
            count(took)
        if took.bytes != end - start:
            raise Damaged(f"{start + took.bytes} bytes, and {landing.size} were expected")

    crc, starts = 0, range(0, landing.size, PART_BYTES)
    try:
        for start, _ in zip(starts, in_order(fetch, starts, CONNECTIONS), strict=True):
            crc = landing.checksum(start, min(start + PART_BYTES, landing.size), crc)
    finally:
        stop.set()
    return crc
