"""A run resumes after a mistake that was fixed, and on another cluster when its own is gone; its status is shown before it starts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cluster.dev import ray as dev_ray
from cluster.dev.slurm import Cluster
from oar_scale.cli import main
from oar_scale.launch import JobStatus, cancel, find_jobs
from oar_scale.launch.submissions import Job, Submission, read_submissions, write_submissions
from oar_scale.observe.events import EventLog

SMOKE = str(Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml")


def profile(folder: Path, **fields: object) -> str:
    given = {"type": "slurm", "partition": "main", "cpus_per_node": 1, "time": "00:05:00", "warn_s": 30, **fields}
    (folder / "profile.yaml").write_text(json.dumps(given))
    return str(folder / "profile.yaml")


def submitted_elsewhere(run: Path, kind: str, where: str, cluster: str) -> None:
    """The record of two jobs at a cluster that is gone; the first was done."""
    (run / "jobs" / "1-data").mkdir(parents=True)
    (run / "jobs" / "1-data" / "41.log").touch()
    (run / "jobs" / "1-data" / "41.outcome").write_text("done\n")
    (run / "jobs" / "recipe-1.yaml").write_text(f"name: gone\nrun_dir: {run}\n")
    jobs = [Job("data", ["data"], "41", "jobs/1-data"), Job("tokens", ["tokens"], "42", "jobs/1-tokens", "41")]
    write_submissions(str(run), [Submission(1, 0.0, kind, cluster, [], "jobs/recipe-1.yaml", ["data", "tokens"], where, str(run), jobs)])


def begun(run: Path) -> None:
    with EventLog(str(run / "events"), "pretrain") as log:
        log.emit("start", steps=100, start_step=0, world_size=2)


def ended(run: Path) -> JobStatus:
    deadline = time.monotonic() + 800
    while not (status := find_jobs(str(run))[0]).over:
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    return status


def test_forget_moves_a_run_away_from_a_ray_that_is_gone(slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without ``--forget`` it is refused; a job that lives is never forgotten."""
    run, head = tmp_path / "run", f"http://127.0.0.1:{dev_ray.free_port()}"
    submitted_elsewhere(run, "ray", head, "/gone/ray.yaml")
    command = ["submit", SMOKE, "--cluster", profile(tmp_path, sbatch=["--hold"]), "-o", f"run_dir={run}"]
    assert main(command) == 2
    output = capsys.readouterr().err
    assert f"{head}: no Ray answers there" in output and f"{run}/jobs.json" in output and "oar submit --forget" in output
    assert len(read_submissions(str(run))) == 1
    assert main([*command, "--forget"]) == 0
    assert [each.kind for each in read_submissions(str(run))] == ["ray", "slurm"]
    capsys.readouterr()
    assert main([*command, "--forget"]) == 2, "a job that lives is not forgotten"
    assert "submitted already: run (" in capsys.readouterr().err
    cancel(str(run))


def test_resubmit_forget_repeats_what_a_lost_slurm_left_undone(slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    submitted_elsewhere(run, "slurm", str(tmp_path / "gone.conf"), profile(tmp_path, sbatch=["--hold"]))
    assert main(["resubmit", str(run)]) == 2
    output = capsys.readouterr().err
    assert f"{run}/jobs.json" in output and f"submitted to {tmp_path}/gone.conf" in output and "oar resubmit --forget" in output
    assert main(["resubmit", str(run), "--forget"]) == 0
    assert [job.name for job in read_submissions(str(run))[-1].jobs] == ["tokens"]
    cancel(str(run))


def test_submit_takes_the_corrected_recipe_and_resubmit_the_old(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: Path
) -> None:
    """After a job has failed because of its recipe, ``resubmit`` fails again and ``submit`` with the correction succeeds."""
    (tmp_path / "behaviour").write_text('grep -q "^seed: 7$" "$2" || exit 2\n')
    monkeypatch.setenv("BEHAVIOUR", str(tmp_path / "behaviour"))
    run, cluster = tmp_path / "run", profile(tmp_path, env={"PATH": f"{stub}:{os.environ['PATH']}"})
    command = ["submit", SMOKE, "--cluster", cluster, "--stages", "data", "-o", f"run_dir={run}"]
    assert main(command) == 0
    assert ended(run).state == "FAILED"
    assert main(["resubmit", str(run)]) == 0
    assert ended(run).state == "FAILED"
    assert main([*command, "-o", "seed=7"]) == 0
    assert ended(run).done
    assert [each.recipe for each in read_submissions(str(run))] == [f"jobs/recipe-{number}.yaml" for number in (1, 2, 3)]


def test_status_shows_jobs_before_a_run_starts_and_afterwards(slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["submit", SMOKE, "--cluster", profile(tmp_path, sbatch=["--hold"]), "-o", f"run_dir={run}", "--stages", "pretrain"]) == 0
    (job,) = read_submissions(str(run))[-1].jobs
    capsys.readouterr()
    assert main(["status", str(run)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "it has not begun" in first and rest == ["", f"{'pretrain':24} {job.id:>12}  PENDING      waits: JobHeldUser"]
    begun(run)
    assert main(["status", str(run)]) == 0
    output = capsys.readouterr().out
    assert (
        output.startswith(f"{run}\n")
        and "pretrain   starting" in output
        and output.endswith(f"{job.id:>12}  PENDING      waits: JobHeldUser\n")
    )
    cancel(str(run))


def test_status_shows_a_run_whose_cluster_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submitted_elsewhere(tmp_path, "ray", f"http://127.0.0.1:{dev_ray.free_port()}", "/gone/ray.yaml")
    begun(tmp_path)
    assert main(["status", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "pretrain   starting" in output and "its jobs: http://127.0.0.1:" in output and "no Ray answers there" in output
