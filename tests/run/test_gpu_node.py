"""Work for GPUs on a machine without one goes to a node of the cluster, and its lines and result come back."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_run import small_recipe

from oar_scale.errors import Missing, UserError
from oar_scale.observe.console import Console
from oar_scale.run import gpu_node
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import chosen_device, each_from_gpu_node, each_on_node, gpus_of_a_node, on_gpu_node, run_on_node, threads_here


def there(run: Run) -> tuple[int, str, str]:
    run.console.say("half way\nthere")
    return os.getpid(), run.local("evaluation.json"), run.at("models")


def counts(run: Run) -> Iterator[int]:
    for number in range(3):
        run.console.say(f"number {number}")
        yield number
    raise Missing(run.at("models"))


def fails(run: Run) -> None:
    raise Missing(run.at("models", "ordered.safetensors"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(small_recipe("run"), Console(io.StringIO()))


@pytest.mark.usefixtures("shared_ray")
def test_lines_and_results_come_from_the_other_node(run: Run, tmp_path: Path) -> None:
    """Paths are the driver's: the task's own working folder is another."""
    pid, local, root = run_on_node(run, there, gpus=0, gpu_type=None)
    assert pid != os.getpid()
    assert (local, root) == (str(tmp_path / "run" / "evaluation.json"), str(tmp_path / "run" / "models"))
    shown = run.console._stream
    assert isinstance(shown, io.StringIO) and shown.getvalue().splitlines()[-2:] == ["half way", "there"]
    with pytest.raises(Missing, match=r"run/models/ordered\.safetensors: there is nothing here"):
        run_on_node(run, fails, gpus=0, gpu_type=None)


@pytest.mark.usefixtures("shared_ray")
def test_results_come_one_by_one_from_the_other_node(run: Run) -> None:
    """Those before an error arrive."""
    numbers = each_on_node(run, counts, gpus=0, gpu_type=None)
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Missing, match="run/models: there is nothing here"):
        next(numbers)
    shown = run.console._stream
    assert isinstance(shown, io.StringIO) and "number 2" in shown.getvalue()


def test_results_come_one_by_one_from_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(zip(range(3), each_from_gpu_node(run, counts, gpus=1), strict=False)) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(("wanted", "gpus"), [(0, 0), (2, 4)])
def test_work_stays_here_where_it_can_be_done(run: Run, monkeypatch: pytest.MonkeyPatch, wanted: int, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert on_gpu_node(run, there, gpus=wanted)[0] == os.getpid()


def test_without_a_gpu_the_work_goes_to_the_cluster(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="Name a cluster's Ray in RAY_ADDRESS"):
        on_gpu_node(run, there, gpus=512)
    sent: list[tuple[object, int, object]] = []
    monkeypatch.setattr(gpu_node, "run_on_node", lambda run, work, gpus, gpu_type: sent.append((work, gpus, gpu_type)))
    monkeypatch.setattr(gpu_node, "ray_session", lambda cpus: pytest.MonkeyPatch.context())
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"GPU": 8.0}}, {"Alive": False, "Resources": {"GPU": 16.0}}])
    monkeypatch.setenv("RAY_ADDRESS", "ray.example:6379")
    on_gpu_node(run, there, gpus=512)
    assert sent == [(there, 8, None)]


@pytest.mark.parametrize(
    ("nodes", "usable", "gpu_type", "gpus"),
    [
        ([{"CPU": 8.0}, {"GPU": 8.0}, {"GPU": 4.0}], 512, None, 8),
        ([{"GPU": 8.0}], 2, None, 2),
        ([{"GPU": 8.0}, {"GPU": 4.0, "accelerator_type:H100": 1.0}], 64, "H100", 4),
        ([{"CPU": 8.0}], 64, None, 1),
    ],
)
def test_a_task_asks_for_the_gpus_of_one_node(nodes: list[dict[str, float]], usable: int, gpu_type: str | None, gpus: int) -> None:
    """Where there is none yet, for one: the cluster may grow."""
    assert gpus_of_a_node(nodes, usable, gpu_type) == gpus


@pytest.mark.parametrize(("wanted", "threads"), [(512, 2), (1, 1), (0, 1)])
def test_no_more_threads_than_this_machine_has_cores(wanted: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of 512 workers counts on many machines, and its driver is one of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert threads_here(wanted) == threads


@pytest.mark.parametrize(
    ("name", "gpus", "device"), [(None, 2, "cuda"), (None, 0, "cpu"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1")]
)
def test_a_device_is_chosen_or_the_best_there_is(name: str | None, gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert chosen_device(name) == torch.device(device)


@pytest.mark.parametrize(("name", "fault"), [("gpu", "there are cpu, cuda and cuda:NUMBER"), ("cuda:2", "torch finds 2 GPUs on .*cpu")])
def test_a_device_that_is_not_there_is_refused(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=f"--device {name}: {fault}"):
        chosen_device(name)
