"""Trainings on a Slurm whose nodes are hosts of their own, Ray across both and S3 behind it; what is done to them changes nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic_runs import SHAPE, events, losses, max_difference, prepared_run, samples, undisturbed_run, wait_for_events, watched

from cluster.dev import s3 as dev_s3
from cluster.dev import slurm as dev_slurm
from cluster.dev.hosts import GATE_ADDRESS
from oar_scale.config.loading import load_recipe
from oar_scale.launch.job_state import ENDED
from oar_scale.run.context import Run

TESTS = str(Path(__file__).resolve().parents[1])
PREPARE = """
import json, sys
from elastic_runs import SHAPE, recipe_file
from small_run import copy_run, small_recipe
from oar_scale.run.context import Run
from oar_scale.storage import open_storage
source, folder, root, changes = sys.argv[1:]
prepared = Run(small_recipe(source, **SHAPE))
run = copy_run(prepared, folder, root, **json.loads(changes))
for uri in open_storage(prepared.at("images")).list(prepared.at("images")):
    open_storage(run.at()).upload(uri, run.at("images", uri.removeprefix(prepared.at("images"))))
print(recipe_file(run))
"""


class Gate:
    """Runs commands where the cluster and its S3 server can be reached, which this process is not."""

    def __init__(self, cluster: dev_slurm.Cluster, variables: dict[str, str]) -> None:
        self.cluster, self._variables = cluster, variables
        self._last_query = 0.0

    def python(self, *arguments: str, **variables: str) -> str:
        done = subprocess.run(
            [*self.cluster.prefix, sys.executable, *arguments],
            env={**os.environ, **self.cluster.env, **self._variables, **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def oar(self, *arguments: str, **variables: str) -> str:
        return self.python("-m", "oar_scale.cli", *arguments, **variables)

    def prepared(self, source: Run, folder: Path, root: str, shape: dict[str, Any]) -> str:
        """The recipe of a run whose tokens lie in S3."""
        folder.mkdir()
        path = f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
        return self.python("-c", PREPARE, source.local(), str(folder), root, json.dumps(shape), PYTHONPATH=path).strip()

    def jobs(self, run: Run) -> str:
        return self.oar("jobs", run.local())

    def over(self, run: Run) -> str | None:
        """For :func:`wait_for_events`. Asked seldom: each time is a new process."""
        if time.monotonic() - self._last_query < 5:
            return None
        self._last_query, state = time.monotonic(), self.jobs(run)
        return state + job_logs(run) if re.search("|".join([*ENDED, "UNKNOWN"]), state) else None  # on its way back it has other states yet

    def wait(self, run: Run, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while self.over(run) is None:
            assert time.monotonic() < deadline, self.jobs(run) + job_logs(run)
            time.sleep(2)
        return self.jobs(run)

    def wait_for(self, run: Run, text: str, seconds: float = 800) -> None:
        deadline = time.monotonic() + seconds
        while text not in job_logs(run):
            assert time.monotonic() < deadline and self.over(run) is None, f"{text!r} does not come\n{self.jobs(run)}{job_logs(run)}"
            time.sleep(1)


@pytest.fixture(scope="module")
def gate(hosts_slurm: dev_slurm.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    folder = str(tmp_path_factory.mktemp("gate-s3"))
    gate = Gate(hosts_slurm, {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]})
    try:
        port = str(dev_s3.free_port())  # its sockets lie in /tmp, named by the port, which the hosts share with everybody
        exports = gate.python(dev_s3.__file__, "up", "--dir", folder, "--host", GATE_ADDRESS, "--port", port)
        gate._variables |= dict(line.removeprefix("export ").split("=", 1) for line in exports.splitlines())
        yield gate
    finally:
        dev_s3.down(folder)


def profile(folder: Path, **fields: Any) -> str:
    """One CPU a node, so that two workers are on two nodes."""
    given = {"type": "slurm", "nodes": 2, "cpus_per_node": 1, "time": "00:30:00", "warn_s": 60, "object_store_mb": 100, "backoff_s": 1}
    (folder / "profile.yaml").write_text(json.dumps({**given, "env": {"OMP_NUM_THREADS": "1"}, **fields}))
    return str(folder / "profile.yaml")


def job_logs(run: Run) -> str:
    """By the shells and the drivers of all attempts."""
    return "".join(
        f"--- {path}\n{path.read_text()}" for path in sorted(Path(run.local("jobs")).glob("*/**/*.log")) if "ray-" not in path.name
    )


def job_id(printed: str) -> str:
    match = re.search(r"as job (\d+)", printed)
    assert match is not None, printed
    return match[1]


def test_one_submit_reaches_the_report_despite_a_requeue(gate: Gate, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The requeue comes in the middle of training; losses and samples are those of an undisturbed run."""
    small = {"evaluate": {"nll_images": 4, "feature_images": 8}, "sample": {"images": 2}, "pipeline": {"control": False}}
    shape = {**SHAPE, "parallel": {**SHAPE["parallel"], "workers": 2}, **small}
    recipe = gate.prepared(prepared_run(tmp_path_factory), tmp_path / "run", "s3://oar/flagship", shape)
    run = Run(load_recipe(recipe))
    printed = gate.oar("submit", recipe, "--cluster", profile(tmp_path), **watched(tmp_path, 1.5))
    wait_for_events(run, "checkpoint", 1, lambda: gate.over(run), 300)
    gate.cluster.command("scontrol", "requeue", job_id(printed))
    gate.wait_for(run, "attempt 1, on")
    watched(tmp_path, 0)
    state = gate.wait(run, 800)
    assert "COMPLETED" in state and "came back 1 times" in state, state + job_logs(run)
    starts = events(run, "start")
    assert [start["world_size"] for start in starts] == [2, 2] and starts[1]["start_step"] >= 5
    assert "Ray has 2 nodes" in job_logs(run)
    expected_losses, expected_samples = undisturbed_run(tmp_path_factory)
    assert max_difference(losses(run), expected_losses) < 1e-5
    assert samples(tmp_path) == expected_samples
    assert (Path(run.local()) / "report" / "index.html").stat().st_size > 50_000
    assert not Path(run.local("tokens")).exists(), "the shards belong into S3"
    assert "report" in gate.oar("status", run.local()) and "finished in" in gate.oar("logs", run.local())


