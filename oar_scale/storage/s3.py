"""S3 and what speaks its protocol, through boto3 and the standard AWS environment variables.

    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)   who we are
    AWS_ENDPOINT_URL                                            a server other than AWS
    AWS_DEFAULT_REGION, AWS_MAX_ATTEMPTS                        region; tries per request (6)

S3 makes single puts and completed multipart uploads visible at once, and ``If-None-Match: *`` decides races on the server.
What is added here: bodies that break off are continued by a ranged GET, and errors name the URI and the way out.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ResponseStreamingError,
)

from oar_scale.errors import UserError
from oar_scale.storage import Missing
from oar_scale.storage.local import atomic_file

_TRIES = 6
_CHUNK = 4 << 20
_TRANSFER = TransferConfig(multipart_threshold=32 << 20, multipart_chunksize=16 << 20, max_concurrency=4)

_ABSENT = {"NoSuchKey", "404", "NotFound"}
_DENIED = {"403", "AccessDenied", "Forbidden"}
_BAD_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "401", "Unauthorized"}
_NO_KEYS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound)


class _NoBucket(Exception):
    """The bucket of a write does not exist."""


class S3Storage:
    """``s3://bucket/key``. See :class:`oar_scale.storage.Storage` for what each method promises."""

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            self.version(uri)  # an empty range of a missing object is still an error
            return b""
        data = bytearray()
        etag = ""
        with _explained(uri):
            for attempt in range(1, _TRIES + 1):
                try:
                    response = _get(uri, start + len(data), end, etag)
                    if response is None:
                        break
                    etag = response["ETag"]
                    for chunk in response["Body"].iter_chunks(_CHUNK):
                        data += chunk
                    break
                except (ResponseStreamingError, IncompleteReadError, HTTPClientError):
                    if attempt == _TRIES:
                        raise
                    time.sleep(0.1 * 2**attempt)
        return bytes(data)

    def write(self, uri: str, data: bytes, *, if_absent: bool = False) -> bool:
        bucket, key = _split(uri)
        with _explained(uri):
            _require_bucket(_client(), bucket)
            if not if_absent:
                _client().put_object(Bucket=bucket, Key=key, Body=data)
                return True
            return _put_once(bucket, key, data)

    def download(self, uri: str, path: str) -> None:
        bucket, key = _split(uri)
        with _explained(uri), atomic_file(path) as file:
            _client().download_fileobj(bucket, key, file, Config=_TRANSFER)

    def upload(self, path: str, uri: str) -> None:
        bucket, key = _split(uri)
        if not os.path.isfile(path):
            raise Missing(path)
        with _explained(uri):
            _require_bucket(_client(), bucket)
            _client().upload_file(path, bucket, key, Config=_TRANSFER)

    def exists(self, uri: str) -> bool:
        try:
            self.version(uri)
        except Missing:
            return False
        return True

    def list(self, prefix: str) -> list[str]:
        bucket, key = _split(prefix, folder=True)
        folder = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
        with _explained(prefix):
            pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder)
            keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        # Sorted here: not every server lists in byte order. A key that ends in "/" is a folder that some tool has drawn.
        return sorted(f"s3://{bucket}/{key}" for key in keys if not key.endswith("/"))

    def delete(self, uri: str) -> None:
        bucket, key = _split(uri)
        with _explained(uri):
            _client().delete_object(Bucket=bucket, Key=key)

    def version(self, uri: str) -> str:
        bucket, key = _split(uri)
        with _explained(uri):
            return str(_client().head_object(Bucket=bucket, Key=key)["ETag"]).strip('"')


def _get(uri: str, start: int, end: int | None, etag: str) -> Any:
    """Ask for the bytes from ``start``; ``None`` when the object ends before them. ``etag`` pins what was begun."""
    bucket, key = _split(uri)
    wanted: dict[str, str] = {"IfMatch": etag} if etag else {}
    if start or end is not None:
        wanted["Range"] = f"bytes={start}-" + (str(end - 1) if end is not None else "")
    try:
        return _client().get_object(Bucket=bucket, Key=key, **wanted)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("InvalidRange", "416"):
            return None
        raise


