"""Processes that another one of ours starts, and that are of no use without it."""

from __future__ import annotations

import os
import threading
import time

POLL_S = 0.5


def end_with_parent() -> None:
    """Let this process end soon after the one that has started it, which cannot end it where it is killed itself."""
    threading.Thread(target=_end_after, args=(os.getppid(),), name="parent", daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
