"""The S3 client of a process, and what its errors mean to the user.

AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)   who we are
AWS_ENDPOINT_URL                                            a server other than AWS
AWS_DEFAULT_REGION, AWS_MAX_ATTEMPTS                        region; tries per request (6)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import boto3
from boto3.exceptions import S3UploadFailedError
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
from oar_scale.storage import Missing, Unreachable
from oar_scale.storage.s3_types import S3Client

TRIES = 6
"""Tries per request, unless AWS_MAX_ATTEMPTS says otherwise; botocore waits between them (its standard mode)."""
TIMEOUT_S = 60.0
"""Silence of the server that ends a try."""
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}

_ABSENT = {"NoSuchKey", "404", "NotFound"}
_DENIED = {"403", "AccessDenied", "Forbidden"}
_BAD_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "401", "Unauthorized"}
_NO_KEYS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound)
_sent = threading.local()


class NoBucket(Exception):
    """The bucket of a write does not exist."""


def split(uri: str, folder: bool = False) -> tuple[str, str]:
    """Return bucket and key of an ``s3://`` URI. Raises UserError where one is missing; of a ``folder``, the key may be empty."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or not (key or folder):
        raise UserError(f"{uri}: a bucket and a name are needed, like s3://bucket/prefix/name.")
    return bucket, key


def client(timeout_s: float = TIMEOUT_S) -> S3Client:
    """The client of this process and environment. Made at first use: a client must not cross a fork, nor be pickled."""
    return _make_client(os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))), timeout_s)


def renew(used: S3Client, timeout_s: float) -> None:
    """Make the next ``client(timeout_s)`` read the credentials anew, unless another thread has seen to it since ``used`` was got."""
    if client(timeout_s) is used:
        _make_client.cache_clear()


def requests_sent() -> int:
    """How many requests this thread has sent so far, with the ones that botocore repeats by itself."""
    return getattr(_sent, "count", 0)


@lru_cache(maxsize=4)
def _make_client(process: int, environment: tuple[tuple[str, str], ...], timeout_s: float) -> S3Client:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", TRIES))},
        connect_timeout=10,
        read_timeout=timeout_s,
        max_pool_connections=32,
        tcp_keepalive=True,
    )
    made: S3Client = boto3.session.Session().client("s3", config=config)
    made.meta.events.register("before-send.s3", _count)
    return made


def _count(**_: object) -> None:
    _sent.count = requests_sent() + 1


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what a user can fix into one clear error that names the URI, the server and the remedy."""
    try:
        yield
    except NoBucket:
        raise _no_bucket(uri, split(uri, folder=True)[0]) from None
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
        raise Unreachable(
            f"{uri}: no connection to the S3 server at {client().meta.endpoint_url}: {error}\n"
            f"Check that it runs, and the URL in AWS_ENDPOINT_URL (now {os.environ.get('AWS_ENDPOINT_URL', 'not set: AWS itself')})."
        ) from error


def _translated(uri: str, error: ClientError) -> Exception:
    """The server's answer as an error for the user; the answer itself when it is nothing a user can fix."""
    code = error.response["Error"]["Code"]
    server = client().meta.endpoint_url
    bucket = split(uri, folder=True)[0]
    if code == "NoSuchBucket" or (code in _ABSENT and not has_bucket(bucket)):
        return _no_bucket(uri, bucket)
    if code in _ABSENT:
        return Missing(uri)
    if code in EXPIRED:
        return UserError(
            f"{uri}: the S3 credentials have expired ({code}), and are the same when read again.\n"
            "Renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile in AWS_PROFILE, and start the same\n"
            "command again. A profile that is renewed before the run notices is picked up without a restart."
        )
    if code in _DENIED | _BAD_KEY:
        why = "does not know these credentials" if code in _BAD_KEY else "refuses access"
        return UserError(
            f"{uri}: {server} {why} ({code}, {error.operation_name}).\n"
            "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, and that the key may read, write and list this bucket."
        )
    if may_pass(error):
        return Unreachable(
            f"{uri}: given up after several tries of {error.operation_name}; the last answer: {error}\n"
            f"The S3 server at {server} is overloaded or out of order. When it answers again, start the same command again."
        )
    error.add_note(f"while accessing {uri} on {server}")
    return error


def may_pass(error: ClientError) -> bool:
    """Whether the server's answer says that the same request may succeed later."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or status in (408, 429) or error.response["Error"]["Code"] in ("SlowDown", "RequestTimeout")


def _no_bucket(uri: str, bucket: str) -> UserError:
    server = client().meta.endpoint_url
    return UserError(f"{uri}: there is no bucket {bucket!r} on {server}.\nCreate it, or correct storage.root or AWS_ENDPOINT_URL.")


def has_bucket(bucket: str) -> bool:
    """Whether the bucket exists; a HEAD of an object does not distinguish a missing bucket from a missing key."""
    try:
        client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return error.response["Error"]["Code"] not in _ABSENT | {"NoSuchBucket"}
    return True
