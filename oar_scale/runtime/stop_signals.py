"""Stop requests by signal: SIGTERM or SIGUSR1, as schedulers send it some time before they kill."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import ClassVar, Self

STOP_ON = (signal.SIGTERM, signal.SIGUSR1)
AGAIN_S = 5.0
"""Between two stop requests of a deadline that has passed: what had just begun may not have listened yet."""


Handler = Callable[[int, FrameType | None], object] | int | None
"""What ``signal.getsignal`` returns."""


class StopSignals:
    """Notes in ``reason`` which of the signals came while the ``with`` block lasts; outside the main thread it sees none."""

    unheeded: ClassVar[str | None] = None
    """The reason of the last block that came to its end nevertheless: whatever would begin next in this process is asked to stop, too."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in STOP_ON}
            self.arm()
        return self

    def arm(self) -> None:
        """Take the signals, again where another library has taken them meanwhile."""
        for number in self._before:
            signal.signal(number, self._note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.reason is not None:
            StopSignals.unheeded = self.reason

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name


class Deadline:
    """Sends this process a stop request (SIGUSR1) once so many seconds have passed, as a scheduler does before it kills.

    What listens (:class:`StopSignals`) saves its state and leaves; what does not goes on. Outside the main thread no signal can be handled,
    and nothing is sent: what is under way there goes on, and only :attr:`passed` says that the time is over. A SIGUSR1 that comes earlier,
    from a scheduler, brings the deadline forward.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._at = seconds, time.monotonic() + seconds
        self._asked = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)
        self._before: Handler = None

    @property
    def passed(self) -> bool:
        """Whether the time is over, or a stop was requested that nothing else has heard."""
        return self._asked or time.monotonic() >= self._at

    @property
    def reason(self) -> str:
        """Why to stop, in words."""
        return f"{self._seconds / 60:g} min are over" if time.monotonic() >= self._at else signal.SIGUSR1.name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._note)  # by default it would end the process
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
            signal.signal(signal.SIGUSR1, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def _watch(self) -> None:
        wait = self._at - time.monotonic()
        while not self._ended.wait(wait):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait = AGAIN_S
