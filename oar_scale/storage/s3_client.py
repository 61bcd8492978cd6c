"""The S3 client of a process, and what its errors mean to the user.

AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)   who we are
AWS_ENDPOINT_URL                                            a server other than AWS
AWS_DEFAULT_REGION, AWS_MAX_ATTEMPTS                        region; tries per request (6)
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    ConnectionError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    InvalidRegionError,
    InvalidRetryConfigurationError,
    LoginError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ResponseStreamingError,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from s3transfer.exceptions import RetriesExceededError
from urllib3.exceptions import LocationValueError

from oar_scale.errors import BadName, UserError
from oar_scale.redaction import redact, secret_name
from oar_scale.storage import Missing, Unreachable
from oar_scale.storage.s3_types import S3Client
from oar_scale.text import cut

TRIES = 6
"""Tries per request, unless AWS_MAX_ATTEMPTS says otherwise; botocore waits between them (its standard mode)."""
TIMEOUT_S = 60.0
"""Silence of the server that ends a try."""
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}

_ABSENT = {"NoSuchKey", "404", "NotFound"}
_DENIED = {"403", "AccessDenied", "Forbidden"}
_BAD_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "401", "Unauthorized"}
_BAD_NAME = {"KeyTooLongError", "InvalidURI", "InvalidObjectName", "XMinioInvalidObjectName"}
_NO_KEYS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound)
_OUT_OF_REACH = (ConnectionError, HTTPClientError, ResponseStreamingError, IncompleteReadError, RetriesExceededError)
_FILES = "the files in AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE (~/.aws/config, ~/.aws/credentials)"
_REMEDIES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (
        _NO_KEYS,
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a server other than AWS also AWS_ENDPOINT_URL.",
    ),
    ((SSOError, LoginError, TokenRetrievalError), "Log in again: aws sso login, with the profile in AWS_PROFILE."),
    (
        (CredentialRetrievalError, json.JSONDecodeError, LookupError),
        "What should bring the credentials fails: credential_process of the profile in AWS_PROFILE (see AWS_CONFIG_FILE), or the service "
        "in AWS_CONTAINER_CREDENTIALS_FULL_URI. Run it by hand.",
    ),
    ((ConfigParseError, ConfigNotFound), f"Correct {_FILES}."),
    (InvalidRetryConfigurationError, "Correct AWS_MAX_ATTEMPTS and AWS_RETRY_MODE."),
    ((InvalidRegionError, NoRegionError), "Correct AWS_DEFAULT_REGION (AWS_REGION)."),
)
"""What to look at, by the kind of error."""
_FILE_VARIABLES = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
_SETTINGS = re.compile(r"AWS_|REQUESTS_CA_BUNDLE|(?:HTTPS?|NO)_PROXY", re.IGNORECASE)
_ENDPOINTS = re.compile(r"AWS_ENDPOINT_URL(_\w+)?|AWS_CONTAINER_CREDENTIALS_FULL_URI")
_ANSWERS = {
    ("AuthorizationHeaderMalformed", "PermanentRedirect", "301", "IllegalLocationConstraintException", "IncorrectEndpoint"): (
        "The bucket lies in another region: correct AWS_DEFAULT_REGION (AWS_REGION), or AWS_ENDPOINT_URL."
    ),
    ("RequestTimeTooSkewed", "RequestExpired"): "The clock of this machine is wrong: set it.",
    ("400", "BadRequest", "InvalidRequest"): "Check the credentials (AWS_SESSION_TOKEN may have expired), AWS_DEFAULT_REGION and the name.",
}
"""What to look at where the server refuses, by its codes."""
_sent = threading.local()
P = ParamSpec("P")
T = TypeVar("T")


class NoBucket(Exception):
    """The bucket of a write does not exist."""


class Expired(UserError):
    """The credentials have expired, or may have."""


def split(uri: str, folder: bool = False) -> tuple[str, str]:
    """Return bucket and key of an ``s3://`` URI. Raises UserError where one is missing; of a ``folder``, the key may be empty."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):  # not shown: it may well be a key
        raise UserError(
            "s3://***: a bucket's name has neither : nor @ in it. Keys do not belong in a URL: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        )
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


def with_fresh_credentials(work: Callable[P, T]) -> Callable[P, T]:
    """``work``, once more with credentials that are read anew where they have expired."""

    @wraps(work)
    def again(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return work(*arguments, **named)
        except Expired:
            _make_client.cache_clear()
        return work(*arguments, **named)

    return again


def requests_sent() -> int:
    """How many requests this thread has sent so far, with the ones that botocore repeats by itself."""
    return getattr(_sent, "count", 0)


@lru_cache(maxsize=4)
def _make_client(process: int, environment: tuple[tuple[str, str], ...], timeout_s: float) -> S3Client:
    _check_variables()
    config = Config(
        retries={"mode": "standard", "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS") or TRIES)},
        connect_timeout=10,
        read_timeout=timeout_s,
        max_pool_connections=32,
        tcp_keepalive=True,
    )
    try:
        session = boto3.session.Session()
        made: S3Client = session.client("s3", config=config)
        credentials = session.get_credentials()
        if credentials is not None:
            credentials.get_frozen_credentials()  # now, where whatever fails is a setting, and not in the middle of a request
    except _OUT_OF_REACH:
        raise
    except Exception as error:  # botocore lets pass what its parsers, files and programs raise
        raise _wrong_setting(error) from error
    made.meta.events.register("before-send.s3", _count)
    return made


