"""Waiting for what other processes do, which sends no event to this one."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], timeout_s: float = 600) -> None:
    """Return as soon as ``condition`` holds. The timeout is for a condition that never does, not for a slow machine."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)
