"""The event stream: what happened in a run, one JSON object a line, one file an attempt.

    events/pretrain-000.jsonl      first attempt, ended by a kill at step 80
    events/pretrain-001.jsonl      second attempt, went on from the checkpoint of step 50

Every line is ``{"time": unix seconds, "stage": ..., "kind": ..., ...}``. The console, W&B and the report are views of
these files and hold nothing of their own. A line is written whole and flushed at once, so a killed process loses at most
the line it was writing; :func:`read_events` ignores such a torn end.

A number JSON cannot hold is written as null and named beside it: ``{"loss": null, "non_finite": {"loss": "nan"}}``.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, Self

from oar_scale.errors import UserError

Event = dict[str, Any]

_RESERVED = ("time", "stage", "non_finite")


class EventLog:
    """Appends the events of one attempt at a stage to a new file in ``folder``. Safe to use from several threads."""

    def __init__(self, folder: str, stage: str) -> None:
        """Open the next free attempt file.

        Args:
            folder: local folder of the run's events; made when absent.
            stage: letters, digits, ``_``, ``.`` and ``-``.

        Raises:
            ValueError: ``stage`` cannot be a file name.
        """
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", stage):
            raise ValueError(f"stage {stage!r} cannot be part of a file name")
        os.makedirs(folder, exist_ok=True)
        self.stage = stage
        self._lock = threading.Lock()
        attempt = max((number for number, _ in attempts(folder, stage)), default=-1) + 1
        while True:
            self.path = os.path.join(folder, f"{stage}-{attempt:03d}.jsonl")
            try:
                # "x": two processes that start at once get two files.
                self._file = open(self.path, "x", encoding="utf-8")  # noqa: SIM115 (closed by close())
                break
            except FileExistsError:
                attempt += 1

    def emit(self, kind: str, **fields: Any) -> None:
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
        event: Event = {"time": round(time.time(), 3), "stage": self.stage, "kind": kind, **plain}
        if non_finite:
            event["non_finite"] = non_finite
        line = json.dumps(event, allow_nan=False) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def attempts(folder: str, stage: str) -> list[tuple[int, str]]:
    """The attempt files of a stage, oldest first, as (number, path); empty when there is no such folder."""
    if not os.path.isdir(folder):
        return []
    pattern = re.compile(re.escape(stage) + r"-(\d+)\.jsonl")
    found = [(int(match[1]), os.path.join(folder, name)) for name in os.listdir(folder) if (match := pattern.fullmatch(name))]
    return sorted(found)


def read_events(folder: str, stage: str) -> list[Event]:
    """The history of a stage as it counts: all attempts in order, each replayed step once.

    An attempt that starts at step s makes everything the attempts before it did after s undone, so their events with a
    later ``step`` are left out; where the same kind and step still occur twice, the last one counts.

    Args:
        folder: local folder of the run's events.
        stage: name of the stage; an unknown one has no events.

    Raises:
        UserError: a line that is not JSON, other than the last one of a file.
    """
    history: list[Event] = []
    for _, path in attempts(folder, stage):
        events = _read_file(path)
        resumed_at = _resumed_at(events)
        if resumed_at is not None:
            repeated = {(event["kind"], event["step"]) for event in events if "step" in event}
            history = [e for e in history if "step" not in e or (e["step"] <= resumed_at and (e["kind"], e["step"]) not in repeated)]
        history += events
    return history


def parse_line(line: str) -> Event | None:
    """One event, or None when the line is not one (a line still being written, or torn by a kill)."""
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None


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
    """The step an attempt goes on from; None while it has neither started nor reached a step."""
    for event in events:
        if event["kind"] == "start" and "start_step" in event:
            return int(event["start_step"])
    return min((int(event["step"]) for event in events if "step" in event), default=None)


def _plain(value: Any, name: str, non_finite: dict[str, str]) -> Any:
    """``value`` as JSON; numbers that are not finite become None and are noted under their ``name``."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # NumPy and torch scalars
        value = value.item()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        non_finite[name] = str(value)
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{name}.{key}", non_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{index}", non_finite) for index, item in enumerate(value)]
    return value
