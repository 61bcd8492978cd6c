"""The event stream: what happened in a run, one JSON object a line, one file an attempt.

    events/pretrain-000.jsonl      first attempt, ended by a kill at step 80
    events/pretrain-001.jsonl      written by the driver in between: that workers had died
    events/pretrain-002.jsonl      second attempt, resumed from the checkpoint of step 50

Every line is ``{"time": unix seconds, "stage": ..., "kind": ..., ...}``. The console, W&B, Prometheus, ``oar status`` and the
report are views of these files and hold nothing of their own. A line is written whole and flushed at once, so a killed
process loses at most the line it was writing; readers ignore such a torn end. :class:`EventReader` hands out what was
appended since the last poll; :func:`read_events` is the history as it counts, without what a restart has undone.

A number JSON cannot hold is written as null and named beside it: ``{"loss": null, "non_finite": {"loss": "nan"}}``.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from oar_scale.errors import UserError
from oar_scale.json_object import parse_object
from oar_scale.redaction import redact
from oar_scale.storage.local import make_folder

log = logging.getLogger(__name__)

Event = dict[str, Any]

COUNTS = {
    *("time", "step", "start_step", "steps", "done", "total", "world_size", "from_workers", "to_workers", "parameters"),
    *("seconds", "wait_s", "upload_s", "bytes", "memory_mb", "disk_free_gb", "bad_samples", "storage_retries", "skipped_batches"),
}
"""Fields that are numbers, always."""
MEASURED = {
    *("loss", "expected", "nll_random", "lr", "grad_norm", "images_per_s", "tokens_per_s", "mfu", "step_s", "data_wait_s", "busy_s"),
    *("slowest_rank_s", "median_rank_s"),
}
"""Fields that are numbers, or null where one was not finite or is not known; so are all that begin with ``nll_``."""
NEEDED = {
    **dict.fromkeys(("train", "heldout", "checkpoint", "vq", "order_head"), ("step",)),
    "pool": ("done", "total"),
    "resized": ("to_workers",),
}
"""Fields without which an event of that kind says nothing."""
OTHERS: dict[str, type] = {
    "stage": str,
    **dict.fromkeys(("uids", "notices"), list),
    **dict.fromkeys(("non_finite", "changes", "recipe", "versions"), dict),
}
"""Fields of other types."""
LARGEST = 1e18
"""A number beyond this is no count or size of ours."""
LAST_TIME = 250e9
"""Unix seconds, beyond which there is no date."""
_RESERVED = ("time", "stage", "non_finite")
_HELD_BYTES = 16 << 20
"""What a log keeps in memory while the disk takes nothing; events beyond it are lost, and counted in a warning."""


class EventLog:
    """Appends the events of one attempt at a stage to a new file in ``folder``. Safe to use from several threads.

    A disk that is full does not end the run: the lines are kept in memory and written with the next event that can be.
    """

    def __init__(self, folder: str, stage: str, attempt: int | None = None) -> None:
        """Open a new attempt file.

        Args:
            folder: local folder of the run's events; made when absent.
            stage: letters, digits, ``_``, ``.`` and ``-``.
            attempt: its number, or the first free one after it (:func:`oar_scale.observe.mirror.next_attempt` returns the number
                where attempts are made on several hosts). Default: the next of this folder.

        Raises:
            ValueError: ``stage`` cannot be a file name.
        """
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", stage):
            raise ValueError(f"stage {stage!r} cannot be part of a file name")
        make_folder(folder)
        self.stage = stage
        self.attempt = next_local(folder, stage) if attempt is None else attempt
        self._lock = threading.Lock()
        self._held = bytearray()
        self._lost = 0
        while True:
            self.path = attempt_path(folder, stage, self.attempt)
            try:
                # O_EXCL: two processes that start at once get two files.
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
                break
            except FileExistsError:
                self.attempt += 1

    def emit(self, kind: str, **fields: object) -> None:
        """Append one event.

        Args:
            kind: what happened, e.g. ``train``.
            fields: JSON values, NumPy or torch scalars; ``time``, ``stage`` and ``non_finite`` are taken.

        Raises:
            ValueError: a reserved field name.
            TypeError: a value that is not JSON.
        """
        taken = [name for name in _RESERVED if name in fields]
        if taken:
            raise ValueError(f"event fields {taken} are written by the log itself")
        non_finite: dict[str, str] = {}
        plain = {name: _plain(value, name, non_finite) for name, value in fields.items()}
        event: Event = {"time": round(time.time(), 6), "stage": self.stage, "kind": kind, **plain}
        if non_finite:
            event["non_finite"] = non_finite
        line = (json.dumps(event, allow_nan=False) + "\n").encode()
        with self._lock:
            if self._file < 0:
                raise ValueError(f"{self.path}: event {kind!r} after the log was closed")
            self._append(line)

    def close(self) -> None:
        """Write what is held, if the disk takes it, and close the file. May be called again."""
        with self._lock:
            if self._file >= 0:
                self._append(b"")
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        """Write what is held and then ``line``; whatever the disk does not take is held."""
        fits = len(self._held) + len(line) <= _HELD_BYTES
        self._lost += not fits
        waiting = bool(self._held)
        self._held += line if fits else b""
        try:
            while self._held:
                del self._held[: os.write(self._file, self._held)]  # the rest of a line that was cut off is written first
        except OSError as error:
            if not waiting:
                log.warning("%s: %s; events are kept in memory until it can be written again", self.path, error.strerror)
            return
        if self._lost:
            log.warning("%s: %d events were lost while it could not be written", self.path, self._lost)
            self._lost = 0


class EventEntry(NamedTuple):
    """An event and its position in the event files."""

    file: str
    """Name of its file without ``.jsonl``."""
    attempt: int
    event: Event
    end: int
    """Size of the file up to the end of this line."""


class EventReader:
    """Reads what was appended to a stage's attempt files since the last poll. It reads nothing twice, and only whole lines.

    Where several files grew, their events come in the order of their times.
    """

    def __init__(self, folder: str, stage: str, *, from_now: bool = False) -> None:
        """``from_now``: leave out what is there already."""
        self.folder, self.stage = folder, stage
        self.ends: dict[str, int] = {}
        """Bytes read of each file, by its name without ``.jsonl``."""
        if from_now:
            self.ends = {file: os.path.getsize(self._path(file)) for file in self._files()}

    def poll(self) -> Iterator[EventEntry]:
        """The new events; an entry counts as read when it has been handed out."""
        grown = [file for file in self._files() if _size(self._path(file)) > self.ends.get(file, 0)]
        for entry in heapq.merge(*map(self.lines, grown), key=lambda entry: float(entry.event.get("time", 0.0))):
            self.ends[entry.file] = entry.end
            yield entry

    def lines(self, file: str, stop: int | None = None) -> Iterator[EventEntry]:
        """The whole lines of one file from where it was read to, at most up to byte ``stop``; they do not count as read."""
        end, number = self.ends.get(file, 0), int(file.rpartition("-")[2])
        try:
            opened = open(self._path(file), "rb")  # noqa: SIM115 (closed by the with below)
        except FileNotFoundError:
            return  # somebody cleans up
        with opened as lines:
            lines.seek(end)
            for line in lines:
                end += len(line)
                if not line.endswith(b"\n") or (stop is not None and end > stop):
                    return
                event = parse_line(line.decode("utf-8", errors="replace"))
                if event is not None:
                    yield EventEntry(file, number, event, end)

    def _files(self) -> list[str]:
        return [os.path.basename(path).removesuffix(".jsonl") for _, path in attempts(self.folder, self.stage)]

    def _path(self, file: str) -> str:
        return os.path.join(self.folder, f"{file}.jsonl")


def attempts(folder: str, stage: str) -> list[tuple[int, str]]:
    """The attempt files of a stage, oldest first, as (number, path); empty when there is no such folder."""
    if not os.path.isdir(folder):
        return []
    pattern = re.compile(re.escape(stage) + r"-(\d+)\.jsonl")
    numbered = [(int(match[1]), os.path.join(folder, name)) for name in os.listdir(folder) if (match := pattern.fullmatch(name))]
    return sorted(numbered)


def attempt_path(folder: str, stage: str, attempt: int) -> str:
    """The file of one attempt."""
    return os.path.join(folder, f"{stage}-{attempt:03d}.jsonl")


def next_local(folder: str, stage: str) -> int:
    """The number after the last attempt in this folder."""
    return max((number for number, _ in attempts(folder, stage)), default=-1) + 1


def stages_with_events(folder: str) -> list[str]:
    """The stages that have event files, by name."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted({match[1] for name in names if (match := re.fullmatch(r"([A-Za-z0-9_.-]+)-\d+\.jsonl", name))})


