"""The live console of a run: what is being done, how far it is, when it will be done.

The work happens in other processes; the console only reads their event files. On a terminal it draws a progress bar, and
in a log file or a pipe it prints a plain line every ten seconds, with the same text:

    [4/9] pretrain: continue the any-order model for 60 steps (about 1 min)
          step 40/60  loss 3.214  nll 3.402  61.3 images/s  20 s left
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from oar_scale.data.notes import Notes
from oar_scale.observe.events import Event, EventReader, attempts
from oar_scale.observe.formatting import duration as duration
from oar_scale.observe.formatting import message, number, time_left
from oar_scale.text import printable

log = logging.getLogger(__name__)

PLAIN_INTERVAL_S = 10.0
POLL_S = 0.3
JOIN_S = 2.0
"""How long the end of a stage waits for its last lines to be shown."""
QUIET = ("bad_sample", "worker_failure", "failed", "resized", "end")
"""Reported elsewhere: bad samples in one line at the end, the rest by the driver itself."""


class Console:
    """Prints the headers of the stages and follows their progress."""

    def __init__(self, stream: TextIO | None = None, plain_interval_s: float = PLAIN_INTERVAL_S) -> None:
        """``stream`` defaults to standard output; ``plain_interval_s`` is the time between lines where there is no terminal."""
        self._stream = stream or sys.stdout
        self._interval_s = plain_interval_s
        self._rich = RichConsole(file=self._stream, highlight=False) if self._stream.isatty() else None

    def say(self, text: str) -> None:
        """Print one line (or a few)."""
        if self._rich:
            self._rich.print(escape(printable(text)))
        else:
            print(printable(text), file=self._stream, flush=True)

    def stage(self, name: str, what: str, expected: str) -> None:
        """Head line of a stage: ``name``, ``what`` it does in a short phrase, and how long it is ``expected`` to take."""
        if self._rich:
            self._rich.print(f"[bold]{escape(name)}[/bold]: {escape(what)} [dim]({escape(expected)})[/dim]")
        else:
            self.say(f"{name}: {what} ({expected})")

    @contextmanager
    def follow(self, folder: str, stage: str, total_steps: int, stall_s: float = math.inf) -> Iterator[None]:
        """Show a stage's events while the ``with`` body runs it, usually in other processes.

        Args:
            folder: local folder of the run's events.
            stage: name of the stage; what earlier attempts wrote is not shown again.
            total_steps: the step at which the stage is complete.
            stall_s: silence that is worth a line.
        """
        view = self._view(total_steps, stage)
        follower = _ConsoleFollower(folder, stage, total_steps, view, stall_s)
        follower.start()
        try:
            yield
        finally:
            follower.finish()
            view.close()

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Tally]:
        """Count ``total`` units of work: ``with console.progress(3900, "orders") as tally: tally.advance(48)``."""
        view = self._view(total, what)
        try:
            yield Tally(total, what, view)
        finally:
            view.close()

    def _view(self, total: int, what: str) -> _ProgressView:
        return _Bar(self._rich, total, what) if self._rich else _Lines(self._stream, self._interval_s)


class Tally:
    """Work done so far, with its rate and the time left."""

    def __init__(self, total: int, what: str, view: _ProgressView) -> None:
        self.done = 0
        self._total, self._what, self._view = total, what, view
        self._pace = _Pace()
        self._pace.add(0)

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more units as done."""
        self.update(self.done + count)

    def update(self, done: int) -> None:
        """Set the number of units that are done."""
        self.done = done
        self._pace.add(done)
        rate = self._pace.per_second()
        texts = [f"{rate:.1f}/s" if rate else "", time_left(self._total - done, rate)]
        text = "  ".join(part for part in texts if part)
        self._view.show(done, f"{self._what} {done}/{self._total}", text)

    def note(self, text: str) -> None:
        """Print a line beside the progress, e.g. that an actor was lost and replaced."""
        self._view.note(text)


