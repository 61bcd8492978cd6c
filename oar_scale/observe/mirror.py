"""A copy of the event files in the run's S3 storage, for readers on other hosts; and how such a reader gets at it.

    events/pretrain-003.jsonl                      local: the truth, written by rank 0 wherever that is
    ROOT/events/pretrain-003/owner                 claimed by that rank 0: no other host makes an attempt 3
    ROOT/events/pretrain-003/000000000000.jsonl    its first whole lines, written anew as they grow, up to 1 MB
    ROOT/events/pretrain-003/000001048131.jsonl    the next ones; the name is where they begin
    ROOT/events/files/samples/...                  pictures that ``samples`` events name

The process that writes the events copies them every few seconds in a thread of its own. S3 may be away for as long as it
likes: the files on the disk are the buffer, and an attempt that was not copied completely is by the next one of its host.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject, parse_object
from oar_scale.observe.events import EventLog, attempt_path, attempts, next_local, parse_line
from oar_scale.observe.projection import PICTURES, picture_paths
from oar_scale.storage import Missing, join, open_storage
from oar_scale.storage.background import in_order, start
from oar_scale.storage.local import atomic_file, explained
from oar_scale.storage.own_folder import no_follow

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
FLUSH_S = 10.0
"""How long the end of a stage waits for its last lines to be copied."""
CLAIM_S = 15.0
"""How long the start of an attempt waits for S3 to say which number it has."""
THREADS = 8


@contextmanager
def open_log(folder: str, stage: str, root: str, mirror_s: float) -> Iterator[EventLog]:
    """The event log of a new attempt, copied to ``root`` while it is open if that is in S3.

    Args:
        folder: local folder of the run's events.
        root: the run's storage.
        mirror_s: seconds between two copies.

    Raises:
        UserError: no file can be made there.
    """
    with explained(folder):
        opened = EventLog(folder, stage, next_attempt(folder, stage, root))
    with opened as events:
        if not root.startswith("s3://"):
            yield events
            return
        mirror = Mirror(folder, stage, root, mirror_s)
        try:
            yield events
        finally:
            mirror.close(FLUSH_S)


def next_attempt(folder: str, stage: str, root: str) -> int:
    """The number of a new attempt, free in ``folder`` and, where the run's storage is in S3, claimed there. Never raises."""
    number = next_local(folder, stage)
    if not root.startswith("s3://"):
        return number
    os.makedirs(folder, exist_ok=True)
    token = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        number = start(lambda: _claim_next(root, stage, number, token)).result(CLAIM_S)
    except Exception as error:  # the run can do without a copy of its events
        why = str(error) or type(error).__name__
        log.warning("%s: attempt %d of %s could not be claimed (%s); its copy waits until it can", root, number, stage, why)
    try:
        _write_note(folder, stage, number, {"token": token, "copied": 0})
    except OSError as error:  # as of a full disk, on which the run goes on
        log.warning("%s: %s; attempt %d of %s is not copied to %s", folder, error.strerror, number, stage, root)
    return number


class Mirror:
    """Copies the attempts that this host wrote, as they grow."""

    def __init__(self, folder: str, stage: str, root: str, every_s: float) -> None:
        """Start; ``folder`` has a note for each attempt of this host (see :func:`next_attempt`)."""
        self._folder, self._stage, self._root, self._every_s = folder, stage, root, every_s
        self._ended = threading.Event()
        self._failing = False
        self._lost: set[int] = set()
        self._thread = threading.Thread(target=self._run, name=f"mirror-{stage}", daemon=True)
        self._thread.start()

    def close(self, wait_s: float) -> None:
        """Copy what is left, and wait for it at most ``wait_s``."""
        self._ended.set()
        self._thread.join(wait_s)

    def _run(self) -> None:
        last = False
        while not last:
            last = self._ended.wait(self._every_s)
            try:
                for number, path in attempts(self._folder, self._stage):
                    if number not in self._lost:
                        self._copy(number, path)
                self._failing = False
            except Exception as error:  # the files stay, and are copied when it works again
                if not self._failing:
                    log.warning("%s: events of %s are not copied for now (%s)", self._root, self._stage, error)
                self._failing = True

    def _copy(self, number: int, path: str) -> None:
        note = _read_note(self._folder, self._stage, number)
        if note is None or "token" not in note or note["copied"] >= os.path.getsize(path):
            return
        if not note.get("claimed"):
            if not _claim(self._root, self._stage, number, note["token"]):
                log.warning("%s is not copied: another host made attempt %d of %s as well", path, number, self._stage)
                self._lost.add(number)
                return
            note["claimed"] = True
        with open(path, "rb") as file:
            while True:
                begin = note.get("chunk", 0)
                file.seek(begin)
                data = file.read(CHUNK_BYTES)
                full = len(data) == CHUNK_BYTES
                data += file.readline() if full else b""
                data = data[: data.rfind(b"\n") + 1]
                if begin + len(data) <= note["copied"]:
                    return
                self._copy_pictures(data[note["copied"] - begin :])
                target = join(_event_file(self._root, self._stage, number), f"{begin:012d}.jsonl")
                open_storage(target).write(target, data)
                note |= {"copied": begin + len(data), "chunk": begin + len(data) if full else begin}
                _write_note(self._folder, self._stage, number, note)

    def _copy_pictures(self, lines: bytes) -> None:
        for name in _pictures(lines):
            source = os.path.join(os.path.dirname(os.path.abspath(self._folder)), name)
            target = join(self._root, "events", "files", name)
            if os.path.exists(source):
                open_storage(target).upload(source, target)


