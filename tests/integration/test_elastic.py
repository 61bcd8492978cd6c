"""Training on a real Ray cluster of two node processes, one of which is lost; signals to the driver; torchrun without any Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import RayCluster, wait_for_nodes
from small_run import copy_run, prepare_small_run, small_recipe

from oar_scale.config.loading import dump_recipe
from oar_scale.observe.events import read_events
from oar_scale.stages.run import Run

STEPS = 45
SHAPE: dict[str, Any] = {
    "model": {"dropout": 0.0},
    "parallel": {"workers": {"min": 1, "max": 2}, "precision": "fp32", "micro_batch": 2},
    "pretrain": {"steps": STEPS, "checkpoint_every": 5, "evaluate_every": 100, "spike_guard": "off"},
}
SLOW = """
import importlib.util, sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "oar_scale.training.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            one_step = module.train_step
            def slow(*given):
                time.sleep({pause})
                return one_step(*given)
            module.train_step = slow
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
"""So that there is time to lose a node: a ``sitecustomize`` that makes the steps of whoever imports the loop slow."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare_small_run(small_recipe(str(tmp_path_factory.mktemp("prepared")), **SHAPE))


@pytest.fixture(scope="module")
def undisturbed(prepared: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a single process."""
    run = copy_run(prepared, str(tmp_path_factory.mktemp("undisturbed")), **{**SHAPE, "parallel": {**SHAPE["parallel"], "workers": 1}})
    done = subprocess.run(_torchrun(run, 1), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(run)


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with RayCluster(head_cpus=1) as cluster:
        yield cluster


def train(run: Run, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "oar_scale.cli", "train", _recipe(run)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run.events, "pretrain") if event["kind"] == kind]


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(run, "train")}


def test_torchrun_starts_the_same_workers(prepared: Run, undisturbed: dict[int, float], tmp_path: Path) -> None:
    run = copy_run(prepared, str(tmp_path), **{**SHAPE, "parallel": {**SHAPE["parallel"], "workers": 2, "zero_stage": 3}})
    done = subprocess.run(_torchrun(run, 2), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert events(run, "start")[0]["world_size"] == 2
    assert _apart(losses(run), undisturbed) < 1e-5
    assert os.path.exists(run.marker("pretrain"))


@pytest.mark.timeout(600)
def test_a_run_goes_on_without_a_lost_node_and_with_the_one_that_takes_its_place(
    cluster: RayCluster, prepared: Run, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    other = cluster.add(cpus=1)
    wait_for_nodes(cluster.address, 2)
    run = copy_run(prepared, str(tmp_path / "run"), **SHAPE)
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(pause=0.8))
    driver = train(run, RAY_ADDRESS=cluster.address, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    try:
        _wait(run, "checkpoint", 1, driver)
        cluster.lose(other)
        _wait(run, "start", 2, driver)
        cluster.add(cpus=1)
        output, _ = driver.communicate(timeout=300)
    finally:
        driver.kill()
    assert driver.returncode == 0, output[-4000:]
    worlds = [event["world_size"] for event in events(run, "start")]
    assert worlds[:2] == [2, 1], output[-3000:]
    assert worlds[-1] == 2, f"it did not grow back: {worlds}"
    assert _apart(losses(run), undisturbed) < 1e-5


@pytest.mark.timeout(500)
def test_a_signal_to_the_driver_saves_and_leaves_and_the_same_command_goes_on(
    prepared: Run, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    run = copy_run(prepared, str(tmp_path / "run"), **SHAPE)
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(pause=0.3))
    driver = train(run, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    try:
        _wait(run, "train", 8, driver)
        driver.send_signal(signal.SIGUSR1)
        output, _ = driver.communicate(timeout=100)
    finally:
        driver.kill()
    assert driver.returncode == 75 and "everything saved" in output, output[-3000:]
    stopped = events(run, "stopping")[-1]
    assert stopped["reason"] == "SIGUSR1"
    again = train(run)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output[-3000:]
    assert events(run, "start")[-1]["start_step"] == stopped["step"], "nothing was done twice"
    assert _apart(losses(run), undisturbed) < 1e-5


def _recipe(run: Run) -> str:
    """The run's recipe as a file; its earlier stages are marked as done."""
    from oar_scale import pipeline

    path = run.local("as-given.yaml")
    Path(path).write_text(dump_recipe(run.recipe))
    todo = pipeline.stages(run.recipe)
    for stage in todo[:3]:
        marker = {"stage": stage.name, "fingerprint": pipeline._fingerprint(run, todo, stage), "settings": {}, "seconds": 0, "started": 0}
        from oar_scale.storage import write_json

        write_json(run.marker(stage.name), {**marker, "results": {}})
    return path


def _torchrun(run: Run, workers: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    return [*command, "-m", "oar_scale.cli", "train", _recipe(run)]


def _apart(found: dict[int, float], expected: dict[int, float]) -> float:
    assert sorted(found) == sorted(expected)
    return max(abs(found[step] - expected[step]) for step in expected)


def _wait(run: Run, kind: str, count: int, driver: subprocess.Popen[str], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while len(events(run, kind)) < count:
        assert driver.poll() is None, f"the driver ended: {driver.communicate()[0][-4000:]}"
        assert time.monotonic() < deadline, f"no {kind} number {count}"
        time.sleep(0.1)
