"""S3 and what speaks its protocol, through boto3 and the standard AWS environment variables.

S3 makes single puts and completed multipart uploads visible at once, and ``If-None-Match: *`` decides races on the server.
What is added here: bodies that break off are continued by a ranged GET, and errors name the URI and the remedy.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import IO

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError, FlexibleChecksumError

from oar_scale.errors import UserError
from oar_scale.runtime.retry import retry_transient
from oar_scale.storage import FetchStats, Missing
from oar_scale.storage.background import in_order
from oar_scale.storage.local import atomic_file
from oar_scale.storage.s3_client import TRIES, NoBucket, client, explained, has_bucket, split, with_fresh_credentials
from oar_scale.storage.s3_ranges import head, read_range
from oar_scale.storage.s3_types import PutCondition, S3Client, UploadedPart

_REFUSED = {"PreconditionFailed", "412", "NoSuchKey"}
"""The answers to a put whose condition does not hold; the last one to ``If-Match`` where there is no object."""
_THREADS = 4
_TRANSFER = TransferConfig(multipart_threshold=32 << 20, multipart_chunksize=16 << 20, max_concurrency=_THREADS)

_COPY = TransferConfig(multipart_threshold=1 << 30, multipart_chunksize=1 << 30, max_concurrency=4)


class S3Storage:
    """``s3://bucket/key``. See :class:`oar_scale.storage.Storage` for what each method promises."""

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes ``start`` to ``end`` of an object, over as many connections as it takes. Raises Missing."""
        if end is not None and end <= start:
            self.version(uri)  # an empty range of a missing object is still an error
            return b""
        for last in (False, True):
            chunks: list[bytes] = []
            try:
                with explained(uri):
                    read_range(uri, start, end, chunks.append, FetchStats())
                return b"".join(chunks)
            except FlexibleChecksumError as error:  # the server's own checksum, which it sends with whole objects
                if last:
                    raise UserError(f"{uri}: arrived damaged twice ({error}). Write the object again.") from error
        raise AssertionError("the last round returns or raises")

    @with_fresh_credentials
    def write(self, uri: str, data: bytes, *, if_absent: bool = False, if_version: str = "") -> bool:
        """Put an object, in several parts where it is large: one request may carry 5 GB at most.

        Returns:
            False if ``if_absent`` and there is one, or ``if_version`` and the object there is another one.

        Raises:
            UserError: there is no bucket.
        """
        bucket, key = split(uri)
        with explained(uri):
            _require_bucket(client(), bucket)
            if if_version:
                return _put_if(bucket, key, data, {"IfMatch": f'"{if_version}"'})
            if if_absent:
                return _put_if(bucket, key, data, {"IfNoneMatch": "*"})
            if len(data) > _TRANSFER.multipart_threshold:
                client().upload_fileobj(io.BytesIO(data), bucket, key, Config=_TRANSFER)
            else:
                client().put_object(Bucket=bucket, Key=key, Body=data)
            return True

    @with_fresh_credentials
    def download(self, uri: str, path: str) -> None:
        """Download an object to the local file ``path``, which appears when it is whole. Raises Missing."""
        bucket, key = split(uri)
        try:
            with explained(uri), atomic_file(path) as file:
                client().download_fileobj(bucket, key, file, Config=_TRANSFER)
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}. {uri} is copied here: free some space, or set storage.cache_dir "
                "(of a command that has no recipe: the environment variable TMPDIR) to another disk."
            ) from error

    @with_fresh_credentials
    def upload(self, path: str, uri: str, moved: Callable[[int], object] | None = None) -> None:
        """Upload the local file ``path``, in several parts where it is large. Raises Missing where there is no such file."""
        bucket, key = split(uri)
        if not os.path.isfile(path):
            raise Missing(path)
        with explained(uri):
            _require_bucket(client(), bucket)
            client().upload_file(path, bucket, key, Config=_TRANSFER, Callback=moved)

    @contextmanager
    def create(self, uri: str, *, scratch: str | None = None, patience_s: float = 0.0) -> Iterator[IO[bytes]]:
        """A local file to fill, which is uploaded at the end. It has no name, so that a process that is killed leaves nothing."""
        retry_transient(lambda: _reach(uri), patience_s)  # now, not after the work
        try:
            if scratch is not None:
                os.makedirs(scratch, exist_ok=True)
            with tempfile.TemporaryFile(dir=scratch) as file:
                yield file
                file.flush()
                retry_transient(lambda: _send(file.fileno(), uri), patience_s)
        except OSError as error:
            folder = scratch or tempfile.gettempdir()
            raise UserError(
                f"{folder}: {error.strerror}. A copy of {uri} is written here first: free some space, or set storage.scratch_dir "
                "(of a command that has no recipe: the environment variable TMPDIR) to another disk."
            ) from error

    @with_fresh_credentials
    def copy(self, source: str, target: str) -> None:
        """Let the server copy an object, in several parts where it is large. Raises Missing."""
        (bucket, key), (target_bucket, target_key) = split(source), split(target)
        with explained(source):
            client().copy({"Bucket": bucket, "Key": key}, target_bucket, target_key, Config=_COPY)

    def exists(self, uri: str) -> bool:
        """Whether an object of this name exists, by a HEAD request."""
        try:
            self.version(uri)
        except Missing:
            return False
        return True

    def list(self, prefix: str) -> list[str]:
        """Return the URIs of all objects below a folder, sorted; one request for each 1,000 of them."""
        return sorted(self.sizes(prefix))  # here: not every server lists in byte order

    @with_fresh_credentials
    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of each object that :meth:`list` names; the same requests."""
        bucket, key = split(prefix, folder=True)
        folder = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
        with explained(prefix):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder)
            sizes = {item["Key"]: int(item["Size"]) for page in pages for item in page.get("Contents", ())}
        # A key that ends in "/" is a folder that some tool has drawn.
        return {f"s3://{bucket}/{key}": size for key, size in sizes.items() if not key.endswith("/")}

    @with_fresh_credentials
    def delete(self, uri: str) -> None:
        """Delete an object; nothing happens if there is none."""
        bucket, key = split(uri)
        with explained(uri):
            client().delete_object(Bucket=bucket, Key=key)

    def version(self, uri: str) -> str:
        """Return the object's ETag, by a HEAD request. Raises Missing."""
        with explained(uri):
            return head(uri, FetchStats()).etag.strip('"')


