"""Fetch the files of a checkpoint from S3, or read them where they are, and verify them against its manifest."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from crc32c import crc32c

from oar_scale.distributed.checkpoints.layout import Checkpoint, DamagedCheckpoint, read_checkpoint, require_fields
from oar_scale.errors import UserError
from oar_scale.storage import Missing, join, open_storage
from oar_scale.storage.background import in_order
from oar_scale.storage.own_folder import foreign_part

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHUNK_BYTES = 16 << 20
_BUFFER_BYTES = 64 << 10
_CONNECTIONS = 4
_TRIES = 2
"""A file that arrives damaged may have become so in transit."""


def local_folder(checkpoint: Checkpoint, scratch: str) -> str:
    """The local folder that holds the files of a checkpoint after :func:`obtain`."""
    return os.path.join(scratch, checkpoint.save) if checkpoint.uri.startswith("s3://") else checkpoint.folder


def obtain(checkpoint: Checkpoint, names: Iterable[str], scratch: str, setting: str = "storage.scratch_dir") -> None:
    """Bring files of a checkpoint to ``local_folder(checkpoint, scratch)`` and verify each of them.

    Args:
        setting: what the user sets to have ``scratch`` elsewhere, for errors.

    Raises:
        DamagedCheckpoint: names a file that is missing or differs from the manifest.
        UserError: a file asks for code to be run; or the storage cannot be reached, or the disk is full: the checkpoint itself may be
            intact.
    """
    from oar_scale.distributed.checkpoints.deepspeed_files import load_shard

    folder, names = local_folder(checkpoint, scratch), list(names)
    if folder == checkpoint.folder:
        for name in names:
            check(checkpoint, name)
            load_shard(os.path.join(folder, name), "meta")
        return
    if foreign := foreign_part(folder):
        raise UserError(f"{foreign}: was made by another user. Set {setting} to a folder of your own.")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}. Set {setting} to a folder that can be written.") from error
    # An attempt before this one, which the storage has interrupted, has left parts of the files here: they are written over.
    needed = sum(max(0, checkpoint.files[name]["bytes"] - _held(os.path.join(folder, name))) for name in names)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed} bytes of {checkpoint.uri} are needed here, {free} are free. Free some, or set {setting} to another disk."
        )
    for name in names:
        _download(checkpoint, name, os.path.join(folder, name), setting)
        load_shard(os.path.join(folder, name), "meta")


def discard(checkpoint: Checkpoint, names: Iterable[str], scratch: str) -> None:
    """Remove what :func:`obtain` has brought to ``local_folder(checkpoint, scratch)`` of these files, or a part of it."""
    folder = local_folder(checkpoint, scratch)
    if folder == checkpoint.folder:
        return
    for name in names:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))


def _held(path: str) -> int:
    """The bytes that a file holds on the disk, 0 where there is none."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


@contextmanager
def local_checkpoint(uri: str) -> Iterator[tuple[Checkpoint, str]]:
    """A verified checkpoint and the local folder of its files: its own, or a copy that lasts as long as the block.

    Raises:
        UserError: it is not committed, or a file is missing or damaged.
    """
    with tempfile.TemporaryDirectory(prefix="oar-checkpoint-") as scratch:
        try:
            checkpoint = read_checkpoint(uri)
            require_fields(checkpoint, "files")
            obtain(checkpoint, checkpoint.files, scratch, "the environment variable TMPDIR")
            require_fields(checkpoint)
        except DamagedCheckpoint as error:
            raise UserError(f"{uri}: {error}. Use another checkpoint.") from error
        yield checkpoint, local_folder(checkpoint, scratch)


def check(checkpoint: Checkpoint, name: str) -> None:
    """Read a file of a checkpoint and compare it with the manifest.

    Raises:
        DamagedCheckpoint: it is missing or differs.
        UserError: the storage cannot be reached.
    """
    uri, size = join(checkpoint.folder, name), checkpoint.files[name]["bytes"]
    storage, crc, size_read = open_storage(uri), 0, 0
    starts = range(0, size + 1, _CHUNK_BYTES)  # one byte more than there should be, to notice a file that has grown
    try:
        for first in range(0, len(starts), _CONNECTIONS):  # a few at a time, so that chunks read ahead do not fill the memory
            few = starts[first : first + _CONNECTIONS]
            for chunk in in_order(lambda start: storage.read(uri, start, min(start + _CHUNK_BYTES, size + 1)), few, _CONNECTIONS):
                crc, size_read = crc32c(chunk, crc), size_read + len(chunk)
    except Missing:
        raise DamagedCheckpoint(f"{name} is missing", name) from None
    _compare(checkpoint, name, size_read, crc)


def check_content(checkpoint: Checkpoint, name: str) -> None:
    """Raise UserError where a file of a checkpoint asks for code to be run. Reads its structure only, not its tensors."""
    from oar_scale.distributed.checkpoints.deepspeed_files import refuse_code

    uri = join(checkpoint.folder, name)
    refuse_code(io.BufferedReader(_Object(uri, checkpoint.files[name]["bytes"]), _BUFFER_BYTES), uri)


class _Object(io.RawIOBase):
    """An object as a file to read: each read is a request."""

    def __init__(self, uri: str, size: int) -> None:
        self._uri, self._size, self._at = uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        data = open_storage(self._uri).read(self._uri, self._at, self._at + len(view))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _download(checkpoint: Checkpoint, name: str, path: str, setting: str) -> None:
    from oar_scale.storage.cache_folder import DamagedObject, Part
    from oar_scale.storage.remote import Landing
    from oar_scale.storage.schemes import remote_objects_of, scheme_of

    uri, size = join(checkpoint.folder, name), checkpoint.files[name]["bytes"]
    for last in range(_TRIES):
        landing = Landing(size, Part(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), path))
        try:
            crc = remote_objects_of(scheme_of(uri)).download(uri, "", landing, lambda took: None)
            if landing.problem is not None:
                raise UserError(f"{path}: {landing.problem.strerror}. Free some space, or set {setting} to another disk.")
            _compare(checkpoint, name, size + len(open_storage(uri).read(uri, size, size + 1)), crc)
            return
        except Missing:
            raise DamagedCheckpoint(f"{name} is missing", name) from None
        except (DamagedCheckpoint, DamagedObject) as error:
            if last == _TRIES - 1:
                raise error if isinstance(error, DamagedCheckpoint) else DamagedCheckpoint(f"{name} is damaged ({error})", name) from None


def _compare(checkpoint: Checkpoint, name: str, size: int, crc: int) -> None:
    entry = checkpoint.files[name]
    if (size, crc) != (entry["bytes"], entry["crc32c"]):
        written = f"{entry['bytes']} bytes, {entry['crc32c']:08x}"
        raise DamagedCheckpoint(f"{name} is damaged ({size} bytes, crc32c {crc:08x}; the manifest says {written})", name)
