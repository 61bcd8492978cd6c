"""A run on a real Ray cluster of node processes, through the Jobs API: it outlives a node and a cancellation, and errors leave nothing."""

from __future__ import annotations

import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic_runs import (
    SHAPE,
    events,
    losses,
    max_difference,
    prepared_run,
    recipe_file,
    samples,
    undisturbed_run,
    wait_for_events,
    watched,
)
from ruamel.yaml import YAML
from small_run import copy_run

from cluster.dev import ray as dev_ray
from oar_scale.cli import main
from oar_scale.config.loading import load_recipe
from oar_scale.launch import ray_entry
from oar_scale.launch.submissions import last_submission

ROOT = Path(__file__).resolve().parents[2]


def oar(cluster: dev_ray.Cluster, *arguments: str, code: int = 0, **variables: str) -> str:
    """What ``oar`` says in a shell that points at the cluster; a process, because Ray reads its token once in the life of one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-m", "oar_scale.cli", *arguments],
        env={**env, **cluster.env, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def profile(folder: Path, cluster: dev_ray.Cluster, **fields: Any) -> str:
    path = folder / "profile.yaml"
    with open(path, "w") as file:
        YAML().dump({"type": "ray", "address": cluster.url, "working_dir": None, "backoff_s": 1, **fields}, file)
    return str(path)


def jobs_known(cluster: dev_ray.Cluster) -> str:
    request = urllib.request.Request(f"{cluster.url}/api/jobs/", headers={"Authorization": f"Bearer {cluster.token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def test_a_ray_job_survives_a_lost_node_and_a_cancellation(
    ray_cluster: dev_ray.Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Training continues with the workers that are left, and a resubmitted job resumes where the cancelled one stopped."""
    run = copy_run(prepared_run(tmp_path_factory), str(tmp_path / "run"), **SHAPE)
    (tmp_path / "code").mkdir()
    watched(tmp_path / "code", 4.0, first=7)  # the working dir of a job is on the path of all its processes
    cluster = profile(tmp_path, ray_cluster, working_dir=str(tmp_path / "code"), excludes=["seen-*"], placement="SPREAD")
    output = oar(ray_cluster, "submit", recipe_file(run), "--cluster", cluster, "--stages", "pretrain")
    assert (match := re.fullmatch(r"submitted pretrain as job (small-1-\w+)\n", output))

    def ended() -> str | None:
        """Asked seldom: each time is a new process."""
        if time.monotonic() < ended_requests[0]:
            return None
        ended_requests[0] = time.monotonic() + 20
        state = oar(ray_cluster, "jobs", run.local())
        return None if "RUNNING" in state else state + oar(ray_cluster, "logs", run.local())

    ended_requests = [time.monotonic() + 20]
    wait_for_events(run, "checkpoint", 1, ended)
    assert "already" in oar(ray_cluster, "submit", recipe_file(run), "--cluster", cluster, code=2)
    dev_ray.lose_node(ray_cluster.nodes[-1])
    watched(tmp_path / "code", 4.0, first=17)
    wait_for_events(run, "start", 2, ended)
    wait_for_events(run, "checkpoint", 3, ended)
    assert oar(ray_cluster, "cancel", run.local()) == f"cancelled pretrain ({match[1]})\n"
    assert "CANCELLED" in oar(ray_cluster, "jobs", run.local())
    stopped = events(run, "stopping")[-1]
    assert stopped["reason"] == "SIGTERM"
    assert [event["world_size"] for event in events(run, "start")] == [2, 1]

    dev_ray.wait_for_nodes(ray_cluster, 1)  # or the lost one might be counted still
    dev_ray.add_node(ray_cluster, cpus=1)
    dev_ray.wait_for_nodes(ray_cluster, 2)
    watched(tmp_path / "code", 0)
    assert "submitted pretrain as job small-2-" in oar(ray_cluster, "resubmit", run.local())
    log = oar(ray_cluster, "logs", "-f", run.local())
    assert "oar train --stage pretrain" in log and "INFO" not in log.partition("Running entrypoint")[2]
    assert "COMPLETED" in oar(ray_cluster, "jobs", run.local())
    last = events(run, "start")[-1]
    assert (last["world_size"], last["start_step"]) == (2, stopped["step"]), "nothing was done twice"
    assert "are done" in oar(ray_cluster, "resubmit", run.local(), code=2)

    expected_losses, expected_samples = undisturbed_run(tmp_path_factory)
    assert max_difference(losses(run), expected_losses) < 1e-5
    assert samples(tmp_path / "code") == expected_samples


