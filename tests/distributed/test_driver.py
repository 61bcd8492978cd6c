"""What the driver makes of a group of workers that has ended, and of signals that come at a bad moment."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError
from small_run import pretraining, small_recipe

from oar_scale.distributed import ray_train, stop_request
from oar_scale.distributed.ray_train import TrainingDriver, run_training
from oar_scale.errors import Requeue
from oar_scale.observe import events
from oar_scale.observe.console import Console
from oar_scale.observe.events import EventLog, read_events
from oar_scale.run.context import Run
from oar_scale.runtime.stop_signals import StopSignals


class Failed(Exception):
    """As Ray Train raises it: with what each worker died of."""

    def __init__(self, *causes: BaseException) -> None:
        super().__init__("some workers failed")
        self.worker_failures = dict(enumerate(causes))


@pytest.fixture
def driver(tmp_path: Path) -> TrainingDriver:
    return TrainingDriver(pretraining(Run(small_recipe(str(tmp_path)))), Console())


@pytest.mark.parametrize(
    "cause", [Requeue(stop_request.GROW), RuntimeError("Connection closed by peer")], ids=["they stop to grow", "one died"]
)
def test_a_signal_that_no_worker_saw_ends_the_run(driver: TrainingDriver, cause: Exception) -> None:
    """No other worker group is started."""
    driver._retry_or_raise(Failed(cause))
    driver._signals.reason = "SIGUSR1"
    with pytest.raises(Requeue, match="SIGUSR1"):
        driver._retry_or_raise(Failed(cause))


def test_a_signal_between_two_groups_of_workers_ends_the_run(driver: TrainingDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 1

    monkeypatch.setattr(driver, "_choose_workers", choose)
    monkeypatch.setattr(driver, "_fit", lambda workers: pytest.fail("workers were started"))
    with pytest.raises(Requeue, match="SIGTERM"):
        driver.run()


def test_a_ray_that_ends_by_the_same_signal_is_no_error(driver: TrainingDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    signals = [signal.SIGTERM]

    def fit() -> None:
        for number in signals:
            os.kill(os.getpid(), number)
        raise ActorUnavailableError("the controller does not answer", b"0" * 16)

    own = SimpleNamespace(request=SimpleNamespace(remote=lambda reason: None))
    monkeypatch.setattr(ray_train, "start_stop_request", lambda: own)
    monkeypatch.setattr(driver, "_trainer", lambda *_: SimpleNamespace(fit=fit))
    with driver._signals, pytest.raises(Requeue, match="SIGTERM"):
        driver._fit(1)
    signals.clear()
    driver._signals.reason = None
    with pytest.raises(ActorUnavailableError):
        driver._fit(1)


def test_the_cause_of_a_failure_is_recorded_despite_a_signal(driver: TrainingDriver, tmp_path: Path) -> None:
    driver._signals.reason = "SIGTERM"
    with pytest.raises(Requeue):
        driver._retry_or_raise(Failed(RuntimeError("Connection closed by peer")))
    (event,) = read_events(str(tmp_path / "events"), "pretrain")
    assert event["kind"] == "worker_failure" and "Connection closed" in event["cause"]


def test_a_signal_is_passed_on_after_a_failed_capacity_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_request, "CAPACITY_POLL_S", 0.0)
    polled, stop_requested = threading.Event(), threading.Event()
    heard: list[str] = []

    def request_stop(reason: str) -> None:
        heard.append(reason)
        stop_requested.set()

    def poll() -> bool:
        polled.set()
        raise ConnectionError("no answer")

    own: Any = SimpleNamespace(request=SimpleNamespace(remote=request_stop))
    with StopSignals() as stop, stop_request.StopWatcher(own, stop, poll):
        polled.wait()
        os.kill(os.getpid(), signal.SIGUSR1)
        stop_requested.wait()
    assert heard == ["SIGUSR1"]


def test_no_room_for_the_workers_is_waited_out(tmp_path: Path) -> None:
    """On a cluster that others fill, however long that takes."""
    elastic = small_recipe(str(tmp_path), parallel={"workers": {"min": 1, "max": 2}, "micro_batch": 1})
    driver = TrainingDriver(pretraining(Run(elastic)), Console())
    for _ in range(elastic.parallel.max_failures + 2):
        driver._retry_or_raise(ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert driver._failures == 0


def test_a_resumed_training_took_as_long_as_all_its_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model card shows it, and how fast it was on the median."""

    def attempt(start_step: int) -> None:
        with EventLog(str(tmp_path / "events"), "pretrain") as log:
            log.emit("start", start_step=start_step, steps=10, parameters=7)
            log.emit("train", step=start_step + 5, images_per_s=4.0)

    with monkeypatch.context() as earlier:
        times = iter([1e9, 1e9 + 7200])
        earlier.setattr(events, "time", SimpleNamespace(time=lambda: next(times)))
        attempt(0)
    monkeypatch.setattr(ray_train, "ray_session", lambda **_: nullcontext())
    monkeypatch.setattr(TrainingDriver, "run", lambda self: attempt(5))
    results = run_training(pretraining(Run(small_recipe(str(tmp_path)))), Console())
    assert 7200 <= results.pop("seconds") < 7200 + 3600
    assert results == {"steps": 10, "attempts": 2, "images_per_s": 4.0, "parameters": 7}