class _Pace:
    """Units per second over the last minute, or the last few marks where they come seldom; a step back (a restart) begins anew."""

    WINDOW_S, FEW = 60.0, 8
    """Shards of several actors end together: two marks may be as close as these or as far apart as a whole shard takes."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque()

    def add(self, done: float, at: float | None = None) -> None:
        now = time.monotonic() if at is None else at
        if self._marks and done < self._marks[-1][1]:
            self._marks.clear()
        self._marks.append((now, done))
        while len(self._marks) > self.FEW and now - self._marks[0][0] > self.WINDOW_S:
            self._marks.popleft()

    def per_second(self) -> float | None:
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start and last > first else None


class _ProgressView(Protocol):
    def show(self, done: int, head: str, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class _Bar:
    """A progress bar on a terminal."""

    def __init__(self, rich: RichConsole, total: int, what: str) -> None:
        columns = TextColumn("  {task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("{task.fields[text]}")
        self._progress = Progress(*columns, console=rich, refresh_per_second=4)
        self._task = self._progress.add_task(escape(what), total=total, text="")
        self._progress.start()

    def show(self, done: int, head: str, text: str) -> None:
        self._progress.update(self._task, completed=done, text=escape(text))

    def note(self, text: str) -> None:
        self._progress.console.print(f"  {escape(printable(text))}")

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """Plain lines, at most one in ``interval_s`` seconds, and the last state when it ends."""

    def __init__(self, stream: TextIO, interval_s: float) -> None:
        self._stream, self._interval_s = stream, interval_s
        self._printed_at = time.monotonic()
        self._latest = self._printed = ""

    def show(self, done: int, head: str, text: str) -> None:
        self._latest = f"  {head}  {text}".rstrip()
        if time.monotonic() - self._printed_at >= self._interval_s:
            self._print_latest()

    def note(self, text: str) -> None:
        print(f"  {printable(text)}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._latest != self._printed:
            self._print_latest()

    def _print_latest(self) -> None:
        print(self._latest, file=self._stream, flush=True)
        self._printed, self._printed_at = self._latest, time.monotonic()


class _ConsoleFollower:
    """Shows what is appended to a stage's events, from where they end now."""

    def __init__(self, folder: str, stage: str, total_steps: int, view: _ProgressView, stall_s: float) -> None:
        self._folder, self._stage, self._total, self._view, self._stall_s = folder, stage, total_steps, view, stall_s
        # Not every file is an attempt of the workers; this is exact enough, and reads a history of weeks in no time.
        self._attempts_before = sum(Path(path).read_bytes().count(b'"kind": "start"') for _, path in attempts(folder, stage))
        self._reader = EventReader(folder, stage, from_now=True)
        self._state: Event = {}
        self._notes = Notes()
        self._pace = _Pace()
        self._progressed, self._stalled = time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"console-{stage}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        """Run in a thread of its own, which may fail (a closed pipe, a full disk) without harm to the stage."""
        try:
            ended = False
            while not ended:
                ended = self._ended.wait(POLL_S)
                self._poll()
            if self._notes.line():
                self._view.note(self._notes.line())
        except Exception as error:  # a view of the stage must not be able to end it
            log.warning("the console no longer follows %s (%s: %s)", self._stage, type(error).__name__, error)

    def finish(self) -> None:
        """Stop, after showing what was written up to now."""
        self._ended.set()
        self._thread.join(JOIN_S)

    def _poll(self) -> None:
        for entry in self._reader.poll():
            self._progressed, self._stalled = time.monotonic(), False
            self._show(entry.event)
        silent = time.monotonic() - self._progressed
        if silent > self._stall_s and not self._stalled:
            self._stalled = True
            self._view.note(f"nothing was heard of {self._stage} for {duration(silent)}")

    def _show(self, event: Event) -> None:
        kind, step = event["kind"], event.get("step")
        note = message(event)
        if kind == "bad_sample":
            self._notes.add("bad samples, replaced by others", str(event.get("fault")))
        if kind == "start":
            self._show_start(event)
        elif kind == "heldout":
            self._state["nll"] = event.get("nll_random")
        elif kind in ("train", "vq"):
            self._state.update({name: event[name] for name in ("loss", "psnr", "images_per_s") if name in event})
            # Only these move the bar: a checkpoint may be reported when training is already further.
            assert step is not None
            self._pace.add(step, event["time"])
            self._view.show(step, f"step {step}/{self._total}", self._text(step))
            for name, value in event.get("non_finite", {}).items():
                self._view.note(f"step {step}: {name} is {value}")
        if note and kind not in QUIET:
            self._view.note(note)

    def _show_start(self, event: Event) -> None:
        seen = self._attempts_before + self._state.get("starts", 0)
        self._state["starts"] = self._state.get("starts", 0) + 1
        start_step = event.get("start_step", 0)
        self._pace = _Pace()
        self._pace.add(start_step, event["time"])
        if seen or start_step:
            workers = f", {event['world_size']} workers" if "world_size" in event else ""
            self._view.note(f"attempt {seen + 1}: resumes from step {start_step}{workers}")
        for notice in event.get("notices", []):
            self._view.note(str(notice))

    def _text(self, step: int) -> str:
        state = self._state
        texts = [f"{name} {number(state[name])}" for name in ("loss", "psnr", "nll") if name in state]
        if state.get("images_per_s"):
            texts.append(f"{state['images_per_s']:.1f} images/s")
        texts.append(time_left(self._total - step, self._pace.per_second()))
        return "  ".join(part for part in texts if part)
