"""What is used of boto3's S3 client and its answers; boto3 makes the client's methods at run time, so that they have no types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import IO, Protocol, TypedDict, Unpack

from boto3.s3.transfer import TransferConfig
from botocore.client import ClientMeta
from urllib3 import HTTPResponse


class ObjectBody(Protocol):
    """The body of an object, as it comes over the connection (``botocore.response.StreamingBody``)."""

    def iter_chunks(self, chunk_size: int) -> Iterator[bytes]:
        """The bytes in chunks that are full but for the last one, checked against the server's checksum at the end."""

    def __enter__(self) -> HTTPResponse:
        """urllib3's response."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the response, and the connection with it where bytes are left."""


class HeadObject(TypedDict):
    """The answer to HeadObject."""

    ContentLength: int
    ETag: str
    Metadata: dict[str, str]


class GetObject(TypedDict):
    """The answer to GetObject."""

    Body: ObjectBody
    ContentLength: int
    ETag: str


class CopySource(TypedDict):
    """What is copied."""

    Bucket: str
    Key: str


class ListedObject(TypedDict):
    """An object in a listing."""

    Key: str
    Size: int


class ListPage(TypedDict, total=False):
    """The answer to ListObjectsV2, without ``Contents`` where nothing is listed."""

    Contents: list[ListedObject]


class ListPages(Protocol):
    """A listing that asks for one page after the other."""

    def paginate(self, *, Bucket: str, Prefix: str) -> Iterable[ListPage]:
        """The pages of all objects whose key begins with ``Prefix``."""


class CreateMultipartUpload(TypedDict):
    """The answer to CreateMultipartUpload."""

    UploadId: str


class UploadPart(TypedDict):
    """The answer to UploadPart."""

    ETag: str


class UploadedPart(TypedDict):
    """A part, as CompleteMultipartUpload names it."""

    PartNumber: int
    ETag: str


class UploadedParts(TypedDict):
    """All parts of an object."""

    Parts: list[UploadedPart]


class PutCondition(TypedDict, total=False):
    """When an object is written: if there is none (``IfNoneMatch="*"``), or if it is still the one with this quoted ETag."""

    IfNoneMatch: str
    IfMatch: str


class S3Client(Protocol):
    """The methods of the client that are used; each raises ``botocore.exceptions.ClientError`` for an error of the server."""

    def __hash__(self) -> int:
        """Clients are keys of caches, by identity."""

    @property
    def meta(self) -> ClientMeta:
        """The server's address, and the events of the client."""

    def head_bucket(self, *, Bucket: str) -> object:
        """Ask whether a bucket exists."""

    def head_object(self, *, Bucket: str, Key: str) -> HeadObject:
        """Ask for size, version and metadata of an object."""

    def get_object(self, *, Bucket: str, Key: str, IfMatch: str = ..., Range: str = ...) -> GetObject:
        """Begin to read an object or a range of it."""

    def put_object(
        self, *, Bucket: str, Key: str, Body: bytes, Metadata: dict[str, str] = ..., **condition: Unpack[PutCondition]
    ) -> object:
        """Write an object in one request."""

    def create_multipart_upload(self, *, Bucket: str, Key: str, Metadata: dict[str, str]) -> CreateMultipartUpload:
        """Begin to write an object in parts."""

    def upload_part(self, *, Bucket: str, Key: str, UploadId: str, PartNumber: int, Body: bytes) -> UploadPart:
        """Write one part, which is numbered from 1."""

    def complete_multipart_upload(
        self, *, Bucket: str, Key: str, UploadId: str, MultipartUpload: UploadedParts, **condition: Unpack[PutCondition]
    ) -> object:
        """Make the object of its parts."""

    def abort_multipart_upload(self, *, Bucket: str, Key: str, UploadId: str) -> object:
        """Remove the parts of an object that is not to be made."""

    def delete_object(self, *, Bucket: str, Key: str) -> object:
        """Delete an object; absent is fine."""

    def download_fileobj(self, Bucket: str, Key: str, Fileobj: IO[bytes], *, Config: TransferConfig) -> None:
        """Read an object into a file, in parts."""

    def upload_fileobj(self, Fileobj: IO[bytes], Bucket: str, Key: str, *, Config: TransferConfig) -> None:
        """Write an object from a file that is open for reading, in parts."""

    def upload_file(
        self, Filename: str, Bucket: str, Key: str, *, Config: TransferConfig, Callback: Callable[[int], object] | None
    ) -> None:
        """Write an object from a local file, in parts."""

    def copy(self, CopySource: CopySource, Bucket: str, Key: str, *, Config: TransferConfig) -> None:
        """Copy an object to another name, in parts where it is large."""

    def get_paginator(self, operation_name: str) -> ListPages:
        """The pages of a listing; ``list_objects_v2`` is the one operation that is used."""