def _check_variables() -> None:
    """Refuse what botocore would only notice in the middle of a request, or print with the key. Raises UserError."""
    for name, value in sorted(os.environ.items()):
        if not name.startswith("AWS_"):
            continue
        if any(ord(each) < 32 or ord(each) == 127 for each in value):
            raise UserError(f"{name}: has a line end, or another control character, in it. Export it again without.")
        if not value.isascii() and re.search("KEY|TOKEN$|REGION|ENDPOINT|RETRY|ATTEMPTS", name):
            raise UserError(f"{name}: has a character in it that is not ASCII. Export it again.")
        if _ENDPOINTS.fullmatch(name) and value and not _is_url(value):
            raise UserError(f"{name}={redact(value)}: is no URL. It has to begin with http:// or https://, like http://localhost:8333.")
    attempts = os.environ.get("AWS_MAX_ATTEMPTS") or str(TRIES)
    if not re.fullmatch("0*[1-9][0-9]{0,5}", attempts):
        raise UserError(
            f"AWS_MAX_ATTEMPTS={cut(attempts, characters=40)}: is not a number of tries. Set it to 1 or more, or unset it for {TRIES}."
        )
    for name in _FILE_VARIABLES:
        if os.environ.get(name) and not os.path.exists(os.environ[name]):
            raise UserError(f"{name}={os.environ[name]}: there is no such file. Correct the variable, or unset it.")


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0) and " " not in value
    except ValueError:  # a port above 65535, brackets that are not closed
        return False


def _wrong_setting(error: Exception, uri: str = "") -> UserError:
    """An error of the settings: nothing was sent, or the answer was no S3 server's."""
    remedy = next((text for kinds, text in _REMEDIES if isinstance(error, kinds)), None)
    filename, ours = getattr(error, "filename", None), {name: value for name, value in os.environ.items() if _SETTINGS.match(name)}
    named = [
        name
        for name, value in ours.items()
        if len(value) > 2 and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", str(error)) and not secret_name(name)
    ]
    if remedy is None and named:
        remedy = f"Correct {' or '.join(sorted(named))}."
    if remedy is None and filename:
        remedy = f"{filename} is named in {_FILES}: correct it there."
    remedy = remedy or f"Check the variables of this shell ({', '.join(sorted(ours))}), and {_FILES}."
    why = f"{type(error).__name__}: {error}" if isinstance(error, BotoCoreError | OSError | ValueError) else type(error).__name__
    lead = "no S3 credentials" if isinstance(error, _NO_KEYS) else "the settings of S3 cannot be used"
    return UserError(f"{uri or 'S3'}: {lead} ({redact(why)}).\n{remedy}")


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
    except FlexibleChecksumError:
        raise  # the object, not the settings
    except (ParamValidationError, UnicodeEncodeError) as error:
        raise BadName(f"{uri!r}: not a valid S3 name: {redact(str(error))}") from error
    except SSLError as error:
        raise UserError(
            f"{uri}: the certificate of the S3 server at {_server()} is not accepted ({redact(str(error))}).\n"
            "Name the authority that signed it in AWS_CA_BUNDLE, or correct AWS_ENDPOINT_URL."
        ) from error
    except _OUT_OF_REACH as error:
        if _is_own_fault(error):
            raise _wrong_setting(error, uri) from None  # its text, and that of its cause, have the key in them
        raise _no_connection(uri, error) from error
    except (BotoCoreError, json.JSONDecodeError) as error:  # what has expired since, or broken, is found when it is renewed
        raise _wrong_setting(error, uri) from error
    except OSError as error:
        if error.filename is None or error.filename not in {os.environ.get(name) for name in _FILE_VARIABLES}:
            raise  # of the disk
        raise _wrong_setting(error, uri) from error