def read_events(folder: str, stage: str) -> list[Event]:
    """The history of a stage as it counts: all attempts in order, each replayed step once.

    An attempt that starts at step s makes everything the attempts before it did after s undone, so their events with a
    later ``step`` are skipped; where the same kind and step still occur twice, the last one counts.

    Args:
        folder: local folder of the run's events.
        stage: name of the stage; an unknown one has no events.

    Raises:
        UserError: a line that is not JSON, other than the last one of a file.
    """
    kept: list[list[Event]] = []
    limit, repeated = math.inf, set[tuple[str, int]]()
    for _, path in reversed(attempts(folder, stage)):
        events = _read_file(path)
        counts = [e for e in events if "step" not in e or (e["step"] <= limit and (e["kind"], e["step"]) not in repeated)]
        kept.append(counts)
        resumed_at = _resumed_at(events)
        if resumed_at is not None:
            limit = min(limit, resumed_at)
            repeated |= {(event["kind"], event["step"]) for event in counts if "step" in event}
    return [event for events in reversed(kept) for event in events]


def resumed_attempts(folder: str, stage: str, before: float) -> tuple[int, float]:
    """How many attempts at a training had ended at a time ``before``, and how long they took together.

    Counted are those that the training goes on from, back to the one that began at step 0: what lies before that was begun anew.

    Args:
        before: unix seconds.

    Returns:
        Their number, and the sum of the seconds from the first to the last event of each.

    Raises:
        UserError: as :func:`read_events`.
    """
    count, seconds = 0, 0.0
    for _, path in reversed(attempts(folder, stage)):
        events = _read_file(path)
        if events and events[-1]["time"] < before:
            count += any(event["kind"] == "start" for event in events)
            seconds += max(0.0, events[-1]["time"] - events[0]["time"])
        if _resumed_at(events) == 0:
            break
    return count, seconds