def test_an_environment_that_fails_is_reported_and_cleaned_up(ray_cluster: dev_ray.Cluster, tmp_path: Path) -> None:
    """The error has the cluster's own message, and neither the cluster nor the run's folder keeps anything of the job."""
    cluster = profile(tmp_path, ray_cluster, working_dir="https://127.0.0.1:9/no-such-code.zip")
    error = oar(ray_cluster, "submit", recipe(tmp_path), "--cluster", cluster, code=2)
    assert "the job run could not start" in error and "no-such-code.zip" in error and "Correct `pip`, `working_dir`" in error
    assert "no-such-code.zip" not in jobs_known(ray_cluster)
    assert not (tmp_path / "run").exists()


def test_a_wrong_token_is_refused_with_the_remedy(ray_cluster: dev_ray.Cluster, tmp_path: Path) -> None:
    error = oar(ray_cluster, "submit", recipe(tmp_path), "--cluster", profile(tmp_path, ray_cluster), code=2, RAY_AUTH_TOKEN="wrong")
    assert "Invalid authentication token" in error and "Export RAY_AUTH_TOKEN" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


class Door(http.server.BaseHTTPRequestHandler):
    """Before a head: once a job has been submitted it lets so many requests through, drops the next ``drops``, and is open again then."""

    url: str
    passes: int
    drops: int

    def do_GET(self) -> None:
        kind = type(self)
        if self.path.startswith("/api/jobs/") or kind.passes < 0:
            kind.passes -= 1
        if kind.passes < 0 and kind.drops > 0:
            kind.drops -= 1
            self.close_connection = True
            return
        data = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
        forwarded = urllib.request.Request(kind.url + self.path, data, headers, method=self.command)
        try:
            answered = urllib.request.urlopen(forwarded, timeout=20)
        except urllib.error.HTTPError as refusal:
            answered = refusal
        with answered as answer:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            self.wfile.write(answer.read())

    do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def door(ray_cluster: dev_ray.Cluster) -> Iterator[tuple[type[Door], str]]:
    kind = type("ThisDoor", (Door,), {"url": ray_cluster.url, "passes": 1, "drops": 0})
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield kind, f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()
    http_server.server_close()


