"""A folder that is there completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from oar_scale.errors import UserError
from oar_scale.storage import join, open_storage


@contextmanager
def new_folder(uri: str, last: str) -> Iterator[str]:
    """A local folder to fill with files; they appear at ``uri`` when the block ends without an error.

    A local folder is renamed to its name in one step. An object store has no such step: there ``last`` is the file that is
    written last, so that a folder without it is not whole.

    Raises:
        UserError: there is something at ``uri`` that is no empty folder.
    """
    if uri.startswith("s3://"):
        if open_storage(uri).exists(join(uri, last)):
            raise UserError(_taken(uri))
        with tempfile.TemporaryDirectory(prefix="oar-folder-") as scratch:
            yield scratch
            for name in sorted(os.listdir(scratch), key=lambda name: name == last):
                open_storage(uri).upload(os.path.join(scratch, name), join(uri, name))
        return
    target = os.path.realpath(uri)
    if holds_something(target):
        raise UserError(_taken(uri))
    temporary = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        _within_reach(uri, os.makedirs, temporary)
        yield temporary
        _within_reach(uri, os.rename, temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def holds_something(path: str) -> bool:
    """Whether there is anything but an empty folder."""
    return os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path))


def _within_reach(uri: str, action: Callable[..., None], *paths: str) -> None:
    try:
        action(*paths)
    except OSError as error:
        raise UserError(f"{uri}: {error.strerror}. Choose another location with --out.") from error


def _taken(uri: str) -> str:
    return f"{uri}: there is something here already. Delete it, or choose another location with --out."