def parse_line(line: str) -> Event | None:
    """One event, or None when the line is not one (a line still being written, or torn by a kill).

    Whoever may write into a run's folder may write any line there: fields of another type than ours are left out.
    """
    try:
        event = parse_object(line)
    except ValueError:
        return None
    if not isinstance(event.get("kind"), str):
        return None
    numbers = (name for name in event if name in COUNTS or _is_measured(name))
    wrong = {name for name in numbers if not _is_number(name, event[name])}
    wrong |= {name for name, kind in OTHERS.items() if name in event and not isinstance(event[name], kind)}
    if "changes" in event.keys() - wrong and not all(isinstance(each, dict) for each in event["changes"].values()):
        wrong.add("changes")
    sound: Event = {"time": 0.0, **{name: value for name, value in event.items() if name not in wrong}}
    return sound if all(name in sound for name in NEEDED.get(sound["kind"], ())) else None


def _is_measured(name: str) -> bool:
    return name in MEASURED or name.startswith("nll_")


def _is_number(name: str, value: object) -> bool:
    if value is None:
        return _is_measured(name)
    return isinstance(value, int | float) and abs(value) < (LAST_TIME if name == "time" else LARGEST)


def _read_file(path: str) -> list[Event]:
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        event = parse_line(line)
        if event is not None:
            events.append(event)
        elif number < len(lines):  # whole lines end in a newline; what follows the last newline may be torn
            raise UserError(
                f"{path}:{number}  is not an event: {line[:60]!r}\n"
                "The file was changed after it was written. Remove the line; the curves lose one point."
            )
    return events


def _resumed_at(events: list[Event]) -> int | None:
    """The step an attempt resumes from; None before it has started or completed a step."""
    for event in events:
        if event["kind"] == "start" and "start_step" in event:
            return int(event["start_step"])
    return min((int(event["step"]) for event in events if "step" in event), default=None)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


def _plain(value: Any, name: str, non_finite: dict[str, str]) -> Any:
    """``value`` as JSON; numbers that are not finite become None and are noted under their ``name``."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # NumPy and torch scalars
        value = value.item()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, float) and not math.isfinite(value):
        non_finite[name] = str(value)
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{name}.{key}", non_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{index}", non_finite) for index, item in enumerate(value)]
    return value
