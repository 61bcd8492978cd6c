"""Wait for a storage that does not answer, in all that a thread does meanwhile.

    with patient(recipe.storage.patience_s):
        manifest = read_manifest(folder)
        model = load_model(uri)

A server that restarts is no reason for a run not to start. What has rules of its own (a checkpoint's upload, the ledger of a pool) does not
use this; where it is not used, a storage that does not answer is an error after a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, TypeVar

from oar_scale.runtime.retry import retry_transient

if TYPE_CHECKING:
    from oar_scale.storage import Storage

A = TypeVar("A")
B = TypeVar("B")
_patience_s: ContextVar[float] = ContextVar("patience_s", default=0.0)


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Let each request of this thread that finds the storage out of reach be repeated for so long."""
    before = _patience_s.set(seconds)
    try:
        yield
    finally:
        _patience_s.reset(before)


def as_patient(work: Callable[[A], B]) -> Callable[[A], B]:
    """``work`` for other threads, with the patience of this one."""
    seconds = patience_s()

    def patiently(item: A) -> B:
        with patient(seconds):
            return work(item)

    return patiently


def patience_s() -> float:
    """For how long this thread waits for a storage that does not answer."""
    return _patience_s.get()


class PatientStorage:
    """A storage whose requests are repeated while it is out of reach. See :class:`oar_scale.storage.Storage` for what each method promises.

    A conditional write is not repeated: if an answer is lost, the second try would find its own object and take it for another's.
    """

    def __init__(self, storage: Storage, patience_s: float) -> None:
        self._storage, self._patience_s = storage, patience_s

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes of an object. Raises Missing."""
        return retry_transient(lambda: self._storage.read(uri, start, end), self._patience_s)

    def write(self, uri: str, data: bytes, *, if_absent: bool = False, if_version: str = "") -> bool:
        """Put an object."""
        patience_s = 0.0 if if_absent or if_version else self._patience_s
        return retry_transient(lambda: self._storage.write(uri, data, if_absent=if_absent, if_version=if_version), patience_s)

    def download(self, uri: str, path: str) -> None:
        """Copy an object to a local file. Raises Missing."""
        retry_transient(lambda: self._storage.download(uri, path), self._patience_s)

    def upload(self, path: str, uri: str, moved: Callable[[int], object] | None = None) -> None:
        """Copy a local file to an object. Raises Missing."""
        retry_transient(lambda: self._storage.upload(path, uri, moved), self._patience_s)

    def create(self, uri: str, *, scratch: str | None = None, patience_s: float = 0.0) -> AbstractContextManager[IO[bytes]]:
        """A seekable file to fill; sending it is repeated."""
        return self._storage.create(uri, scratch=scratch, patience_s=max(patience_s, self._patience_s))

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the storage. Raises Missing."""
        retry_transient(lambda: self._storage.copy(source, target), self._patience_s)

    def exists(self, uri: str) -> bool:
        """Whether an object exists."""
        return retry_transient(lambda: self._storage.exists(uri), self._patience_s)

    def list(self, prefix: str) -> list[str]:
        """Return the URIs of all objects below a folder, sorted."""
        return retry_transient(lambda: self._storage.list(prefix), self._patience_s)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of each object below a folder."""
        return retry_transient(lambda: self._storage.sizes(prefix), self._patience_s)

    def delete(self, uri: str) -> None:
        """Remove an object."""
        retry_transient(lambda: self._storage.delete(uri), self._patience_s)

    def version(self, uri: str) -> str:
        """Return a text that changes whenever an object is replaced. Raises Missing."""
        return retry_transient(lambda: self._storage.version(uri), self._patience_s)