def _put_once(bucket: str, key: str, data: bytes) -> bool:
    """Put an object that must not exist yet.

    If the answer to our own successful put is lost, the retry meets our own object. A random mark tells it from
    another writer's.
    """
    mark = uuid.uuid4().hex
    for attempt in range(1, _TRIES + 1):
        try:
            _client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={"writer": mark})
            return True
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in ("PreconditionFailed", "412"):
                return bool(_client().head_object(Bucket=bucket, Key=key)["Metadata"].get("writer") == mark)
            if code != "ConditionalRequestConflict" or attempt == _TRIES:
                raise
            time.sleep(0.1 * 2**attempt)  # the server could not decide a race; it asks to try again
    raise AssertionError("the last attempt returns or raises")


def _split(uri: str, folder: bool = False) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or not (key or folder):
        raise UserError(f"{uri}: a bucket and a name are needed, like s3://bucket/prefix/name.")
    return bucket, key


def _client() -> Any:
    """The client of this process and environment. Made at first use: a client must not cross a fork, nor be pickled."""
    return _make_client(os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@lru_cache(maxsize=4)
def _make_client(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", _TRIES))},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        tcp_keepalive=True,
    )
    return boto3.session.Session().client("s3", config=config)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn what a user can mend into one clear error that names the URI, the server and the way out."""
    try:
        yield
    except _NoBucket:
        raise _no_bucket(uri, _split(uri, folder=True)[0]) from None
    except S3UploadFailedError as error:  # boto3 wraps the answer of the server in a text
        raise (_translated(uri, error.__context__) if isinstance(error.__context__, ClientError) else error) from error
    except ClientError as error:
        raise _translated(uri, error) from error
    except _NO_KEYS as error:
        raise UserError(
            f"{uri}: no S3 credentials ({error}).\n"
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a server other than AWS also AWS_ENDPOINT_URL."
        ) from error
    except ParamValidationError as error:
        raise UserError(f"{uri}: not a valid S3 name: {error}") from error
    except (ConnectionError, HTTPClientError, ResponseStreamingError, IncompleteReadError) as error:
        raise UserError(
            f"{uri}: no connection to the S3 server at {_client().meta.endpoint_url}: {error}\n"
            f"Check that it runs, and the URL in AWS_ENDPOINT_URL (now {os.environ.get('AWS_ENDPOINT_URL', 'not set: AWS itself')})."
        ) from error


def _translated(uri: str, error: ClientError) -> Exception:
    """What the server's answer means to the user; the answer itself when it is nothing a user can mend."""
    code = error.response["Error"]["Code"]
    server = _client().meta.endpoint_url
    bucket = _split(uri, folder=True)[0]
    if code == "NoSuchBucket" or (code in _ABSENT and not _has_bucket(bucket)):
        return _no_bucket(uri, bucket)
    if code in _ABSENT:
        return Missing(uri)
    if code in _DENIED | _BAD_KEY:
        why = "does not know these credentials" if code in _BAD_KEY else "refuses access"
        return UserError(
            f"{uri}: {server} {why} ({code}, {error.operation_name}).\n"
            "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, and that the key may read, write and list this bucket."
        )
    error.add_note(f"while accessing {uri} on {server}")
    return error


def _no_bucket(uri: str, bucket: str) -> UserError:
    server = _client().meta.endpoint_url
    return UserError(f"{uri}: there is no bucket {bucket!r} on {server}.\nCreate it, or correct storage.root or AWS_ENDPOINT_URL.")


@lru_cache(maxsize=64)
def _require_bucket(client: Any, bucket: str) -> None:
    """Look for the bucket before the first write: some servers would quietly create one out of a typing mistake."""
    if not _has_bucket(bucket):
        raise _NoBucket  # an error is not cached: the bucket may be made meanwhile


def _has_bucket(bucket: str) -> bool:
    """Whether the bucket exists; a HEAD of an object does not tell a missing bucket from a missing key."""
    try:
        _client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return error.response["Error"]["Code"] not in _ABSENT | {"NoSuchBucket"}
    return True
