"""What a stage is doing, folded from its events: the console's, Prometheus' and ``oar status``' common memory.

An event changes a few fields and is forgotten, so that a run of weeks costs no more to watch than one of minutes. All
attempts count, as they happened: a fault of an attempt that was undone is still a fault.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from typing import Literal

from oar_scale.observe.events import Event, EventReader
from oar_scale.observe.words import ALERTS

Doing = Literal["waiting", "starting", "running", "stopping", "failed", "done"]

PROGRESS = {"start", "resumed", "train", "heldout", "checkpoint", "samples", "profile", "pool", "vq", "order_head", "end"}
"""Kinds that show that the stage moves; a report of a fault does not."""
COUNTED = {"bad_samples", "storage_retries", "skipped_batches"}
"""Fields of ``train`` events that say how many there were since the last one."""
PACE_MARKS = 50
SHOWN_ALERTS = 5


class Attempts:
    """Follows which attempt an event belongs to, and notices when a stage that was done is begun anew (``--from``)."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._something_kept = self._rejected = self._began = False

    def new(self, attempt: int) -> bool:
        """Whether this is the first event of another attempt. Call it for each event, before :meth:`anew`."""
        changed = attempt != self.number
        if changed:
            self.number, self._rejected, self._began = attempt, False, False
        return changed

    def anew(self, event: Event) -> bool:
        """Whether this event begins the stage from nothing although an earlier attempt had left something to go on from.

        A training stage says so in ``start`` (step 0 although a checkpoint was committed and none was rejected); the others
        have neither checkpoints nor an event of their own, and are begun anew after they were complete.
        """
        kind, begins = event["kind"], False
        if kind == "start" and "start_step" in event:
            begins = event["start_step"] == 0 and self._something_kept and not self._rejected
        elif kind in ("pool", "vq") and not self._began:
            begins = self._something_kept
        if kind in ("start", "pool", "vq"):
            self._began = True
            self._something_kept &= not begins
        self._rejected |= kind == "rejected_checkpoint"
        self._something_kept |= kind in ("checkpoint", "end") or (kind == "pool" and event.get("done") == event.get("total"))
        return begins


class StageState:
    """See the top of this file.

    Attributes:
        latest: the newest event of each kind.
        totals: how often each kind was seen, and the sums of the ``COUNTED`` fields.
        alerts: the last few events that call for somebody.
        rates: images/s of every ``train`` event.
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
        self.step: int | None = None
        self.steps: int | None = None
        self.began: float | None = None
        self.progressed: float | None = None
        self.doing: Doing = "waiting"
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_MARKS)

    def read(self, reader: EventReader) -> None:
        """Take all that the reader has."""
        for entry in reader.poll():
            self.take(entry.attempt, entry.event)

    def take(self, attempt: int, event: Event) -> None:
        """Fold one event in."""
        new = self._attempts.new(attempt)
        if self._attempts.anew(event):
            self._clear()
        if new and event["kind"] in ("start", "pool", "vq"):
            self._pace.clear()
        kind, at = event["kind"], float(event.get("time", 0.0))
        self.latest[kind] = event
        self.totals[kind] += 1
        self.began = at if self.began is None else self.began
        if kind in PROGRESS:
            self.progressed = at
        if kind in ALERTS:
            self.alerts.append(event)
        self._follow(kind, at, event)

    def _follow(self, kind: str, at: float, event: Event) -> None:
        match kind:
            case "start":
                self.step, self.steps, self.doing = event.get("start_step", 0), event.get("steps"), "starting"
                self._pace.clear()
                self._mark(at)
            case "train" | "vq" | "order_head":
                self.step, self.doing = event["step"], "running" if self.doing != "stopping" else "stopping"
                self._mark(at)
                if event.get("images_per_s"):
                    self.rates.append(event["images_per_s"])
                for name in COUNTED:
                    self.totals[name] += event.get(name) or 0
            case "pool":
                self.step, self.steps, self.doing = event["done"], event["total"], "running"
                self._mark(at)
                if self.step == self.steps:
                    self.doing = "done"
            case "stopping" | "worker_failure" | "end":
                self.doing = {"stopping": "stopping", "worker_failure": "failed", "end": "done"}[kind]  # type: ignore[assignment]
                if kind == "end" and self.steps is not None:
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
        return statistics.median(self.rates) if self.rates else None

    def per_second(self) -> float | None:
        """Steps a second lately, with all that lies between them (evaluations, checkpoints)."""
        if len(self._pace) < 2:
            return None
        (start, first), (end, last) = self._pace[0], self._pace[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    def seconds_left(self) -> float | None:
        """None while it is not known."""
        rate = self.per_second()
        return None if rate is None or self.steps is None or self.step is None else max(0.0, (self.steps - self.step) / rate)

    def value(self, kind: str, field: str) -> float | None:
        """A number of the newest event of a kind; None when there is none, or it was not finite."""
        found = self.latest.get(kind, {}).get(field)
        return float(found) if isinstance(found, int | float) else None
