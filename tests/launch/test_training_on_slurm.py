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

WARN_S = 180
SLOW_S = 4.0
"""Between steps, where something is to happen before the last one."""
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
        """For :func:`wait_for_events`: the logs once the job has written its outcome, which it takes back where it begins again."""
        return job_logs(run) if list(Path(run.local("jobs")).glob("*/*.outcome")) else None

    def wait(self, run: Run, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while self.over(run) is None or not re.search("|".join(ENDED), self.jobs(run)):
            assert time.monotonic() < deadline, self.jobs(run) + job_logs(run)
            time.sleep(0.5)
        return self.jobs(run)

    def reach_time_limit(self, job: str) -> None:
        """Shorten the limit to what is left of a warning of three minutes, but for a minute: the signal comes with Slurm's next look."""
        *hours, minutes, seconds = self.cluster.command("squeue", "--noheader", f"--jobs={job}", "--format=%M").strip().split(":")
        elapsed_s = int(hours[0] if hours else 0) * 3600 + int(minutes) * 60 + int(seconds)
        self.limit(job, (elapsed_s + 120) // 60 + 1)

    def limit(self, job: str, minutes: int) -> None:
        self.cluster.command("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


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


def profile(folder: Path) -> str:
    """One CPU a node, so that two workers are on two nodes."""
    size = {"type": "slurm", "partition": "preempt", "nodes": 2, "cpus_per_node": 1, "object_store_mb": 100}
    times = {"time": "00:30:00", "warn_s": WARN_S, "backoff_s": 1, "start_s": 600}
    (folder / "profile.yaml").write_text(json.dumps({**size, **times, "env": {"OMP_NUM_THREADS": "1"}}))
    return str(folder / "profile.yaml")


def job_logs(run: Run) -> str:
    """By the shells and the drivers of all attempts."""
    return "".join(
        f"--- {path}\n{path.read_text()}" for path in sorted(Path(run.local("jobs")).glob("*/**/*.log")) if "ray-" not in path.name
    )


def attempts_of(run: Run) -> int:
    return len(re.findall(r", attempt \d+, on ", job_logs(run)))


def job_id(printed: str) -> str:
    match = re.search(r"as job (\d+)", printed)
    assert match is not None, printed
    return match[1]


@pytest.mark.slow  # a Ray of two nodes starts four times, and Slurm takes half a minute to miss a node; in `make test-slow`
@pytest.mark.timeout(1200)
def test_one_submit_reaches_the_report_whatever_befalls_it(gate: Gate, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The time limit, a power cut and a preemption come in the middle of training; losses and samples are those of an undisturbed run."""
    small = {"evaluate": {"nll_images": 4, "feature_images": 8}, "sample": {"images": 2}, "pipeline": {"control": False}}
    shape = {**SHAPE, "parallel": {**SHAPE["parallel"], "workers": 2}, **small}
    recipe = gate.prepared(prepared_run(tmp_path_factory), tmp_path / "run", "s3://oar/flagship", shape)
    run, command = Run(load_recipe(recipe)), gate.cluster.command
    job = job_id(gate.oar("submit", recipe, "--cluster", profile(tmp_path), **watched(tmp_path, SLOW_S, first=7)))
    expected_losses, expected_samples = undisturbed_run(tmp_path_factory)  # while Ray starts

    def began_again(attempts: int) -> None:
        """More attempts than before."""
        deadline = time.monotonic() + 800
        while attempts_of(run) <= attempts:
            assert time.monotonic() < deadline and gate.over(run) is None, gate.jobs(run) + job_logs(run)
            time.sleep(0.2)

    def trained_on() -> None:
        """It goes on quickly to its next checkpoint and a little further."""
        starts, checkpoints = len(events(run, "start")), events(run, "checkpoint")
        watched(tmp_path, SLOW_S, first=checkpoints[-1]["step"] + 7)
        wait_for_events(run, "start", starts + 1, lambda: gate.over(run))
        wait_for_events(run, "checkpoint", len(checkpoints) + 1, lambda: gate.over(run))

    wait_for_events(run, "checkpoint", 1, lambda: gate.over(run))
    gate.reach_time_limit(job)
    wait_for_events(run, "stopping", 1, lambda: gate.over(run))
    gate.limit(job, 30)
    began_again(1)
    assert "stopped with everything saved" in job_logs(run)
    assert {"SIGUSR1"} == {stopped["reason"] for stopped in events(run, "stopping")}

    trained_on()
    attempts = attempts_of(run)
    dev_slurm.lose_node(gate.cluster, "n2")
    deadline = time.monotonic() + 800
    while "down" not in command("sinfo", "--noheader", "--nodes=n2", "--format=%T"):
        assert time.monotonic() < deadline, "nobody misses n2"
        time.sleep(0.5)
    dev_slurm.restart_node(gate.cluster, "n2")
    began_again(attempts)

    trained_on()
    attempts = attempts_of(run)
    command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    began_again(attempts)
    watched(tmp_path, 0)

    state = gate.wait(run, 800)
    assert "COMPLETED" in state and int(re.findall(r"came back (\d+) times", state)[0]) >= 3, state + job_logs(run)
    starts = events(run, "start")
    assert [start["world_size"] for start in (*starts[:2], starts[-1])] == [2, 2, 2]
    assert all(start["start_step"] >= 5 for start in starts[1:])
    assert "Ray has 2 nodes" in job_logs(run)
    assert max_difference(losses(run), expected_losses) < 1e-5
    assert samples(tmp_path) == expected_samples
    assert (Path(run.local()) / "report" / "index.html").stat().st_size > 50_000
    assert not Path(run.local("tokens")).exists(), "the shards belong into S3"
    assert "report" in gate.oar("status", run.local()) and "finished in" in gate.oar("logs", run.local())
