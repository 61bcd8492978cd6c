"""Events as the rows of a W&B run. No network, no clock: the same event files always give the same rows.

A row is one event's numbers under ``kind/field``, beside its own x-axis ``kind/step`` (``pool/done``): a checkpoint that is
reported late moves no other curve. Rows are numbered from 0, and W&B gets the number with each row; as the rows follow from the files
alone, number of rows that W&B has determines where to resume after any crash.

    attempt 0   train 10   train 20   train 30   killed
    attempt 1   start (from 20)       train 30   train 40
    rows        start 0, train 10, train 20, train 30, start 1, train 40            a replayed step is no second row
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from oar_scale.observe.alarms import Alarms, Alert
from oar_scale.observe.events import Event
from oar_scale.observe.state import Attempts

OCCURRENCES = {
    "start",
    "resumed",
    "stopping",
    "profile",
    "end",
    "non_finite",
    "bad_sample",
    "spike",
    "checkpoint_failed",
    "settings_changed",
}
"""Kinds with a step that are no measurements: each is counted, also where its step is done again."""
PICTURES = {"samples": ("image", "orders")}
"""Fields with paths of pictures, relative to the run's local folder."""
START_FIELDS = ("start_step", "world_size", "zero_stage")
"""What may differ between the attempts of a run, as curves; the rest of ``start`` is configuration."""
CONFIG_ONLY = ("time", "stage", "kind", "recipe", "non_finite")


@dataclass(frozen=True)
class WandbRow:
    """One line of a W&B run's history."""

    number: int
    time: float
    kind: str
    axis: str
    """The key of ``values`` that the curves of this kind are drawn over."""
    values: dict[str, float]
    pictures: dict[str, str] = field(default_factory=dict)
    """Key and path."""
    captions: str = ""


class RowProjection:
    """Turns events into W&B rows, as the top of this file describes.

    Attributes:
        generation: how often the stage was begun anew; each is a W&B run of its own.
        config: the last ``start`` event's recipe, and under ``start`` its other fields.
        complete: the stage has ended.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._alarms = Alarms()
        self._attempts = Attempts()
        self._clear()

    def _clear(self) -> None:
        self.rows = 0
        self.config: dict[str, object] = {}
        self.complete = False
        self._highest: dict[str, tuple[float, int]] = {}
        """Of each kind of measurement the last step there was, and the attempt that got there."""
        self._totals: Counter[str] = Counter()

    def take(self, attempt: int, event: Event) -> tuple[WandbRow | None, list[Alert]]:
        """The row that an event makes, where it makes one, and the alerts that begin with it."""
        _, anew = self._attempts.take(attempt, event)
        if anew:
            self.generation += 1
            self._clear()
            self._alarms.begin_anew()
        row, kind = self._row(attempt, event), event["kind"]
        pool_done = kind == "pool" and event["done"] == event["total"]
        self.complete = kind == "end" or pool_done or (self.complete and kind != "start")
        return row, self._alarms.take(event)

    def _row(self, attempt: int, event: Event) -> WandbRow | None:
        kind = event["kind"]
        self._totals[kind] += 1
        if kind == "start":
            attempt_metadata = {name: value for name, value in event.items() if name not in CONFIG_ONLY}
            self.config = {**event.get("recipe", {}), "start": attempt_metadata}
            values = {"start/total": float(self._totals[kind])} | _numbers(kind, {n: event[n] for n in START_FIELDS if n in event})
            return self._made(event, "total", values)
        axis = _axis(event)
        if measured(event):
            x = event[axis]
            highest, whose = self._highest.get(kind, (float("-inf"), attempt))
            if x < highest or (x == highest and attempt != whose):
                return None
            self._highest[kind] = x, attempt
            return self._made(event, axis, _numbers(kind, event))
        values = {f"{kind}/total": float(self._totals[kind])}
        if axis == "step":
            values[f"{kind}/step"] = float(event["step"])
        if kind in ("end", "resumed"):
            values[f"{kind}/seconds"] = float(event.get("seconds", 0.0))
        if kind == "resized":
            values["resized/to_workers"] = float(event["to_workers"])
        return self._made(event, axis, values)

    def _made(self, event: Event, axis: str, values: dict[str, float]) -> WandbRow:
        kind = event["kind"]
        pictures = {f"{kind}/{name}": path for name, path in picture_paths(event).items()}
        captions = "\n".join(map(str, event.get("captions", ()))) if pictures else ""
        self.rows += 1
        return WandbRow(self.rows - 1, float(event.get("time", 0.0)), kind, f"{kind}/{axis}", values, pictures, captions)


def picture_paths(event: Event) -> dict[str, str]:
    """The pictures that an event names, by its fields: paths below the run's local folder. Events may come from a bucket, so anything else
    than a picture in ``samples`` is passed over."""
    named = {name: str(event[name]) for name in PICTURES.get(event["kind"], ()) if event.get(name)}
    return {name: path for name, path in named.items() if re.fullmatch(r"samples/[A-Za-z0-9][A-Za-z0-9_.-]{0,200}\.png", path)}


def measured(event: Event) -> bool:
    """Whether the event is a point of curves over the steps; a step that is done again is no second point."""
    return _axis(event) != "total" and event["kind"] not in OCCURRENCES


def _axis(event: Event) -> str:
    """The field that the curves of an event are drawn over; ``total`` is counted here."""
    return "done" if event["kind"] == "pool" else "step" if "step" in event else "total"


def _numbers(kind: str, event: Event) -> dict[str, float]:
    """All numbers of an event; those of a list by their position, from 1; infinities and NaN are read back from their text."""
    numbers: dict[str, float] = {}
    for name, value in event.items():
        if name == "time":
            continue
        for part, each in [(name, value)] if not isinstance(value, list) else [(f"{name}/{i}", v) for i, v in enumerate(value, start=1)]:
            if isinstance(each, int | float):
                numbers[f"{kind}/{part}"] = float(each)
    for name, text in event.get("non_finite", {}).items():
        field_name, _, index = name.partition(".")
        numbers[f"{kind}/{field_name}" + (f"/{int(index) + 1}" if index.isdecimal() else "")] = float(text)
    return numbers
