"""Objects by name: one small interface over a local folder and an S3 bucket.

Every package names what it reads and writes by a URI, so that a run moves to a cluster by changing ``storage.root``:

    runs/quickstart/tokens/train/00000.tar          a plain path: the local file system
    s3://bucket/quickstart/tokens/train/00000.tar   S3, through the standard AWS environment variables

What a reader may rely on, on both: an object is there completely or not at all, ``write(if_absent=True)`` has exactly one
winner however many try, and ``list`` is sorted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Protocol

from oar_scale.errors import DamagedJson, Missing, Unreachable, UserError
from oar_scale.json_object import JsonObject, parse_object
from oar_scale.storage.own_folder import foreign_part
from oar_scale.storage.patience import PatientStorage, patience_s
from oar_scale.storage.schemes import LOCAL, scheme_of, storage_of


@dataclass
class FetchStats:
    """The cost of reading. Additive: over parts, readers, processes."""

    requests: int = 0
    """HTTP requests sent."""
    retries: int = 0
    """Those of them that repeat one which failed."""
    bytes: int = 0
    """Bytes that arrived."""
    hits: int = 0
    """Objects that lay in the cache already."""
    resumed: int = 0
    """Retries that continued inside a body that had broken off."""
    fallbacks: int = 0
    """Objects that went to memory because the cache could not take them."""

    def add(self, other: FetchStats) -> None:
        """Add what another read took."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Storage(Protocol):
    """A store of objects. Instances hold no connection: they can be pickled, forked and shared by threads."""

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes ``start`` to ``end`` (exclusive; ``None`` = the end); less when the object is shorter.

        Raises:
            Missing: there is no such object.
        """

    def write(self, uri: str, data: bytes, *, if_absent: bool = False, if_version: str = "") -> bool:
        """Put ``data`` at ``uri`` atomically.

        Args:
            if_absent: only where there is no object.
            if_version: only where the object is still the one of which :meth:`version` returned this.

        Returns:
            False if such a condition does not hold; nothing has changed then.
        """

    def download(self, uri: str, path: str) -> None:
        """Copy the object to the local file ``path`` (atomic there). Raises ``Missing``."""

    def upload(self, path: str, uri: str, moved: Callable[[int], object] | None = None) -> None:
        """Copy the local file ``path`` to ``uri`` (atomic there). Raises ``Missing`` when there is no such file.

        Args:
            moved: called now and then with the bytes that went since, perhaps by other threads; a negative number where some go again.
        """

    def create(self, uri: str, *, scratch: str | None = None, patience_s: float = 0.0) -> AbstractContextManager[IO[bytes]]:
        """A seekable file to fill; its content is at ``uri`` (atomic) when the block ends without an error.

        Args:
            scratch: local folder for a file that is on its way elsewhere; default: the system's.
            patience_s: how long sending it is tried again while the storage is out of reach.
        """

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the storage (atomic there), without its bytes passing through this host. Raises ``Missing``."""

    def exists(self, uri: str) -> bool:
        """Whether an object of exactly this name exists; a folder is not an object."""

    def list(self, prefix: str) -> list[str]:
        """Return the URIs of all objects below the folder ``prefix``, at any depth, sorted; ``[]`` when there are none."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of each object that :meth:`list` names, for the price of a listing."""

    def delete(self, uri: str) -> None:
        """Remove the object; nothing happens if it is absent."""

    def version(self, uri: str) -> str:
        """Return a short text that changes whenever the object is replaced. Raises ``Missing``."""


def open_storage(uri: str) -> Storage:
    """Return the storage that ``uri`` lies in; cheap enough to call for every access. Inside of :func:`patient`, a patient one.

    Raises:
        UserError: the URI has a scheme that is neither a plain path nor ``s3://``.
    """
    scheme = scheme_of(uri)
    storage = storage_of(scheme)
    return PatientStorage(storage, patience_s()) if patience_s() and scheme != LOCAL else storage


def join(uri: str, *names: str) -> str:
    """Append path parts to a URI: ``join("s3://b/run/", "tokens", "train") == "s3://b/run/tokens/train"``."""
    base = uri.rstrip("/")
    rest = [part.strip("/") for part in names if part.strip("/")]
    if not base and not uri:
        return "/".join(rest)
    return "/".join([base, *rest]) if rest else base or "/"


def absolute(uri: str) -> str:
    """The URI as processes with another working folder understand it: a path from the root, an object's URI as it is."""
    return uri if "://" in uri else os.path.abspath(uri)


def read_json(uri: str) -> JsonObject:
    """Return the JSON object stored at ``uri``.

    Raises:
        Missing: there is no such object.
        DamagedJson: what is there is no JSON object: it was cut, or is something else.
    """
    data = open_storage(uri).read(uri)
    try:
        return parse_object(data)
    except ValueError as error:
        raise DamagedJson(uri, str(error)) from error


def read_named(path: str) -> bytes:
    """The content of a file, local or an object, that a user has named. Raises UserError where it cannot be read."""
    try:
        return open_storage(path).read(path)
    except Missing as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def write_json(uri: str, obj: object) -> None:
    """Store ``obj`` as JSON that a person can read, atomically."""
    text = json.dumps(obj, indent=2, ensure_ascii=False) + "\n"
    open_storage(uri).write(uri, text.encode("utf-8", "backslashreplace"))  # lone surrogates (bytes of a name) as JSON escapes them


def fetch(uri: str, cache_dir: str) -> str:
    """Return a local file with the content of ``uri``: the path itself if it is local, else a copy in ``cache_dir``.

    A copy is used again only while the object is unchanged (one small request asks); it carries the object's name, so
    that a suffix like ``.safetensors`` survives.

    Raises:
        Missing: there is no such object.
    """
    storage = open_storage(uri)
    version = storage.version(uri)  # also the check that the object exists
    if scheme_of(uri) == LOCAL:
        return uri
    if foreign := foreign_part(cache_dir):
        raise UserError(
            f"{foreign}: was made by another user, who could replace {uri} in it. Set storage.cache_dir to a folder of your own."
        )
    digest = hashlib.sha256(f"{uri}\n{version}".encode()).hexdigest()[:16]
    path = os.path.join(cache_dir, f"{digest}-{uri.rsplit('/', 1)[-1]}")
    if not os.path.exists(path):
        storage.download(uri, path)
    return path


__all__ = [
    "DamagedJson",
    "FetchStats",
    "Missing",
    "Storage",
    "Unreachable",
    "fetch",
    "join",
    "open_storage",
    "read_json",
    "read_named",
    "write_json",
]