@pytest.mark.slow  # Slurm counts limits in minutes, and takes half of one to miss a node; in `make test-cluster`
@pytest.mark.timeout(1200)
def test_time_limit_power_cut_and_preemption_change_no_loss(gate: Gate, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nor the samples: both are those of an undisturbed run."""
    recipe = gate.prepared(prepared_run(tmp_path_factory), tmp_path / "run", "s3://oar/faults", SHAPE)
    run, command = Run(load_recipe(recipe)), gate.cluster.command
    cluster = profile(tmp_path, partition="preempt", time="00:03:00", warn_s=90)
    slow = watched(tmp_path, 4.0)  # longer than the limit
    printed = gate.oar("submit", recipe, "--cluster", cluster, "--stages", "pretrain", **slow)
    expected_losses, expected_samples = undisturbed_run(tmp_path_factory)  # while the first attempt uses its time up
    gate.wait_for(run, "stopped with everything saved", 200)
    assert {"SIGUSR1"} == {stopped["reason"] for stopped in events(run, "stopping")}
    command("scontrol", "update", f"JobId={job_id(printed)}", "TimeLimit=30")

    def trained_on() -> None:
        starts, checkpoints = len(events(run, "start")), len(events(run, "checkpoint"))
        wait_for_events(run, "start", starts + 1, lambda: gate.over(run))
        wait_for_events(run, "checkpoint", checkpoints + 1, lambda: gate.over(run))

    watched(tmp_path, 2.0)  # what happens to it below comes before its last step
    trained_on()
    dev_slurm.lose_node(gate.cluster, "n2")
    deadline = time.monotonic() + 800
    while "down" not in command("sinfo", "--noheader", "--nodes=n2", "--format=%T"):
        assert time.monotonic() < deadline, "nobody misses n2"
        time.sleep(1)
    dev_slurm.restart_node(gate.cluster, "n2")
    trained_on()
    command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    gate.wait_for(run, "attempt 3, on")
    watched(tmp_path, 0)
    state = gate.wait(run, 800)
    assert "COMPLETED" in state, state + job_logs(run)
    assert int(re.findall(r"came back (\d+) times", state)[0]) >= 3
    assert max_difference(losses(run), expected_losses) < 1e-5
    assert samples(tmp_path) == expected_samples
