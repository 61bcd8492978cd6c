"""The bytes of an S3 object, whatever happens to the connections that carry them.

Requests that get no good answer (503, SlowDown, reset, timeout) are first repeated by botocore. What it cannot see is a body
that breaks off, stalls or trickles: such a body is left, and a new request continues at the byte where it stopped, pinned
to the same version of the object. Between tries we wait a random time that doubles on average (full jitter).

One range is given up after ``TRIES`` connections, or ``PATIENCE_S`` in which not one byte came; a server that has never
answered this process is given up as soon as botocore does, for then the address is wrong rather than the network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import urllib3.exceptions
from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError

from oar_scale.redaction import redact
from oar_scale.runtime.retry import Backoff, RetryStopped, retry
from oar_scale.storage import FetchStats, Unreachable
from oar_scale.storage.remote import ObjectHead, Replaced
from oar_scale.storage.s3_client import EXPIRED, client, may_pass, renew, requests_sent, split
from oar_scale.storage.s3_types import GetObject, ObjectBody

TRIES = 12
"""Connections for one range (each of them up to AWS_MAX_ATTEMPTS requests)."""
PATIENCE_S = 120.0
"""Seconds without one byte."""
STALL_S = 10.0
"""Silence after which a connection is left; a new one mostly reaches another machine, and nothing that came is lost."""
SLOW_S, SLOW_BYTES = 20.0, 256 << 10
"""A connection that brings less than this in that time is left as well."""
BACKOFF_S, BACKOFF_MAX_S = 0.1, 10.0
"""The wait after the n-th failure in a row is uniform in [0, min(BACKOFF_MAX_S, BACKOFF_S 2^n)]."""
_CHUNK, _SMALL_CHUNK = 1 << 20, 64 << 10

T = TypeVar("T")
_NO_ANSWER = (ConnectionError, HTTPClientError)
_answered: set[str] = set()  # servers that this process has heard from


class _Broken(Exception):
    """A body that we leave ourselves."""


_TRANSIENT = (*_NO_ANSWER, ResponseStreamingError, IncompleteReadError, urllib3.exceptions.HTTPError, _Broken, ClientError)
"""What may pass; of a ClientError, and of no answer at all, not all."""


def head(uri: str, stats: FetchStats) -> ObjectHead:
    """Size and version of an object; ``stats`` learns what it took. Raises botocore's errors: see ``s3_client.explained``."""
    bucket, key = split(uri)

    def ask() -> ObjectHead:
        answer = client(STALL_S).head_object(Bucket=bucket, Key=key)
        return ObjectHead(answer["ContentLength"], answer["ETag"])

    return _RangeAttempts(uri, stats).run(ask)


def read_range(
    uri: str,
    start: int,
    end: int | None,
    sink: Callable[[bytes], object],
    stats: FetchStats,
    etag: str = "",
    stop: threading.Event | None = None,
) -> None:
    """Hand the bytes ``start`` to ``end`` (exclusive; ``None`` = the end) to ``sink``, in order and each once.

    Args:
        sink: called with each chunk, in this thread. Fewer bytes come when the object is shorter.
        stats: learns what it took.
        etag: the version that is meant; without it, the one that the first answer brings.
        stop: once set, the read ends with ``RetryStopped``.

    Raises:
        Replaced: the object is no longer that version.
        UserError: given up; the text names the attempts made.
        ClientError, BotoCoreError: other answers of the server: see ``s3_client.explained``.
    """
    attempts = _RangeAttempts(uri, stats, stop)
    at = start

    def go_on() -> None:
        nonlocal at, etag
        stats.resumed += at > start
        response = _get(uri, at, end, etag)
        if response is None:
            return
        etag = response["ETag"]
        for chunk in _chunks(response, ranged=at > 0 or end is not None):
            sink(chunk)
            at += len(chunk)
            stats.bytes += len(chunk)
            attempts.progress()

    attempts.run(go_on)


