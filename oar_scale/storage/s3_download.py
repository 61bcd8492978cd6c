"""A whole object from S3, in parts over a few connections, into a cache file or, as far as that does not take it, into memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

from oar_scale.storage import FetchStats
from oar_scale.storage.background import in_order
from oar_scale.storage.cache_folder import DamagedObject
from oar_scale.storage.remote import Landing, ObjectHead
from oar_scale.storage.s3_client import explained
from oar_scale.storage.s3_ranges import head, read_range

PART_BYTES = 16 << 20
"""Bytes of one ranged GET. Smaller parts cost requests; larger ones leave connections idle at the end of a shard."""
CONNECTIONS = 4
"""Parts of an object on their way at once: a single request is good for 85-90 MB/s (AWS, Performance design patterns for Amazon S3)."""


class S3Objects:
    """See :class:`oar_scale.storage.remote.RemoteObjects` for what each method promises."""

    def head(self, uri: str, stats: FetchStats) -> ObjectHead:
        """Return size and ETag of an object, by a HEAD request that is repeated while the server does not answer."""
        with explained(uri):
            return head(uri, stats)

    def download(self, uri: str, etag: str, landing: Landing, count: Callable[[FetchStats], None]) -> int:
        """Download an object in parts of ``PART_BYTES`` over ``CONNECTIONS`` connections, and return the crc32c of its bytes."""
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
                raise DamagedObject(f"{start + took.bytes} bytes, and {landing.size} were expected")

        crc, starts = 0, range(0, landing.size, PART_BYTES)
        try:
            for start, _ in zip(starts, in_order(fetch, starts, CONNECTIONS), strict=True):
                crc = landing.checksum(start, min(start + PART_BYTES, landing.size), crc)
        finally:
            stop.set()
        return crc
