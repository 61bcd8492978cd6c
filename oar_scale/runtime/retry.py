"""Trying again after a failure that may pass: the one backoff of the package, on tenacity.

retry_transient(read, patience_s=600)          while the storage is out of reach, which is logged
retry(work, Backoff(0.5, 30.0), ...)           with rules of one's own: what is transient, when to give up, what ends a pause
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception

from oar_scale.errors import Unreachable

FIRST_S, LONGEST_S = 1.0, 30.0
"""Bounds of the pause of :func:`retry_transient`, which doubles."""
T = TypeVar("T")
log = logging.getLogger(__name__)


class RetryStopped(Exception):
    """The stop event was set before the next attempt."""


@dataclass
class Backoff:
    """Pauses that double with each failure in a row.

    Args:
        first_s: the pause after the first failure.
        longest_s: bound of the pause.
        jitter: each pause is multiplied by a random number between these two, so that a thousand readers do not come back at once.
    """

    first_s: float
    longest_s: float = math.inf
    jitter: tuple[float, float] = (1.0, 1.0)
    failures: int = 0
    """In a row, so far."""

    @property
    def pause_s(self) -> float:
        """The pause after the failures so far, without jitter."""
        return min(self.longest_s, self.first_s * 2.0 ** min(self.failures - 1, 64))

    def progress(self) -> None:
        """Note that an attempt came further than the ones before: the next failure is the first in a row again."""
        self.failures = 0

    def next_pause(self) -> float:
        """Count a failure and return the pause after it, in seconds."""
        self.failures += 1
        return self.pause_s * random.uniform(*self.jitter)


def retry(
    work: Callable[[], T],
    backoff: Backoff,
    *,
    transient: Callable[[BaseException], bool],
    give_up: Callable[[], bool],
    stop: threading.Event | None = None,
    before_pause: Callable[[BaseException, float], None] | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Call ``work`` until it succeeds.

    Args:
        transient: whether another attempt after this error makes sense.
        give_up: called after each transient error, when ``backoff`` has counted it.
        stop: ends a pause; it is not looked at while ``work`` runs.
        before_pause: called with the error and the seconds until the next attempt.
        sleep: how to wait where there is no ``stop``.

    Raises:
        RetryStopped: ``stop`` was set during a pause.
        Exception: the last error of ``work``, if it is not transient or it is time to give up.
    """

    def pause(seconds: float) -> None:
        if stop is None:
            sleep(seconds)
        elif stop.wait(seconds):
            raise RetryStopped

    def announce(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if before_pause is not None and error is not None:
            before_pause(error, state.upcoming_sleep)

    retrying = Retrying(
        retry=retry_if_exception(transient),
        wait=lambda _: backoff.next_pause(),
        stop=lambda _: give_up(),  # tenacity asks it after `wait`
        sleep=pause,
        before_sleep=announce,
        reraise=True,
    )
    return retrying(work)


def retry_transient(
    work: Callable[[], T], patience_s: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep
) -> T:
    """Call ``work``, and again while the storage is out of reach: a training of weeks outlives its server's restart.

    Args:
        patience_s: no attempt is made later than this after the first one.

    Raises:
        Unreachable: the storage was out of reach for that long.
    """
    began, backoff = clock(), Backoff(FIRST_S, LONGEST_S, jitter=(0.5, 1.0))

    def announce(error: BaseException, _: float) -> None:
        log.warning("%s\nTrying again for %.0f s more (storage.patience_s).", error, patience_s - (clock() - began))

    return retry(
        work,
        backoff,
        transient=lambda error: isinstance(error, Unreachable),
        give_up=lambda: clock() - began + backoff.pause_s > patience_s,
        before_pause=announce,
        sleep=sleep,
    )