@with_fresh_credentials
def _reach(uri: str) -> None:
    with explained(uri):
        _require_bucket(client(), split(uri)[0])


@with_fresh_credentials
def _send(descriptor: int, uri: str) -> None:
    """Upload an open file from its beginning, in several parts where it is large."""
    bucket, key = split(uri)
    with explained(uri), open(os.dup(descriptor), "rb") as file:  # boto3 closes what it is given
        file.seek(0)
        client().upload_fileobj(file, bucket, key, Config=_TRANSFER)


def _put_if(bucket: str, key: str, data: bytes, condition: PutCondition) -> bool:
    """Put an object under a condition, in several parts where it is large; return False if the condition does not hold.

    If the answer to our own successful put is lost, the retry meets our own object. A random mark tells it from
    another writer's.
    """
    mark = uuid.uuid4().hex
    for attempt in range(1, TRIES + 1):
        try:
            if len(data) > _TRANSFER.multipart_threshold:
                _put_parts(bucket, key, data, {"writer": mark}, condition)
            else:
                client().put_object(Bucket=bucket, Key=key, Body=data, Metadata={"writer": mark}, **condition)
            return True
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in _REFUSED or (code == "NoSuchUpload" and _writer(bucket, key) == mark):
                return _writer(bucket, key) == mark
            if code != "ConditionalRequestConflict" or attempt == TRIES:
                raise
            time.sleep(0.1 * 2**attempt)  # the server could not decide a race; it asks to try again
    raise AssertionError("the last attempt returns or raises")


def _put_parts(bucket: str, key: str, data: bytes, metadata: dict[str, str], condition: PutCondition) -> None:
    """Put an object in parts under a condition, which boto3's own transfers do not offer. The last request decides it."""
    s3, size = client(), _TRANSFER.multipart_chunksize
    upload = s3.create_multipart_upload(Bucket=bucket, Key=key, Metadata=metadata)["UploadId"]

    def put(number: int) -> UploadedPart:
        body = data[(number - 1) * size : number * size]
        return {"PartNumber": number, "ETag": s3.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=body)["ETag"]}

    try:
        parts = list(in_order(put, range(1, 1 + -(-len(data) // size)), _THREADS))
        s3.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}, **condition)
    except Exception:
        with suppress(Exception):  # what matters is why it was given up; a server clears such parts away some day
            s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
        raise


def _writer(bucket: str, key: str) -> str | None:
    """The mark of the writer of an object that exists; None if it has been deleted since."""
    try:
        writer: str | None = client().head_object(Bucket=bucket, Key=key)["Metadata"].get("writer")
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchKey", "NotFound"):
            raise
        return None
    return writer


@lru_cache(maxsize=64)
def _require_bucket(client: S3Client, bucket: str) -> None:
    """Look for the bucket before the first write: some servers would quietly create one out of a typing mistake."""
    if not has_bucket(bucket):
        raise NoBucket  # an error is not cached: the bucket may be made meanwhile
