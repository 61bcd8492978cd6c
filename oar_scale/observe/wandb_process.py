"""The process beside a stage that keeps its W&B run up to date: ``python -m oar_scale.observe.wandb_process``.

It reads the same event files as everybody, in its own time. A server that hangs, a client library that stalls at exit, a
crash in here: nothing of that reaches the process that trains, which at the end waits a bounded time and then ends this
one. It outlives a driver that is killed by just as much as it takes to send what was written.

Where to resume after any crash follows from three properties. Rows are numbered, and follow from the events alone (see
:mod:`oar_scale.observe.projection`). A server returns how many rows it has; a run kept offline is written from row 0 again.
And the order in which events of several files were read is written down before any row of them is sent.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

import psutil

from oar_scale.config.run_sections import AlertKind
from oar_scale.config.schema import Recipe
from oar_scale.observe.alarms import ALERT_AGE_S, MILD, Alert, Silence, title
from oar_scale.observe.events import EventEntry, EventReader
from oar_scale.observe.mirror import run_id
from oar_scale.observe.notify import Hook
from oar_scale.observe.projection import RowProjection
from oar_scale.observe.state import PROGRESS, StageState
from oar_scale.observe.wandb_lock import SenderLock, kill_descendants
from oar_scale.observe.wandb_run import AlertLevel, Mode, NotConfirmed, WandbName, WandbRun, reachable_mode, start_over, wanted_mode
from oar_scale.storage.local import atomic_file

POLL_S = 2.0
RETRY_S = 300.0
"""Between two tries to reach a server that did not answer."""
GRACE_S = 20.0
"""What the process may take beyond ``finish_s`` after its driver has ended."""
BATCH = 1000
LOST = "the driver was killed, by hand or for want of memory, while the stage was {}"
REPLAY = "tools/wandb_replay.py"


@dataclass(frozen=True)
class WandbSpec:
    """The settings of the process: JSON on the first line of its standard input."""

    events: str
    """Folder of the run's event files; the run's local folder is the one around it."""
    stage: str
    recipe_name: str
    root: str
    """The run's storage: hosts that share it share the W&B run."""
    mode: Mode
    project: str
    tags: tuple[str, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    """The resolved recipe, for stages whose events do not hold it."""
    artifact: str | None = None
    """The exported model, to be logged when the stage has ended."""
    stall_s: float | None = None
    finish_s: float = 8.0
    driver: int = field(default_factory=os.getpid)
    """Process id of the driver, which is where this is made; the process ends by itself soon after it."""
    before: Mapping[str, int] = field(default_factory=dict)
    """How much there was of each event file when the driver began: what earlier drivers came to."""

    def wandb_name(self, generation: int) -> WandbName:
        """The names at W&B of a generation of the stage (see :class:`oar_scale.observe.projection.RowProjection`)."""
        run, again = run_id(self.events, self.root), f"-{generation + 1}" if generation else ""
        group, name = f"{self.recipe_name}-{run}", f"{self.recipe_name}-{self.stage}{again}"
        return WandbName(self.project, group, name, self.stage, f"{run}-{self.stage}{again}", tuple(self.tags))


@dataclass
class SenderState:
    """State for the next sender, in ``STAGE.wandb.json`` beside the events."""

    journal: list[tuple[str, int]] = field(default_factory=list)
    """Files and how far each was read, in that order."""
    alerts: int = 0
    """Alerts that were sent, or are too old to be."""
    generations: int = 0
    """W&B runs of this stage that are closed: it was begun anew since."""
    delivered: dict[str, int] = field(default_factory=dict)
    """How far each file was read when W&B last had everything."""

    @classmethod
    def load(cls, path: str) -> SenderState:
        """The saved state; a fresh state if that cannot be read."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls(**json.load(file))
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, path: str) -> None:
        """Write it to ``path``, whole or not at all."""
        with atomic_file(path) as file:
            file.write(json.dumps(asdict(self)).encode())

    def note(self, entries: list[EventEntry]) -> None:
        """Write down that these were read next."""
        for entry in entries:
            if self.journal and self.journal[-1][0] == entry.file:
                self.journal.pop()
            self.journal.append((entry.file, entry.end))


def state_path(events: str, stage: str) -> str:
    """The file of a stage's :class:`SenderState`."""
    return os.path.join(events, f"{stage}.wandb.json")


def is_delivered(events: str, stage: str) -> bool:
    """Whether W&B has all that is written."""
    reader = EventReader(events, stage)
    reader.ends = SenderState.load(state_path(events, stage)).delivered
    return next(reader.poll(), None) is None


class StageSender:
    """Walks through a stage's events once, from the first to the end of the stage, into its W&B run(s)."""

    def __init__(self, spec: WandbSpec, mode: Mode) -> None:
        self.spec, self.mode = spec, mode
        self._path = state_path(spec.events, spec.stage)
        self._state = SenderState.load(self._path)
        self._reader = EventReader(spec.events, spec.stage)
        self._projection = RowProjection()
        self._run: WandbRun | None = None
        self._config: Mapping[str, object] = spec.config
        self._stage, self._own = StageState(spec.stage), StageState(spec.stage)
        self._silence = None if spec.stall_s is None else Silence(spec.stall_s)

    def follow(self, ended: threading.Event, interrupted: Callable[[], bool], lost: Callable[[], bool] = lambda: False) -> bool:
        """Send what is there and what comes, until ``ended`` is set and all is read (True), or it is ``interrupted`` (False).

        Args:
            lost: whether the driver has ended without a word, as one that is killed does.

        Raises:
            NotConfirmed: W&B takes too long to confirm that it has everything.
            Exception: whatever else fails in W&B's client.
        """
        for entry in self._as_before():
            self._take(entry)
        self._stage.begins()
        while True:
            last = ended.is_set()
            while batch := list(itertools.islice(self._reader.poll(), BATCH)):
                self._state.note(batch)
                self._save()  # before the first row of it is sent
                for entry in batch:
                    self._take(entry)
            if last or interrupted():
                break
            self._watch_for_silence()
            ended.wait(POLL_S)
        if lost() and (text := _lost(self._own)):
            self._send_alert("driver_lost", text)
        if self._run is not None and self._projection.complete and self.spec.artifact and self._reader.ends != self._state.delivered:
            self._run.add_model(self.spec.artifact, {"stage": self.spec.stage, "recipe": self.spec.recipe_name})
        self._close(self._projection.complete)
        if self.mode == self.spec.mode:
            self._state.delivered = dict(self._reader.ends)
            self._save()
        return last

    def _as_before(self) -> Iterator[EventEntry]:
        """The events that earlier processes read, in their order."""
        for file, end in self._state.journal:
            yield from self._reader.lines(file, stop=end)
            self._reader.ends[file] = end

    def _take(self, entry: EventEntry) -> None:
        self._stage.take(entry.attempt, entry.event)
        _take_own(self._own, entry, self.spec)
        if self._silence and entry.event["kind"] in PROGRESS:
            self._silence.progress()
        before, complete = self._projection.generation, self._projection.complete
        row, alerts = self._projection.take(entry.attempt, entry.event)
        if self._projection.generation != before:
            self._close(complete)
            self._state.generations = max(self._state.generations, self._projection.generation)
        if self._projection.generation < self._state.generations:
            return  # closed by an earlier process
        if entry.event["kind"] == "start":
            self._config = {**self.spec.config, **self._projection.config}
            if self._run is not None:
                self._run.configure(self._config)
        if row is not None:
            self._opened().log(row)
        for alert in alerts:
            self._alert(alert)

    def _opened(self) -> WandbRun:
        if self._run is None:
            name = self.spec.wandb_name(self._projection.generation)
            folder = os.path.dirname(os.path.abspath(self.spec.events))
            self._run = WandbRun(folder, name, self.mode, self._config, self.spec.finish_s)
            if self._run.url:
                say("info", f"W&B: {self._run.url}")
        return self._run

    def _alert(self, alert: Alert) -> None:
        """Send an alert, unless it was sent. A run offline is written anew and has them all; an absent server waits for its own."""
        sent = self.mode == "online" and alert.number < self._state.alerts
        if sent or self.mode != self.spec.mode:
            return
        if time.time() - alert.time < ALERT_AGE_S:
            self._send_alert(alert.kind, alert.text)
        self._state.alerts = max(self._state.alerts, alert.number + 1)
        self._save()

    def _watch_for_silence(self) -> None:
        due = self._silence.noticed(waiting=self._stage.waits) if self._silence else None
        if due and not self._projection.complete:
            self._send_alert(*due)

    def _send_alert(self, kind: AlertKind, text: str) -> None:
        level: AlertLevel = "WARN" if kind in MILD else "ERROR"
        self._opened().alert(title(kind, self.spec.recipe_name, self.spec.stage), text, level)

    def _close(self, complete: bool) -> None:
        """Wait until W&B has everything of the open run."""
        if self._run is not None:
            run, self._run = self._run, None
            run.finish(complete)

    def _save(self) -> None:
        self._state.save(self._path)


def follow(spec: WandbSpec, ended: threading.Event, lost: Callable[[], bool] = lambda: False) -> None:
    """Keep the W&B run of a stage up to date until ``ended``. Where the server does not answer it is kept offline meanwhile.

    Args:
        lost: whether the driver has ended without a word.
    """
    if not _wait_for_events(spec, ended):
        return
    spec = replace(spec, mode=wanted_mode(spec.mode, say))
    mode = reachable_mode(spec.mode, say)
    while True:
        try:
            if StageSender(spec, mode).follow(ended, _Recovery(spec, mode), lost):
                return
            mode = spec.mode
        except NotConfirmed:
            say("warning", f"W&B has not confirmed all of {spec.stage}; the rest is sent when the run is resumed, or by {REPLAY}")
            return
        except Exception as error:  # a view of the run must not be able to end it
            say("warning", f"W&B: {type(error).__name__}: {error}" + ("; the run is kept offline meanwhile" if mode == "online" else ""))
            start_over()
            if mode == "offline":
                return
            mode = "offline"


def tell_lost(spec: WandbSpec) -> None:
    """Tell ``observe.notify`` that the driver has ended without a word, unless the stage was at its end."""
    state = StageState(spec.stage)
    for entry in EventReader(spec.events, spec.stage).poll():
        _take_own(state, entry, spec)
    if text := _lost(state):
        recipe = Recipe.model_validate(dict(spec.config))
        Hook(spec.events, spec.stage, recipe, spec.root).send("driver_lost", text, time.time(), state.step)


def _take_own(state: StageState, entry: EventEntry, spec: WandbSpec) -> None:
    """Fold an event into the state of this driver's own work, unless an earlier driver left it."""
    if entry.end > spec.before.get(entry.file, 0):
        state.take(entry.attempt, entry.event)


def _lost(state: StageState) -> str:
    """What to say where a driver has ended without a word in this state; empty where its events say how it ended."""
    return "" if state.has_said_its_end or state.status == "done" else LOST.format(state.status)


def _wait_for_events(spec: WandbSpec, ended: threading.Event) -> bool:
    """Wait for the first event, or for a silence that is worth an alert; false if the stage ends without either."""
    until = time.monotonic() + (spec.stall_s or float("inf"))
    while True:
        last = ended.is_set()
        if time.monotonic() > until or next(EventReader(spec.events, spec.stage).poll(), None) is not None:
            return True
        if last:
            return False
        ended.wait(POLL_S)


class _Recovery:
    """Asks a server that did not answer again, every ``RETRY_S``; true once it does."""

    def __init__(self, spec: WandbSpec, mode: Mode) -> None:
        self._waiting = mode != spec.mode
        self._mode, self._next = spec.mode, time.monotonic() + RETRY_S

    def __call__(self) -> bool:
        if not self._waiting or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + RETRY_S
        return reachable_mode(self._mode, lambda level, text: None) == self._mode


def say(level: str, text: str) -> None:
    """Send a message to the driver; nothing happens if it is gone."""
    with contextlib.suppress(OSError):
        print(json.dumps([level, text]), flush=True)


def _listen(ended: threading.Event, lost: threading.Event, lock: SenderLock, driver: int, finish_s: float) -> None:
    """Wait until the driver has ended the stage or is gone; end everything if closing takes much longer than it may."""
    said = False
    while os.getppid() == driver:  # a process that the driver forked may hold the pipe open after its death
        if select.select([0], [], [], 1.0)[0]:
            said = os.read(0, 1) != b""
            break
    if not said:
        lost.set()
    lock.closing()
    ended.set()
    time.sleep(finish_s + GRACE_S)
    kill_descendants(psutil.Process())
    os._exit(1)


def main() -> int:
    """Send the events of the stage that standard input names, until its driver ends the stage or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the driver, which announces the end; srun sends them to both
    os.environ.pop("WANDB_SERVICE", None)  # of a program around the driver: its end must not be ours
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # unbuffered: what comes next is for _listen
        spec = WandbSpec(**json.loads(stdin.readline()))
    ended, lost, lock = threading.Event(), threading.Event(), SenderLock(spec.events, spec.stage, spec.driver)
    threading.Thread(target=_listen, args=(ended, lost, lock, spec.driver, spec.finish_s), daemon=True).start()
    try:
        if lock.acquire(ended, spec.finish_s):
            follow(spec, ended, lost.is_set)
            if lost.is_set():
                tell_lost(spec)
            start_over()  # while the lock is held: wandb's server must have ended before the next sender begins
        elif (holder := lock.holder()) is not None and not holder.closing:
            say("info", f"W&B: process {holder.pid} on {holder.host}, of another driver, sends the events of {spec.stage}")
        else:
            say("warning", f"W&B: another process still sends {spec.stage}; what it leaves out is sent the next time, or by {REPLAY}")
    except Exception as error:  # the driver logs it; a traceback would be seen by nobody
        say("warning", f"W&B: {type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
