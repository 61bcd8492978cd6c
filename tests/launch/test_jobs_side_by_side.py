"""Jobs that share nodes: two runs with a Ray each, and the tasks of a job array."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from elastic_runs import prepared_run, recipe_file
from small_run import copy_run

from cluster.dev.slurm import Cluster
from oar_scale.launch import find_jobs, submit
from oar_scale.launch.jobs import JobStatus
from oar_scale.orders.order_table import read_orders
from oar_scale.storage import open_storage

SMOKE = str(Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml")
LOOKS_AROUND = """#!{python}
import os, tempfile, time, ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
class Worker:
    def job(self):
        print("heard by a worker", flush=True)
        return os.environ["SLURM_JOB_ID"], tempfile.gettempdir()
workers = [Worker.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
jobs, folders = map(set, zip(*ray.get([worker.job.remote() for worker in workers])))
print("nodes", len(ray.nodes()), "jobs", *jobs, flush=True)
print("files in", *folders, tempfile.gettempdir(), flush=True)
open("{folder}/" + os.environ["SLURM_JOB_ID"], "w").close()
while len(os.listdir("{folder}")) < {count}:  # until the others are as far
    time.sleep(0.1)
"""
SLOW_NODE = """#!/bin/bash
if [ "$SLURMD_NODENAME" = n2 ] && mkdir "{folder}/gave-up-$SLURM_JOB_ID" 2>/dev/null; then exit 1; fi
exec {ray} "$@"
"""
"""A ``ray`` that gives up once on one of the nodes, as it does where a node takes longer than half a minute to start."""
WAITS_TO_BE_KILLED = """
import os, sys, time
if sys.orig_argv[2:3] == ["extract"] and os.environ["SLURM_ARRAY_TASK_ID"] == "2" and "SLURM_RESTART_COUNT" not in os.environ:
    time.sleep(1000)
"""
"""A ``sitecustomize``: task 2 of an array, when it is there for the first time."""


def profile(folder: Path, **fields: Any) -> str:
    address = "echo 127.0.0.$((${SLURMD_NODENAME#n} + 1))"
    given = {"type": "slurm", "cpus_per_node": 2, "time": "00:10:00", "warn_s": 60, "object_store_mb": 100, "backoff_s": 1}
    (folder / "profile.yaml").write_text(json.dumps({**given, "node_address": address, "env": {"OMP_NUM_THREADS": "1"}, **fields}))
    return str(folder / "profile.yaml")


def wait(run: Path, seconds: float) -> list[JobStatus]:
    deadline = time.monotonic() + seconds
    while True:
        statuses = find_jobs(str(run))
        if all(status.over for status in statuses):
            return statuses
        assert time.monotonic() < deadline, f"{statuses}\n{job_logs(run)}"
        time.sleep(0.5)


def job_logs(run: Path) -> str:
    return "".join(path.read_text() for path in sorted(run.glob("jobs/*/**/*.log")))


def test_two_runs_on_the_same_nodes_each_have_a_ray_of_their_own(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "seen").mkdir()
    program = tmp_path / "bin" / "oar"
    program.write_text(LOOKS_AROUND.format(python=sys.executable, folder=tmp_path / "seen", count=2))
    program.chmod(0o755)
    (tmp_path / "bin" / "ray").write_text(SLOW_NODE.format(folder=tmp_path, ray=os.path.join(os.path.dirname(sys.executable), "ray")))
    (tmp_path / "bin" / "ray").chmod(0o755)
    cluster = profile(tmp_path, nodes=2, setup=[f"export PATH={tmp_path}/bin:$PATH"])
    runs = [tmp_path / "one", tmp_path / 'it\'s "two" at 100%j']
    ids = [submit(SMOKE, cluster, overrides=[f"run_dir={run}"], stages="pretrain").jobs[0].id for run in runs]
    for run, job in zip(runs, ids, strict=True):
        (status,) = wait(run, 800)
        assert status.done, job_logs(run)
        assert re.search(rf"files in (/tmp/oar-{job}-0-\w+/tmp) \1\n", job_logs(run)), job_logs(run)
        assert "TMPDIR" not in job_logs(run) and "srun: error" not in job_logs(run), job_logs(run)
        assert f"nodes 2 jobs {job}\n" in job_logs(run) and (tmp_path / f"gave-up-{job}").is_dir()
        (logs,) = run.glob(f"jobs/1-pretrain/{job}.0")
        assert {path.name for path in logs.glob("ray-*.log")} == {"ray-n1.log", "ray-n2.log"}
        assert [path for path in logs.glob("ray-n?/worker-*.out") if "heard by a worker" in path.read_text()], list(logs.iterdir())
        assert not list(Path("/tmp").glob(f"oar-{job}-*")), "a folder of Ray was left behind"


def test_a_job_array_extracts_all_though_a_task_is_killed(slurm: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = copy_run(prepared_run(tmp_path_factory), str(tmp_path / "run"))
    open_storage(run.model_uri("any_order")).upload(run.model_uri("base"), run.model_uri("any_order"))
    recipe = recipe_file(run, stages=4)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(WAITS_TO_BE_KILLED)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "path")}
    cluster = profile(tmp_path, cpus_per_node=1, stages={"extract": {"array": 4}}, env=environment)
    (job,) = submit(recipe, cluster, stages="extract").jobs
    task_of(job.id, "2", 150).send_signal(signal.SIGKILL)
    (status,) = wait(tmp_path / "run", 800)
    assert status.done and "4 of 4 tasks done" in status.detail, job_logs(tmp_path / "run")
    assert (tmp_path / "run" / "jobs" / "1-extract" / f"{job.id}_2.1").is_dir(), "the killed task did not come back"
    tables = [read_orders(str(path)) for path in sorted((tmp_path / "run" / "orders" / "train").glob("*.parquet"))]
    orders = np.concatenate([table.order_SN for table in tables])
    assert len(orders) == 71 and (np.sort(orders, axis=1) == np.arange(64)).all()


@pytest.mark.slow  # three jobs one after the other, two of them with a Ray of their own
def test_a_chain_of_jobs_runs_from_pretraining_to_evaluation(
    slurm: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = {"evaluate": {"nll_images": 4, "feature_images": 8}, "sample": {"images": 2}, "pipeline": {"control": False}}
    prepared = prepared_run(tmp_path_factory)
    run = copy_run(prepared, str(tmp_path / "run"), parallel={"micro_batch": 8, "precision": "fp32", "workers": 1}, **small)
    shutil.copytree(prepared.at("images"), run.at("images"), dirs_exist_ok=True)
    cluster = profile(tmp_path, cpus_per_node=1, nodes=1, stages={"extract": {"array": 2}})
    chain = submit(recipe_file(run), cluster, stages="pretrain,extract,finetune+evaluate").jobs
    assert [job.after for job in chain] == [None, *(job.id for job in chain[:-1])]
    statuses = wait(tmp_path / "run", 800)
    assert all(status.done for status in statuses), f"{statuses}{job_logs(tmp_path / 'run')}"
    assert "2 of 2 tasks done" in statuses[1].detail
    ended = [os.path.getmtime(run.marker(stage)) for stage in ("pretrain", "extract", "finetune", "evaluate")]
    assert ended == sorted(ended)
    orders = np.concatenate([read_orders(str(path)).order_SN for path in (tmp_path / "run" / "orders" / "train").glob("*.parquet")])
    assert len(orders) == 71 and os.path.exists(run.model_uri("ordered")) and os.path.exists(run.local("evaluation.json"))


def task_of(job: str, task: str, seconds: float) -> psutil.Process:
    """The ``oar`` of an array's task."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            program = process.info["cmdline"] or []  # a Python, oar, and what it is to do; not the shells around it
            if [os.path.basename(word) for word in program[1:3]] != ["oar", "extract"]:
                continue
            with suppress(psutil.Error):  # it has just ended
                variables = process.environ()
                if (variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")) == (job, task):
                    return process
        time.sleep(0.05)
    raise TimeoutError(f"no task {task} of job {job}: {os.listdir('/tmp')}")
