"""Trying again: how long, how often, and what ends it. The clock is the test's."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from fake_clock import FakeClock

from oar_scale.errors import Unreachable
from oar_scale.runtime.retry import LONGEST_S, Backoff, RetryStopped, retry, retry_transient


def failing(times: int, error: Callable[[], Exception] = lambda: Unreachable("nobody answers")) -> Callable[[], int]:
    """Work that fails so often, and then returns how often it was called."""
    calls = 0

    def work() -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error()
        return calls

    return work


def test_pauses_double_up_to_their_bound_with_jitter() -> None:
    clock = FakeClock()
    assert retry_transient(failing(9), 1000, clock=clock, sleep=clock.sleep) == 10
    bounds = [1, 2, 4, 8, 16, *[LONGEST_S] * 4]
    assert len(clock.slept) == 9 and all(bound / 2 <= slept <= bound for slept, bound in zip(clock.slept, bounds, strict=True))


def test_no_attempt_is_made_when_patience_is_over() -> None:
    clock = FakeClock()
    with pytest.raises(Unreachable, match="nobody answers"):
        retry_transient(failing(10**6), 60, clock=clock, sleep=clock.sleep)
    assert 30 < sum(clock.slept) <= 60
    clock = FakeClock()
    with pytest.raises(Unreachable):
        retry_transient(failing(1), 0, clock=clock, sleep=clock.sleep)
    assert clock.slept == []


def test_an_error_that_does_not_pass_is_raised_at_once() -> None:
    clock = FakeClock()
    with pytest.raises(KeyError):
        retry_transient(failing(1, lambda: KeyError("x")), 1000, clock=clock, sleep=clock.sleep)
    assert clock.slept == []


def test_a_retry_is_logged_with_the_time_that_is_left(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    retry_transient(failing(1), 600, clock=clock, sleep=clock.sleep)
    (record,) = caplog.records
    assert "nobody answers" in record.getMessage() and "600 s more (storage.patience_s)" in record.getMessage()


def test_a_stop_event_ends_a_pause_however_long() -> None:
    stop = threading.Event()
    announced: list[float] = []

    def announce(error: BaseException, pause_s: float) -> None:
        announced.append(pause_s)
        stop.set()

    with pytest.raises(RetryStopped):
        retry(failing(3), Backoff(1e6), transient=lambda _: True, give_up=lambda: False, stop=stop, before_pause=announce)
    assert announced == [1e6]


def test_progress_makes_the_next_failure_the_first_in_a_row() -> None:
    backoff = Backoff(1.0, 8.0)
    assert [backoff.next_pause() for _ in range(5)] == [1, 2, 4, 8, 8]
    backoff.progress()
    assert backoff.next_pause() == 1
    backoff.failures = 10**6
    assert backoff.next_pause() == 8, "no overflow in a wait of weeks"
