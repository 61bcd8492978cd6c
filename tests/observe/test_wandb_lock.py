"""Of the processes that could send a stage to W&B one does, and a killed driver's does not keep the next one from it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from oar_scale.observe import wandb_lock
from oar_scale.observe.wandb_lock import TAKE_OVER_S, SenderLock

HOLDER = """
import sys, threading
from oar_scale.observe.wandb_lock import SenderLock
lock = SenderLock(sys.argv[1], "pretrain", int(sys.argv[2]))
assert lock.acquire(threading.Event(), 0.0)
if sys.argv[3] == "closing":
    lock.closing()
print("held", flush=True)
sys.stdin.read()
"""
Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts another process that holds the lock for a driver, until its standard input is closed."""
    with ExitStack() as started:

        def start(driver: int, state: str = "sending") -> subprocess.Popen[str]:
            command = [sys.executable, "-c", HOLDER, str(tmp_path), str(driver), state]
            holder = started.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            started.callback(holder.kill)
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            return holder

        yield start


@pytest.fixture
def gone() -> int:
    """The process id of a driver that has ended."""
    driver = subprocess.Popen([sys.executable, "-c", ""])
    driver.wait()
    return driver.pid


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the lock sees: it stands still but for what is waited."""
    played = SimpleNamespace(now=0.0, sleep=lambda seconds: setattr(played, "now", played.now + seconds))
    monkeypatch.setattr(wandb_lock, "time", SimpleNamespace(monotonic=lambda: played.now, sleep=played.sleep))
    return played


def ended_stage() -> threading.Event:
    ended = threading.Event()
    ended.set()
    return ended


def lock_of(folder: Path) -> SenderLock:
    return SenderLock(str(folder), "pretrain", os.getpid())


def test_a_free_lock_is_taken_also_after_the_stage(tmp_path: Path) -> None:
    assert lock_of(tmp_path).acquire(ended_stage(), 0.0)


def test_a_living_drivers_sender_is_left_to_send(tmp_path: Path, hold: Hold, clock: SimpleNamespace) -> None:
    holder = hold(os.getpid())
    assert not lock_of(tmp_path).acquire(ended_stage(), last_wait_s=1000.0)
    assert clock.now == 0.0 and holder.poll() is None


def test_a_closing_sender_is_waited_for_after_the_stage(tmp_path: Path, hold: Hold, clock: SimpleNamespace) -> None:
    """It may have read its last event before ours were written."""
    holder = hold(os.getpid(), "closing")
    assert not lock_of(tmp_path).acquire(ended_stage(), last_wait_s=8.0)
    assert 8.0 <= clock.now < 9.0 and holder.poll() is None
    holder.communicate("")
    assert lock_of(tmp_path).acquire(ended_stage(), last_wait_s=8.0)


def test_a_killed_drivers_sender_has_time_to_close(tmp_path: Path, hold: Hold, gone: int, clock: SimpleNamespace) -> None:
    holder = hold(gone)
    stage = threading.Event()
    seen: list[int | None] = []

    def wait(timeout: float | None = None) -> bool:
        if clock.now <= TAKE_OVER_S:
            seen.append(holder.poll())
        else:
            holder.wait()  # killed
        clock.now += 1.0
        return False

    stage.wait = wait  # type: ignore[method-assign]
    assert lock_of(tmp_path).acquire(stage, 8.0)
    assert len(seen) == TAKE_OVER_S + 1 and set(seen) == {None}


def test_a_killed_drivers_sender_ends_with_the_next_stage(tmp_path: Path, hold: Hold, gone: int, clock: SimpleNamespace) -> None:
    holder = hold(gone)
    assert lock_of(tmp_path).acquire(ended_stage(), last_wait_s=0.0)
    assert holder.wait() != 0


def test_a_sender_of_another_machine_is_never_killed(tmp_path: Path, hold: Hold, gone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = hold(gone)
    monkeypatch.setattr(wandb_lock, "machine_id", lambda: "another boot")
    lock = lock_of(tmp_path)
    assert not lock.acquire(ended_stage(), last_wait_s=0.5)
    read = lock.holder()
    assert read is not None and read.pid == holder.pid
    read.kill()
    assert holder.poll() is None


def test_a_lock_whose_holder_is_not_named_is_waited_for(tmp_path: Path, hold: Hold, clock: SimpleNamespace) -> None:
    hold(os.getpid())
    (tmp_path / "pretrain.wandb.lock").write_text("")
    assert not lock_of(tmp_path).acquire(ended_stage(), last_wait_s=8.0)
    assert clock.now >= 8.0
