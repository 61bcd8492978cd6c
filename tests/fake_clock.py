"""A clock that a test moves, so that no verdict depends on how fast the machine is."""

from __future__ import annotations


class FakeClock:
    """Stands still but for what is added to ``now``, and for what :meth:`sleep` sleeps. Call it for the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass, at once."""
        self.slept.append(seconds)
        self.now += seconds
