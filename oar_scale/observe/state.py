"""What a stage is doing, folded from its events: the console's, Prometheus' and ``oar status``' common state.

An event changes a few fields and is forgotten, so that a run of weeks costs no more to watch than one of minutes. All
attempts count, as they happened: a fault of an attempt that was undone is still a fault.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from typing import Literal

from oar_scale.observe.alarms import TrainingSigns
from oar_scale.observe.events import Event, EventReader
from oar_scale.observe.formatting import ALERTS

StageStatus = Literal["waiting", "starting", "running", "stopping", "failed", "done"]

PROGRESS = {"start", "resumed", "train", "heldout", "checkpoint", "samples", "profile", "pool", "vq", "order_head", "end"}
"""Kinds that show that the stage moves; a report of a fault does not."""
COUNTED = {"bad_samples", "storage_retries", "skipped_batches"}
"""Fields of ``train`` events that say how many there were since the last one."""
PACE_MARKS = 50
SHOWN_ALERTS = 5


class Attempts:
    """Follows the attempts at a stage, and notices when one that was done is begun anew (``--from``).

    Attempts at a training follow one another. Pools on the same shards (the tasks of a job array, a second ``oar extract``) run
    at the same time: their events come mixed, each reports all shards it knows to be done, and none starts from the beginning.
    """

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        """Time of each attempt's first event."""
        self._rejected: set[int] = set()
        """Attempts that found a checkpoint, but a damaged one."""
        self._committed = False
        self._complete: float | None = None
        """When the stage was."""

    def take(self, attempt: int, event: Event) -> tuple[bool, bool]:
        """Whether this is the first event of an attempt, and whether it begins the stage from nothing although there was something.

        A training stage says so in ``start`` (step 0 although a checkpoint was committed and none was rejected). The others have
        neither checkpoints nor an event of their own: they are begun anew where an attempt that came after all was complete
        trains, or starts actors, which a pool does only for shards that are missing.
        """
        first = attempt not in self._first
        self._first.setdefault(attempt, float(event.get("time", 0.0)))
        kind, begins = event["kind"], False
        if kind == "start" and "start_step" in event:
            begins = event["start_step"] == 0 and attempt not in self._rejected and (self._committed or self._complete is not None)
        elif kind in ("vq", "actor_started"):
            begins = self._complete is not None and self._first[attempt] > self._complete
        if begins:
            self._committed, self._complete = False, None
        if kind == "rejected_checkpoint":
            self._rejected.add(attempt)
        self._committed |= kind == "checkpoint"
        if kind == "end" or (kind == "pool" and event["done"] == event["total"]):
            self._complete = float(event.get("time", 0.0))
        return first, begins


class StageState:
    """The state of a stage, folded from its events as the top of this file describes.

    Attributes:
        latest: the newest event of each kind, in the order in which they came.
        totals: how often each kind was seen, and the sums of the ``COUNTED`` fields.
        alerts: the last few events that call for somebody.
        rates: images/s of every ``train`` event.
        signs: how the newest one compares.
        step, steps: where it is, and where it ends (a pool's images count as steps).
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._attempts = Attempts()
        self._clear()

    def _clear(self) -> None:
        self.latest: dict[str, Event] = {}
        self.totals: Counter[str] = Counter()
        self.alerts: deque[Event] = deque(maxlen=SHOWN_ALERTS)
        self.rates: list[float] = []
        self.signs = TrainingSigns()
        self.step: int | None = None
        self.steps: int | None = None
        self.began: float | None = None
        self.progressed: float | None = None
        self.status: StageStatus = "waiting"
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_MARKS)

    def read(self, reader: EventReader) -> None:
        """Fold in all events that the reader has."""
        for entry in reader.poll():
            self.take(entry.attempt, entry.event)

    def begins(self) -> None:
        """A driver begins to work on the stage: whatever earlier attempts came to, this one waits for its workers."""
        self.status = "waiting"

    @property
    def waits(self) -> bool:
        """Whether the workers have not started, or not again: it waits for what they need."""
        return self.status in ("waiting", "failed")

    @property
    def has_said_its_end(self) -> bool:
        """Whether the last that is known of it is that its driver has ended with an error."""
        return next(reversed(self.latest), "") == "failed"

    def take(self, attempt: int, event: Event) -> bool:
        """Fold one event in; whether the stage is begun anew with it."""
        new, anew = self._attempts.take(attempt, event)
        if anew:
            self._clear()
        if new and event["kind"] in ("start", "pool", "vq"):
            self._pace.clear()
        if new and self.status == "stopping":
            self.status = "waiting"
        kind, at = event["kind"], float(event.get("time", 0.0))
        self.latest.pop(kind, None)  # so that the newest of all comes last
        self.latest[kind] = event
        self.totals[kind] += 1
        self.began = at if self.began is None else self.began
        if kind in PROGRESS:
            self.progressed = at
        if kind in ALERTS:
            self.alerts.append(event)
        self.signs.take(event)
        self._follow(kind, at, event)
        return anew

    def _follow(self, kind: str, at: float, event: Event) -> None:
        match kind:
            case "start":
                self.step, self.steps, self.status = event.get("start_step", 0), event.get("steps"), "starting"
                self._pace.clear()
                self._mark(at)
            case "train" | "vq" | "order_head":
                self.step, self.status = event["step"], "running" if self.status != "stopping" else "stopping"
                self._mark(at)
                if event.get("images_per_s"):
                    self.rates.append(event["images_per_s"])
                for name in COUNTED:
                    self.totals[name] += event.get(name) or 0
            case "pool":
                self.step = max(event["done"], self.step or 0)  # of several pools each learns late what the others have done
                self.steps, self.status = event["total"], "running" if self.step < event["total"] else "done"
                self._mark(at)
            case "stopping":
                self.status = "stopping"
            case "worker_failure" | "failed":
                self.status = "failed"
            case "end":
                self.status = "done"
                if self.steps is not None:
                    self.step = self.steps

    def _mark(self, at: float) -> None:
        assert self.step is not None
        if self._pace and self._pace[-1][1] > self.step:
            self._pace.clear()
        self._pace.append((at, self.step))

    @property
    def attempts(self) -> int:
        """How often the workers started."""
        return self.totals["start"]

    @property
    def median_images_per_s(self) -> float | None:
        """Median over the ``train`` events; None before the first one."""
        return statistics.median(self.rates) if self.rates else None

    def per_second(self) -> float | None:
        """Steps a second lately, with all that lies between them (evaluations, checkpoints)."""
        if len(self._pace) < 2:
            return None
        (start, first), (end, last) = self._pace[0], self._pace[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None while that is unknown."""
        rate = self.per_second()
        return None if rate is None or self.steps is None or self.step is None else max(0.0, (self.steps - self.step) / rate)

    def value(self, kind: str, field: str) -> float | None:
        """A number of the newest event of a kind; None when there is none, or it was not finite."""
        value = self.latest.get(kind, {}).get(field)
        return float(value) if isinstance(value, int | float) else None
