"""Waiting for a storage that does not answer: a training of weeks outlives its server's restart."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from oar_scale.errors import Unreachable

FIRST_S, LONGEST_S = 1.0, 30.0
"""Bounds of the pause between two tries, which doubles."""
T = TypeVar("T")
log = logging.getLogger(__name__)


def patiently(work: Callable[[], T], patience_s: float) -> T:
    """``work()``, tried again while the storage is out of reach.

    Raises:
        Unreachable: for longer than ``patience_s``.
    """
    began, pause = time.monotonic(), FIRST_S
    while True:
        try:
            return work()
        except Unreachable as error:
            waited = time.monotonic() - began
            if waited + pause > patience_s:
                raise
            log.warning("%s\nTrying again for %.0f s more (storage.patience_s).", error, patience_s - waited)
            time.sleep(pause * random.uniform(0.5, 1))  # jitter: a thousand readers must not come back at once
            pause = min(2 * pause, LONGEST_S)
