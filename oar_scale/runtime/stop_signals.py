"""Stop requests by signal: SIGTERM or SIGUSR1, as schedulers send it some time before they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

STOP_ON = (signal.SIGTERM, signal.SIGUSR1)


Handler = Callable[[int, FrameType | None], object] | int | None
"""What ``signal.getsignal`` returns."""


class StopSignals:
    """Notes in ``reason`` which of the signals came while the ``with`` block lasts; outside the main thread it sees none."""

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

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
