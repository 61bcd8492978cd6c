"""What calls for somebody, folded from a stage's events: the alerts of W&B and of ``observe.notify``.

Some events are alerts by themselves (``spike``, ``failed``, ...). Others say so together: five ``train`` events in a row that wait for
data. Either way an episode is one alert, however many events it has. The alerts follow from the events alone, so that whoever reads
the same files counts the same alerts; only silence (:class:`Silence`) is measured with a clock.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oar_scale.observe.events import Event
from oar_scale.observe.formatting import ALERTS, duration, message

if TYPE_CHECKING:
    from oar_scale.config.run_sections import AlertKind

IN_A_ROW = 5
"""So many ``train`` events in a row begin an episode; as many of the other kind end it."""
SLOW = 0.8
"""Share of the stage's own median speed below which it is slow."""
HISTORY = 20
"""``train`` events before there is such a median."""
DATA_WAIT = 0.1
"""Share of a step that may wait for data."""
STRAGGLES = 1.25
"""The slowest rank's own time over the median rank's above which it is a straggler."""
STARTS, STARTS_S = 3, 3600.0
"""Starts of the workers within so many seconds that are no alert yet."""
FLOOD_S = 600.0
"""An event of the same kind within this time of an alert belongs to its episode."""
ALERT_AGE_S = 3600.0
"""Older faults are history: they may come late, with the events of another host, and call for nobody any more."""
EVENT_ALERTS: tuple[AlertKind, ...] = ("failed", "worker_failure", "non_finite", "spike", "checkpoint_failed", "rejected_checkpoint")
MILD: tuple[AlertKind, ...] = ("spike", "rejected_checkpoint", "slow", "data_wait", "straggler", "pending")
"""Alerts that can wait until the morning."""


@dataclass(frozen=True)
class Alert:
    """Something that somebody should know of at once."""

    number: int
    """From 0, in the order of the events."""
    time: float
    kind: AlertKind
    text: str
    step: int | None = None


class TrainingSigns:
    """How a training's newest ``train`` event compares.

    Attributes:
        speed: images/s of a worker over the median of all events before, as an MFU is; None while there are too few.
        data_wait: share of a step that waits for data.
        straggling: the slowest rank's own time over the median rank's.
        slowest: that rank and its host.
    """

    def __init__(self) -> None:
        self.speed: float | None = None
        self.data_wait: float | None = None
        self.straggling: float | None = None
        self.slowest: tuple[int, str] | None = None
        self._workers = 1
        self._rates: list[float] = []

    def take(self, event: Event) -> None:
        """Fold an event in."""
        if event["kind"] == "start":
            self._workers = event.get("world_size") or 1
        if event["kind"] != "train":
            return
        self.speed = self._compared(event.get("images_per_s"))
        step_s, wait_s = event.get("step_s"), event.get("data_wait_s")
        self.data_wait = wait_s / step_s if step_s and wait_s is not None else None
        most, median, rank = (event.get(name) for name in ("slowest_rank_s", "median_rank_s", "slowest_rank"))
        self.straggling = most / median if most and median else None
        self.slowest = None if rank is None else (int(rank), str(event.get("slowest_host")))

    def _compared(self, images_per_s: float | None) -> float | None:
        if not images_per_s:
            return None
        rate, earlier = images_per_s / self._workers, len(self._rates)
        median = (self._rates[(earlier - 1) // 2] + self._rates[earlier // 2]) / 2 if earlier >= HISTORY else None
        bisect.insort(self._rates, rate)
        return rate / median if median else None


class _Episode:
    """Begins with some bad values in a row, and ends with as many good ones."""

    def __init__(self) -> None:
        self._open, self._other = False, 0

    def begins(self, bad: bool) -> bool:
        """Take one more value; whether the episode begins with it."""
        self._other = self._other + 1 if bad != self._open else 0
        if self._other < IN_A_ROW:
            return False
        self._open, self._other = bad, 0
        return bad


class Alarms:
    """Turns the events of a stage into alerts, as the top of this file describes."""

    def __init__(self) -> None:
        self.count = 0
        self._latest: dict[str, float] = {}
        """When the last event of each kind came that is an alert by itself."""
        self._starts: deque[float] = deque()
        self._many_starts = False
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what the training did so far: its stage is done again from nothing."""
        self._signs = TrainingSigns()
        self._slowest: tuple[int, str] | None = None
        self._episodes: dict[AlertKind, _Episode] = {kind: _Episode() for kind in ("slow", "data_wait", "straggler")}

    def take(self, event: Event) -> list[Alert]:
        """The alerts that begin with an event."""
        kind, at = event["kind"], float(event.get("time", 0.0))
        self._signs.take(event)
        begun: list[tuple[AlertKind, str]] = []
        if kind in EVENT_ALERTS:
            before = self._latest.get(kind)
            self._latest[kind] = at
            if kind == "failed" or before is None or at - before > FLOOD_S:
                begun.append((kind, message(event) or kind))
        elif kind == "start":
            begun += self._started(at)
        elif kind == "train":
            begun += self._training()
        alerts = [Alert(self.count + n, at, each, text, event.get("step")) for n, (each, text) in enumerate(begun)]
        self.count += len(alerts)
        return alerts

    def _started(self, at: float) -> list[tuple[AlertKind, str]]:
        self._starts.append(at)
        while at - self._starts[0] > STARTS_S:
            self._starts.popleft()
        before, self._many_starts = self._many_starts, len(self._starts) > STARTS
        text = f"the workers were started {len(self._starts)} times within {duration(STARTS_S)}"
        return [("restarts", text)] if self._many_starts and not before else []

    def _training(self) -> list[tuple[AlertKind, str]]:
        signs, same = self._signs, self._slowest == self._signs.slowest
        self._slowest = signs.slowest
        speed, wait, straggling = signs.speed or 1.0, signs.data_wait or 0.0, signs.straggling or 1.0
        rank, host = signs.slowest or (0, "")
        found: list[tuple[AlertKind, bool, str]] = [
            ("slow", speed < SLOW, f"a worker's images/s, and its MFU, are at {speed:.0%} of the stage's median so far"),
            ("data_wait", wait > DATA_WAIT, f"{wait:.0%} of a step waits for data"),
            (
                "straggler",
                straggling > STRAGGLES and same,
                f"rank {rank} on {host} takes {straggling:.2f} times as long as the median rank",
            ),
        ]
        return [(kind, text) for kind, bad, text in found if self._episodes[kind].begins(bad)]


class Silence:
    """Notices that a stage shows no progress: once, until it moves again."""

    def __init__(self, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s, self._clock = stall_s, clock
        self.progress()

    def progress(self) -> None:
        """The stage has moved."""
        self._since, self._noticed = self._clock(), False

    def noticed(self, *, waiting: bool) -> tuple[AlertKind, str] | None:
        """The alert that is due now; ``waiting``: the workers have not started, so that it waits for what they need."""
        silent = self._clock() - self._since
        if self._noticed or silent < self._stall_s:
            return None
        self._noticed = True
        if waiting:
            return "pending", f"it has waited for its workers to start for {duration(silent)}: are there free nodes, GPUs, CPUs?"
        return "stall", f"no progress for {duration(silent)}"


def title(kind: AlertKind, run: str, stage: str) -> str:
    """The head line of an alert, at most 63 characters."""
    return f"{ALERTS[kind]}: {run} {stage}"[:63]
