"""Training on a real Ray cluster of two node processes, one of which is lost; signals to the driver; torchrun without any Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from elastic_runs import (
    SHAPE,
    events,
    losses,
    max_difference,
    prepared_run,
    recipe_file,
    torchrun,
    undisturbed_run,
    wait_for_events,
    watched,
)
from small_run import copy_run

from cluster.dev import ray as dev_ray
from oar_scale.run.context import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a single process."""
    return undisturbed_run(tmp_path_factory)[0]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dev_ray.Cluster]:
    folder = str(tmp_path / "ray")
    try:
        yield dev_ray.up(folder, nodes=2, cpus=1, port=dev_ray.free_port(), dashboard=False)
    finally:
        dev_ray.down(folder)


def train(run: Run, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "oar_scale.cli", "train", recipe_file(run)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_torchrun_starts_the_same_workers(prepared: Run, undisturbed: dict[int, float], tmp_path: Path) -> None:
    run = copy_run(prepared, str(tmp_path), **{**SHAPE, "parallel": {**SHAPE["parallel"], "workers": 2, "zero_stage": 3}})
    done = subprocess.run(torchrun(run, 2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert events(run, "start")[0]["world_size"] == 2
    assert max_difference(losses(run), undisturbed) < 1e-5
    assert os.path.exists(run.marker("pretrain"))


def test_lost_and_joined_node_then_a_signal_and_a_resume(
    cluster: dev_ray.Cluster, prepared: Run, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    """One training: a node is lost, the run goes on with one worker, grows back, is asked to stop, saves, and is resumed to its end."""
    run = copy_run(prepared, str(tmp_path / "run"), **SHAPE)
    # A node has to be lost, another to join and to be seen twice, a checkpoint to be made, and the signal to come, before the last step.
    driver = train(run, **cluster.env, **watched(tmp_path, 6.0, 5))
    try:
        _wait(run, "checkpoint", 1, driver)
        dev_ray.lose_node(cluster.nodes[1])
        _wait(run, "start", 2, driver)
        dev_ray.add_node(cluster, cpus=1)
        _wait(run, "start", 3, driver)
        worlds = [event["world_size"] for event in events(run, "start")]
        watched(tmp_path, 3.0)
        _wait(run, "train", len(events(run, "train")) + 1, driver)
        driver.send_signal(signal.SIGUSR1)
        output, _ = driver.communicate()
    finally:
        driver.kill()
    assert worlds[:2] == [2, 1], output[-3000:]
    assert worlds[-1] == 2, f"it did not grow back: {worlds}"
    assert driver.returncode == 75 and "everything saved" in output, output[-3000:]
    stopped = events(run, "stopping")[-1]
    assert stopped["reason"] == "SIGUSR1"
    watched(tmp_path, 0)
    again = train(run, **cluster.env)
    output, _ = again.communicate()
    assert again.returncode == 0, output[-4000:]
    assert events(run, "start")[-1]["start_step"] == stopped["step"], "nothing was done twice"
    assert max_difference(losses(run), undisturbed) < 1e-5


def _wait(run: Run, kind: str, count: int, driver: subprocess.Popen[str]) -> None:
    wait_for_events(run, kind, count, lambda: None if driver.poll() is None else driver.communicate()[0])