def _no_connection(uri: str, error: Exception) -> Unreachable:
    return Unreachable(
        f"{uri}: no connection to the S3 server at {_server()}: {redact(str(error))}\n"
        f"Check that it runs, and the URL in AWS_ENDPOINT_URL ({redact(os.environ.get('AWS_ENDPOINT_URL', 'not set: AWS itself'))})."
    )


def _is_own_fault(error: Exception) -> bool:
    """Whether a request was not sent at all, since a header, a URL or a proxy is none."""
    cause = error.kwargs.get("error") if type(error) is HTTPClientError else None
    return isinstance(cause, ValueError | UnicodeError | LocationValueError) and not isinstance(cause, OSError)


def _server() -> str:
    """The server's address, for errors: without credentials."""
    try:
        return redact(client().meta.endpoint_url)
    except Exception:  # the settings are what is wrong
        return redact(os.environ.get("AWS_ENDPOINT_URL", "AWS"))


def _translated(uri: str, error: ClientError) -> Exception:
    """The server's answer as an error for the user."""
    code = error.response["Error"]["Code"]
    server = _server()
    bucket = split(uri, folder=True)[0]
    if code == "NoSuchBucket" or (code in _ABSENT and not has_bucket(bucket)):
        return _no_bucket(uri, bucket)
    if code in _ABSENT:
        return Missing(uri)
    if code in EXPIRED:
        return Expired(
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
    if code in _BAD_NAME:
        return BadName(f"{uri!r}: not a valid S3 name: {redact(str(error))}")
    if may_pass(error):
        return Unreachable(
            f"{uri}: given up after several tries of {error.operation_name}; the last answer: {redact(str(error))}\n"
            f"The S3 server at {server} is overloaded or out of order. When it answers again, start the same command again."
        )
    remedy = next((text for codes, text in _ANSWERS.items() if code in codes), "Check AWS_ENDPOINT_URL, and that this server is meant.")
    kind = Expired if code == "400" else UserError  # the answer to a HEAD has no body that would say what is wrong
    return kind(f"{uri}: {server} refuses {error.operation_name}: {redact(str(error))}\n{remedy}")


def may_pass(error: ClientError) -> bool:
    """Whether the server's answer says that the same request may succeed later."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or status in (408, 429) or error.response["Error"]["Code"] in ("SlowDown", "RequestTimeout")


def _no_bucket(uri: str, bucket: str) -> UserError:
    server = _server()
    return UserError(f"{uri}: there is no bucket {bucket!r} on {server}.\nCreate it, or correct storage.root or AWS_ENDPOINT_URL.")


def has_bucket(bucket: str) -> bool:
    """Whether the bucket exists; a HEAD of an object does not distinguish a missing bucket from a missing key."""
    try:
        client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return error.response["Error"]["Code"] not in _ABSENT | {"NoSuchBucket"}
    except _OUT_OF_REACH as error:  # it went away since it answered that there is no such object
        raise _no_connection(f"s3://{bucket}", error) from error
    return True
