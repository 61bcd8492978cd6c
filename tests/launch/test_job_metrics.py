"""What Prometheus gets from the scheduler: jobs that wait, jobs that do not come back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oar_scale.cli import main
from oar_scale.errors import UserError
from oar_scale.launch import find_jobs, job_metrics, slurm
from oar_scale.launch.job_state import JobState
from oar_scale.launch.submissions import Job, Submission, write_submissions

NOW = 1_800_000_000.0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chain of three jobs that were submitted a day ago."""
    jobs = [
        Job(name, [name], str(40 + n), f"jobs/1-{name}", after=str(39 + n) if n else None)
        for n, name in enumerate(("pretrain", "extract", "finetune"))
    ]
    for job in jobs:
        folder = tmp_path / job.folder
        folder.mkdir(parents=True)
        (folder / "job.sbatch").write_text("#!/bin/bash\n")
        os.utime(folder / "job.sbatch", (NOW - 86400, NOW - 86400))
    (tmp_path / "jobs" / "recipe-1.yaml").write_text("name: emoji\n")
    write_submissions(
        str(tmp_path), [Submission(1, NOW - 86400, "slurm", "/p.yaml", [], "jobs/recipe-1.yaml", None, "", str(tmp_path), jobs)]
    )
    monkeypatch.setattr(job_metrics.time, "time", lambda: NOW)
    return tmp_path


def metrics(capsys: pytest.CaptureFixture[str], *runs: Path) -> dict[str, float]:
    assert main(["jobs", *map(str, runs), "--metrics"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def scheduler(monkeypatch: pytest.MonkeyPatch, *states: str) -> None:
    monkeypatch.setattr(slurm, "states", lambda ids, where: {job: JobState(name) for job, name in zip(ids, states, strict=True)})


def pending(name: str, job: int) -> str:
    return f'oar_job_pending_seconds{{job="{job}",name="{name}",run="emoji"}}'


def failed(name: str, job: int, state: str) -> str:
    return f'oar_job_failed{{job="{job}",name="{name}",run="emoji",state="{state}"}}'


def test_a_job_waits_only_when_none_before_it_holds_it_up(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler(monkeypatch, "PENDING", "PENDING", "PENDING")
    found = metrics(capsys, run, run.parent / "no run")
    assert {name: value for name, value in found.items() if "pending" in name} == {pending("pretrain", 40): 86400}
    (run / "jobs" / "1-pretrain" / "40.outcome").write_text("done\n")
    os.utime(run / "jobs" / "1-pretrain" / "40.outcome", (NOW - 3600, NOW - 3600))
    scheduler(monkeypatch, "PENDING", "PENDING")  # not asked for the first one, which has recorded that it is done
    found = metrics(capsys, run)
    assert {name: value for name, value in found.items() if "pending" in name} == {pending("extract", 41): 3600}


def test_a_failed_job_is_told_and_one_that_was_cancelled_is_not(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler(monkeypatch, "NODE_FAIL", "CANCELLED", "CANCELLED")
    assert metrics(capsys, run) == {
        failed("pretrain", 40, "NODE_FAIL"): 1,
        failed("extract", 41, "CANCELLED"): 0,
        failed("finetune", 42, "CANCELLED"): 0,
    }


def test_a_forgotten_job_has_failed_only_if_it_said_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without accounting Slurm forgets a job after minutes, and with it that it was cancelled."""
    (run / "jobs" / "1-pretrain" / "40.outcome").write_text("failed: Ray did not come up, 4 times in a row\n")
    (run / "jobs" / "1-extract" / "41.outcome").write_text("cancelled\n")
    scheduler(monkeypatch, "UNKNOWN", "UNKNOWN", "UNKNOWN")
    assert metrics(capsys, run) == {
        failed("pretrain", 40, "UNKNOWN"): 1,
        failed("extract", 41, "UNKNOWN"): 0,
        failed("finetune", 42, "UNKNOWN"): 0,
    }


@pytest.mark.parametrize("damaged", ["{", "null", '["a"]', '[{"jobs": [{"x": 1}]}]', '[{"jobs": []}]'])
def test_a_damaged_record_silences_no_other_run(
    damaged: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (run / "broken").mkdir()
    (run / "broken" / "jobs.json").write_text(damaged)
    scheduler(monkeypatch, "NODE_FAIL", "CANCELLED", "CANCELLED")
    assert len(metrics(capsys, run / "broken", run)) == 3
    assert "broken" in caplog.text


def test_a_run_that_is_done_is_not_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By a cron job with all runs of a folder. A task of an array says nothing of the others."""
    for name, outcome in (("1-pretrain/40", "done"), ("1-extract/41_0", "done"), ("1-finetune/42", "failed: x")):
        (run / "jobs" / f"{name}.outcome").write_text(f"{outcome}\n")
    asked: list[str] = []
    monkeypatch.setattr(slurm, "states", lambda ids, where: asked.extend(ids) or dict.fromkeys(ids, JobState("FAILED")))
    assert metrics(capsys, run)[failed("pretrain", 40, "COMPLETED")] == 0
    assert asked == ["41", "42"]
    assert len(find_jobs(str(run))) == 3 and asked[2:] == ["40", "41", "42"], "a second submission is let in by Slurm alone"


def test_a_scheduler_that_is_silent_is_a_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def silent(ids: list[str], where: str) -> dict[str, JobState]:
        raise UserError("no answer from the Slurm controller")

    monkeypatch.setattr(slurm, "states", silent)
    assert metrics(capsys, run) == {}
    assert "no answer from the Slurm controller" in caplog.text