class _RangeAttempts:
    """The attempts of one read: counts their requests, and decides which errors are transient and how long they are retried."""

    def __init__(self, uri: str, stats: FetchStats, stop: threading.Event | None = None) -> None:
        self.uri, self.stats, self.stop = uri, stats, stop or threading.Event()
        self.begun = self.last_byte = time.monotonic()
        self.failures = self.requests = 0
        # Full jitter: the n-th pause in a row is uniform in [0, min(BACKOFF_MAX_S, BACKOFF_S 2^n)].
        self.backoff = Backoff(2 * BACKOFF_S, BACKOFF_MAX_S, jitter=(0.0, 1.0))
        self.renewed = self.given_up = False
        self.server = ""

    def progress(self) -> None:
        """Note that bytes came. Raises RetryStopped when nobody wants more of them."""
        self.last_byte = time.monotonic()
        self.backoff.progress()
        if self.stop.is_set():
            raise RetryStopped

    def run(self, work: Callable[[], T]) -> T:
        """Call ``work`` until it succeeds. Raises Unreachable when the server has not delivered for too long."""
        try:
            return retry(lambda: self._attempt(work), self.backoff, transient=self._transient, give_up=self._give_up, stop=self.stop)
        except _TRANSIENT as error:
            if not self.given_up:
                raise
            seconds = time.monotonic() - self.begun
            raise Unreachable(
                f"{self.uri}: given up after {self.requests} requests in {seconds:.0f} s; the last one: {redact(str(error))}\n"
                f"The S3 server at {self.server} is overloaded or out of reach. When it answers again, start the same command again."
            ) from error

    def _attempt(self, work: Callable[[], T]) -> T:
        if self.stop.is_set():
            raise RetryStopped
        used, before = client(STALL_S), requests_sent()
        self.server = redact(used.meta.endpoint_url)
        try:
            return work()
        except ClientError as error:
            _answered.add(self.server)
            if error.response["Error"]["Code"] not in EXPIRED | {"400"} or self.renewed:  # 400: a HEAD has no body to say so
                raise
            self.renewed = True
            renew(used, STALL_S)
        finally:
            self._count(requests_sent() - before)
        return self._attempt(work)  # at once: with credentials that were read anew

    def _count(self, sent: int) -> None:
        self.stats.requests += sent
        self.stats.retries += sent if self.requests else max(0, sent - 1)
        self.requests += sent

    def _transient(self, error: BaseException) -> bool:
        """Whether the error may pass; counts it if so."""
        if isinstance(error, ClientError):
            passing = may_pass(error)
        elif isinstance(error, _NO_ANSWER):
            passing = self.server in _answered  # else the address is wrong, more likely than the network
        else:
            passing = isinstance(error, _TRANSIENT)
        self.failures += passing
        return passing

    def _give_up(self) -> bool:
        self.given_up = self.failures >= TRIES or time.monotonic() - self.last_byte > PATIENCE_S
        return self.given_up


def _get(uri: str, start: int, end: int | None, etag: str) -> GetObject | None:
    """Ask for the bytes from ``start``; ``None`` when the object ends before them."""
    bucket, key = split(uri)
    wanted: dict[str, str] = {"IfMatch": etag} if etag else {}
    if start or end is not None:
        wanted["Range"] = f"bytes={start}-" + (str(end - 1) if end is not None else "")
    used = client(STALL_S)
    try:
        response = used.get_object(Bucket=bucket, Key=key, **wanted)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("InvalidRange", "416"):
            return None
        if code in ("PreconditionFailed", "412"):
            raise Replaced(f"{uri}: another object was written under this name while it was read. Start the same command again.") from error
        raise
    _answered.add(redact(used.meta.endpoint_url))
    return response


def _chunks(response: GetObject, ranged: bool) -> Iterator[bytes]:
    """Yield the bytes as they arrive; a read of a fixed size would wait for a trickle without end."""
    body, missing = response["Body"], response["ContentLength"]
    begun, came = time.monotonic(), 0
    # Of a whole object botocore checks the server's checksum, and waits until a chunk is full.
    for chunk in _arrivals(body) if ranged else body.iter_chunks(_SMALL_CHUNK):
        yield chunk
        came, missing = came + len(chunk), missing - len(chunk)
        if missing and (now := time.monotonic()) - begun > SLOW_S:  # with the last byte there is nothing left to ask for
            if came < SLOW_BYTES:
                raise _Broken(f"only {came} bytes came in {now - begun:.0f} s")
            begun, came = now, 0
    if missing:
        raise _Broken(f"the body broke off, {missing} bytes are missing")


def _arrivals(body: ObjectBody) -> Iterator[bytes]:
    with body as raw:  # urllib3's response; leaving it early closes the connection
        while chunk := raw.read1(_CHUNK):
            yield chunk