def pull(root: str, folder: str) -> None:
    """Bring what ``folder`` lacks of the mirrored events here: missing attempts, and what the others have grown by.

    Files that this host writes itself are never touched: their copies are no longer than they are.

    Raises:
        UserError: the storage cannot be read.
    """
    os.makedirs(folder, exist_ok=True)
    chunks: dict[str, list[int]] = {}
    for name in _listed(root):
        if match := re.fullmatch(r"([A-Za-z0-9_.-]+-\d+)/(\d+)\.jsonl", name):
            chunks.setdefault(match[1], []).append(int(match[2]))
    with open(os.path.join(folder, ".pull.lock"), "w", encoding="utf-8", opener=no_follow) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in in_order(lambda name: _pull_attempt(root, folder, name, sorted(chunks[name])), list(chunks), THREADS):
            pass


def run_id(folder: str, root: str) -> str:
    """A short random name of the run, made at its first use, the same on every host that shares ``root`` or ``folder``.

    Raises:
        UserError: the storage cannot be read or written.
    """
    local = join(folder, "run.id")
    try:
        return _id_of(open_storage(local).read(local), local)
    except Missing:
        pass
    shared = join(root, "events", "run.id") if root.startswith("s3://") else local
    open_storage(shared).write(shared, f"{uuid.uuid4().hex[:8]}\n".encode(), if_absent=True)
    name = _id_of(open_storage(shared).read(shared), shared)
    open_storage(local).write(local, f"{name}\n".encode())
    return name


def _id_of(data: bytes, uri: str) -> str:
    """The name in a file; it becomes part of the names of W&B's files."""
    name = data.decode(errors="replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9]{1,64}", name):
        raise UserError(f"{uri}: {name[:80]!r} is not the name of a run. Delete the file; the run gets a new name at W&B.")
    return name


def _pull_attempt(root: str, folder: str, name: str, begins: list[int]) -> None:
    """Append what the mirror has of one attempt beyond its local file."""
    stage, _, number = name.rpartition("-")
    path = attempt_path(folder, stage, int(number))
    have, note = os.path.getsize(path) if os.path.exists(path) else 0, _read_note(folder, stage, int(number))
    if "pulled" not in (note or {}) and (have or note):
        return  # written on this host
    _write_note(folder, stage, int(number), {"pulled": True})
    for begin, end in zip(begins, [*begins[1:], None], strict=True):
        if begin > have:
            return  # what lies before is not there yet
        if end is not None and end <= have:
            continue
        chunk = join(_event_file(root, stage, int(number)), f"{begin:012d}.jsonl")
        data = open_storage(chunk).read(chunk, start=have - begin)
        for picture in _pictures(data):
            _pull_picture(root, folder, picture)
        with open(path, "ab", opener=no_follow) as file:
            file.write(data)
        have += len(data)


def _pull_picture(root: str, folder: str, name: str) -> None:
    target = os.path.join(os.path.dirname(os.path.abspath(folder)), name)
    source = join(root, "events", "files", name)
    try:
        open_storage(source).download(source, target)
    except Missing:
        log.warning("%s is not there", source)


def _pictures(lines: bytes) -> Iterator[str]:
    """Paths of pictures that events name, below the run's local folder."""
    for line in lines.splitlines():
        if any(kind.encode() in line for kind in PICTURES):
            event = parse_line(line.decode("utf-8", errors="replace"))
            yield from picture_paths(event).values() if event is not None else ()


def _listed(root: str) -> list[str]:
    """The names of all that lies below ROOT/events, relative to it."""
    folder = join(root, "events")
    return [uri[len(folder) + 1 :] for uri in open_storage(folder).list(folder)]


def _event_file(root: str, stage: str, number: int) -> str:
    return join(root, "events", f"{stage}-{number:03d}")


def _claim_next(root: str, stage: str, number: int, token: str) -> int:
    """Claim the first free attempt from ``number`` on."""
    taken = [int(match[1]) for uri in _listed(root) if (match := re.match(re.escape(stage) + r"-(\d+)/", uri))]
    number = max(number, max(taken, default=-1) + 1)
    while not _claim(root, stage, number, token):
        number += 1
    return number


def _claim(root: str, stage: str, number: int, token: str) -> bool:
    """Try to claim the attempt; return whether it is ours."""
    uri = join(_event_file(root, stage, number), "owner")
    return open_storage(uri).write(uri, token.encode(), if_absent=True) or _owner(root, stage, number) == token


def _owner(root: str, stage: str, number: int) -> str:
    uri = join(_event_file(root, stage, number), "owner")
    return open_storage(uri).read(uri).decode()


def _note_path(folder: str, stage: str, number: int) -> str:
    return os.path.join(folder, f"{stage}-{number:03d}.mirror.json")


def _read_note(folder: str, stage: str, number: int) -> JsonObject | None:
    """This host's note about an attempt's copy: its owner and its progress; None when the attempt is not to be copied."""
    try:
        with open(_note_path(folder, stage, number), encoding="utf-8") as file:
            return parse_object(file.read())
    except (OSError, ValueError):
        return None


def _write_note(folder: str, stage: str, number: int, note: JsonObject) -> None:
    with atomic_file(_note_path(folder, stage, number)) as file:
        file.write(json.dumps(note).encode())
