"""Whole shards as memory, from a local folder or from S3 through a cache on the local disk.

    cache = ShardCache("/local/cache", max_bytes=200 << 30)
    cache.prefetch(next_uri, info.bytes, info.crc32c)       # in the background
    data = cache.read(uri, info.bytes, info.crc32c)         # a memoryview, backed by the page cache

A local shard is mapped as it lies. A shard in S3 is fetched once per host: in parts over a few connections, each resumed
where it breaks (``s3_ranges``), checked by crc32c while it comes, and renamed into the cache when it is whole. Nothing that
can happen to the cache (full, read-only, damaged, a writer killed) stops a reader: the bytes then go to memory.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import mmap
import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple

from crc32c import crc32c as checksum

from oar_scale.errors import Unreachable, UserError
from oar_scale.runtime.retry import retry_transient
from oar_scale.storage import FetchStats, Missing, patience
from oar_scale.storage.background import start
from oar_scale.storage.cache_folder import CacheFolder, CacheUnusable, DamagedObject, Part, compare
from oar_scale.storage.remote import Landing, Replaced
from oar_scale.storage.schemes import LOCAL, remote_objects_of, scheme_of

_BLOCK = 1 << 20
_LOST = {errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ENODEV}
"""What the system says of files on a network file system whose server is away."""
_log = logging.getLogger(__name__)


class DamagedShard(UserError):
    """The shard itself is not what was written; nothing is wrong with the way to it."""


class _Shard(NamedTuple):
    """The shard to be read; ``None`` = not known."""

    uri: str
    size: int | None
    crc32c: int | None


class _Process:
    """State of one process: a fork starts with a fresh one, whatever its parent's threads were doing."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.stats = FetchStats()
        self.coming: dict[_Shard, Future[memoryview]] = {}
        self.verified: set[tuple[str, int]] = set()
        self.warned = False