@pytest.mark.parametrize("drops", [1, 1000], ids=["once", "from then on"])
def test_a_job_whose_head_stops_answering_is_not_lost(
    drops: int, ray_cluster: dev_ray.Cluster, door: tuple[type[Door], str], tmp_path: Path
) -> None:
    """A head that answers again has the job removed; while it does not, the job is recorded, so that it can be cancelled later."""
    kind, url = door
    kind.drops = drops
    cluster = profile(tmp_path, ray_cluster, address=url)
    error = oar(ray_cluster, "submit", recipe(tmp_path), "--cluster", cluster, code=2)
    if drops == 1:
        time.sleep(1.5)  # Ray may write something of the job again
        assert "asking for tried-1-" in error and "tried-1-" not in jobs_known(ray_cluster)
        assert not (tmp_path / "run").exists()
        return
    (job,) = last_submission(str(tmp_path / "run")).jobs
    assert job.id in jobs_known(ray_cluster)
    assert f"Not cancelled: run ({job.id})" in error and f"oar cancel {tmp_path}/run" in error
    kind.drops = 0
    oar(ray_cluster, "cancel", str(tmp_path / "run"))
    assert "RUNNING" not in oar(ray_cluster, "jobs", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({}, ["no Ray answers there", "Connection refused", "Set `address`"]),
        ({"working_dir": "nowhere"}, ["working_dir nowhere", "no such folder"]),
        ({"pass_env": ["OAR_NOT_SET"]}, ["OAR_NOT_SET is not set in this shell"]),
        ({"env": {"MY_API_KEY": "x"}}, ["keys and passwords do not belong in a profile"]),
        ({"env": {"PYTHONPATH": "x"}}, ["PYTHONPATH"]),
        ({"adress": "x"}, ["profile.yaml:", "Did you mean address?"]),
        ({"placement": "TIGHT"}, ["placement", "STRICT_PACK"]),
    ],
)
def test_what_is_wrong_before_anything_is_sent_is_named(
    fields: dict[str, Any], messages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = dev_ray.Cluster("", "", dev_ray.free_port(), True, "")
    assert main(["submit", recipe(tmp_path), "--cluster", profile(tmp_path, nobody, **fields)]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in messages), error
    assert not (tmp_path / "run").exists()


def test_results_that_would_go_with_the_job_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = str(ROOT / "cluster" / "ray" / "dev.yaml")
    assert main(["submit", str(ROOT / "recipes" / "smoke.yaml"), "--cluster", cluster, "--dry-run"]) == 2
    assert "Set storage.root to s3://" in capsys.readouterr().err
    assert main(["submit", str(ROOT / "recipes" / "smoke.yaml"), "--cluster", cluster, "--dry-run", "-p", "folder=/shared/me"]) == 0


def test_a_dry_run_shows_what_would_be_sent_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    nobody = dev_ray.Cluster("", "", 1, True, "")
    fields = {"pass_env": ["AWS_SECRET_ACCESS_KEY"], "pip": ["torch==2.15.0"], "gpu_type": "H100", "placement": "STRICT_PACK"}
    cluster = profile(tmp_path, nobody, driver_resources={"on_demand": 0.001}, working_dir=str(tmp_path), **fields)
    assert main(["submit", recipe(tmp_path), "--cluster", cluster, "--dry-run", "--stages", "pretrain+extract,finetune"]) == 0
    shown = capsys.readouterr().out
    assert "very-secret" not in shown
    request, sent = shown.split("---\n")
    body = YAML(typ="safe").load(request)
    assert body["entrypoint"].endswith("pretrain extract finetune")
    assert body["entrypoint_resources"] == {"on_demand": 0.001}
    assert body["runtime_env"]["pip"] == ["torch==2.15.0"] and body["runtime_env"]["working_dir"] == str(tmp_path)
    (tmp_path / "sent.yaml").write_text(sent)
    parallel = load_recipe(str(tmp_path / "sent.yaml")).parallel
    assert (parallel.gpu_type, parallel.placement) == ("H100", "STRICT_PACK")


@pytest.fixture
def sigterm() -> Iterator[None]:
    """A handler that is gone afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize(
    ("codes", "short_s", "ends", "runs"),
    [
        ([0, 0], 60, 0, 2),
        ([2], 60, 2, 1),
        ([75, 75, 75, 0, 0], 0, 0, 5),
        ([75, 75, 75], 60, 75, 3),
        ([75, 1, 0, 75, 0], 60, 0, 5),
        ([1, 0, 137, 1, 0], 60, 0, 5),
        ([1, 1, 75, 1, 1, 0, 0], 0, 0, 7),
        ([1, 1, 1], 60, 1, 3),
        ([1, 9, 3], 60, 3, 3),
    ],
)
def test_a_command_is_begun_again_only_where_that_may_help(
    codes: list[int], short_s: float, ends: int, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stopped soon after it began, time and again, is a failure; with ``short_s`` 0 none is soon."""
    monkeypatch.setattr(ray_entry, "SHORT_S", short_s)
    program = tmp_path / "python"  # ends with the next of the codes, and writes down how it was called
    program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/called\nexit $(sed -n $(wc -l <{tmp_path}/called)p {tmp_path}/codes)\n')
    program.chmod(0o755)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv(ray_entry.RECIPE, "name: x\n")
    assert ray_entry.main(["--max-failures", "2", "--backoff-s", "0.01", "pretrain", "extract"]) == ends
    lines = (tmp_path / "called").read_text().splitlines()
    called = [line for line in lines if not line.startswith("-m oar_scale.launch.report_failure ")]
    assert len(called) == runs
    assert re.fullmatch(r"-m oar_scale.cli train \S+/recipe.yaml --stage pretrain", called[0])
    if ends == 0:
        assert re.fullmatch(r"-m oar_scale.cli extract \S+/recipe.yaml", called[-1])
    assert len(lines) - len(called) == (ends != 0), "a job that gives up says so, once"


def recipe(folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(f"name: tried\nrun_dir: {folder}/run\n")
    return str(path)