class ShardCache:
    """Reads shards through a cache folder that all processes of the host may share.

    Cheap to make, pickle and fork: connections and threads are made at first use, in the process that uses them.

    Args:
        folder: where copies of remote shards lie; made at first use.
        max_bytes: what the copies may add up to, those on their way included; the ones that nobody has read for the longest
            go first. ``None`` = no bound. What does not fit goes to memory.
        patience_s: how long a storage that does not answer is retried, if that is longer than :func:`patient` says where the cache is made.
    """

    def __init__(self, folder: str, max_bytes: int | None = None, patience_s: float = 0.0) -> None:
        self._folder, self.patience_s = CacheFolder(folder, max_bytes), max(patience_s, patience.patience_s())
        self._process = _Process()

    def __reduce__(self) -> tuple[type[ShardCache], tuple[str, int | None, float]]:
        return ShardCache, (self._folder.folder, self._folder.max_bytes, self.patience_s)

    @property
    def stats(self) -> FetchStats:
        """What the reads of this process through this object have taken so far."""
        return self._own().stats

    def read(self, uri: str, size: int | None = None, crc32c: int | None = None) -> memoryview:
        """Return the whole object, read-only, valid for as long as it is referenced.

        A file is checked against ``size`` and ``crc32c`` when this process first opens it (a cached copy always, a local file
        where they are given). With both, a cached copy costs no request; else one asks whether the object is still the same.

        Raises:
            Missing: there is no such object.
            DamagedShard: it is not what ``size`` and ``crc32c`` say.
            Unreachable: the storage does not answer.
            UserError: it cannot be fetched. All name ``uri``, what was tried, the remedy.
        """
        own, shard = self._own(), _Shard(uri, size, crc32c)
        with own.lock:
            coming = own.coming.pop(shard, None)
        return coming.result() if coming else self._read(shard)

    def prefetch(self, uri: str, size: int | None = None, crc32c: int | None = None) -> None:
        """Begin to read in the background; the next ``read`` of the same arguments takes the result, or its error."""
        own, shard = self._own(), _Shard(uri, size, crc32c)
        with own.lock:
            if shard not in own.coming:
                own.coming[shard] = start(lambda: self._read(shard))

    def _own(self) -> _Process:
        if self._process.pid != os.getpid():
            self._process = _Process()
        return self._process

    def _read(self, shard: _Shard) -> memoryview:
        read = self._read_local if scheme_of(shard.uri) == LOCAL else self._read_remote
        return retry_transient(lambda: read(shard), self.patience_s)

    def _read_local(self, shard: _Shard) -> memoryview:
        try:
            return self._open(shard.uri, shard.size, shard.crc32c)
        except DamagedObject as error:
            raise DamagedShard(f"{shard.uri}: {error}. The file is damaged or was replaced: write the shard again.") from None
        except FileNotFoundError:
            raise Missing(shard.uri) from None
        except OSError as error:
            kind = Unreachable if error.errno in _LOST else DamagedShard if error.errno == errno.EIO else UserError
            raise kind(f"{shard.uri}: {error.strerror}. Check the disk, and that this user may read the file.") from error

    def _read_remote(self, shard: _Shard) -> memoryview:
        try:
            return self._through_cache(shard, again=False)
        except (DamagedObject, Replaced):
            pass  # it happened on the way, perhaps, or while someone wrote the object
        try:
            return self._through_cache(shard, again=True)
        except DamagedObject as error:
            raise DamagedShard(
                f"{shard.uri}: {error}, also when fetched a second time. The object is damaged or was replaced: "
                "write the shard again, or its manifest."
            ) from None

    def _through_cache(self, shard: _Shard, again: bool) -> memoryview:
        """The cached copy, or the object on its way into the cache. Raises DamagedObject, Replaced."""
        etag = ""
        if shard.size is None or shard.crc32c is None:
            shard, etag = self._ask(shard, again)
        version = etag if shard.crc32c is None else f"{shard.crc32c:08x}"
        digest = hashlib.sha256(f"{shard.uri}\n{shard.size}\n{version}".encode()).hexdigest()[:24]
        try:
            while isinstance(cached := self._folder.obtain(digest, shard.crc32c, shard.size or 0), str):
                if (data := self._cached(cached, shard)) is not None:
                    return data
        except CacheUnusable as reason:
            self._fall_back(str(reason))
            return self._fetch(shard, etag, again)
        try:
            return self._fetch(shard, etag, again, cached, digest)
        except OSError as error:  # the disk took the bytes, and does not give them back
            self._fall_back(str(error.strerror))
            return self._fetch(shard, etag, again)
        finally:
            cached.discard()

    def _ask(self, shard: _Shard, again: bool) -> tuple[_Shard, str]:
        """Learn size and version of an object from the server."""
        took = FetchStats()
        try:
            head = remote_objects_of(scheme_of(shard.uri)).head(shard.uri, took)
        finally:
            self._count(took, again)
        compare(head.size, None, shard.size, None)
        return shard._replace(size=head.size), head.etag

    def _cached(self, path: str, shard: _Shard) -> memoryview | None:
        """A copy; ``None`` when it was evicted a moment ago, or is damaged and hence dropped. Raises CacheUnusable."""
        try:
            data = self._open(path, shard.size, self._folder.crc32c(path))
        except FileNotFoundError:
            return None
        except (DamagedObject, OSError) as error:
            self._folder.drop(path, str(error))
            return None
        with suppress(OSError):  # a cache that we may only read is one, too
            os.utime(path)
        self._count(FetchStats(hits=1))
        return data

    def _fetch(self, shard: _Shard, etag: str, again: bool, part: Part | None = None, digest: str = "") -> memoryview:
        """The object from S3, in the cache if that takes it. Raises DamagedObject, Replaced."""
        landing = Landing(shard.size or 0, part)
        checksum = remote_objects_of(scheme_of(shard.uri)).download(shard.uri, etag, landing, lambda took: self._count(took, again))
        compare(landing.size, checksum, shard.size, shard.crc32c)
        if landing.memory is not None:
            if landing.problem:
                self._fall_back(str(landing.problem.strerror))
            return memoryview(landing.memory).toreadonly()
        assert part is not None
        data = _mapped(part.descriptor)
        try:
            self._own().verified.add((self._folder.publish(part, digest, checksum), part.inode))
        except CacheUnusable as reason:  # the bytes are there all the same, in a file without a name
            self._fall_back(str(reason))
        return data

    def _open(self, path: str, size: int | None, crc32c: int | None) -> memoryview:
        """Map a file; the first time in this process it is checked. Raises DamagedObject, OSError."""
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if (path, status.st_ino) not in self._own().verified:
                crc = 0
                while crc32c is not None and (block := file.read(_BLOCK)):  # a bad disk is an error here, and a dead process when mapped
                    crc = checksum(block, crc)
                compare(status.st_size, crc, size, crc32c)
                self._own().verified.add((path, status.st_ino))
            return _mapped(file.fileno())

    def _count(self, took: FetchStats, again: bool = False) -> None:
        """Add what something took; ``again`` = all its requests repeat earlier ones."""
        if again:
            took.retries = took.requests
        own = self._own()
        with own.lock:
            own.stats.add(took)

    def _fall_back(self, reason: str) -> None:
        """Count a shard that the cache does not hold; warned about once."""
        self._count(FetchStats(fallbacks=1))
        own = self._own()
        if not own.warned:
            own.warned = True
            _log.warning(
                "%s: the cache cannot take a shard (%s), so that it is read into memory and fetched again next time. "
                "Free disk space, or choose another cache folder. This is logged once.",
                self._folder.folder,
                reason,
            )


def _mapped(descriptor: int) -> memoryview:
    """The file as memory; it stays there when the descriptor is closed and the name is gone."""
    if not os.fstat(descriptor).st_size:
        return memoryview(b"")
    return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
