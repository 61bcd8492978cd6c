"""What is recorded of a submission, and the status of jobs that the scheduler has forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oar_scale.config.loading import load_recipe
from oar_scale.errors import UserError
from oar_scale.launch import find_jobs, jobs, ray_client, ray_jobs
from oar_scale.launch.job_state import JobState
from oar_scale.launch.jobs import _status
from oar_scale.launch.progress_fingerprint import progress_fingerprint
from oar_scale.launch.slurm import _array_state
from oar_scale.launch.submissions import Job, Submission, last_submission, locked, read_submissions, write_submissions
from oar_scale.run.context import Run
from oar_scale.tokenizers.training_file import save_training

SMOKE = str(Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml")


def submission() -> Submission:
    job = Job("extract", ["extract"], "42", "jobs/1-extract", after="41")
    return Submission(1, 0.0, "slurm", "/p.yaml", ["nodes=2"], "jobs/recipe-1.yaml", ["extract"], "/slurm.conf", "/work", [job])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_submissions(str(tmp_path), [submission()])
    assert read_submissions(str(tmp_path)) == [submission()]
    assert last_submission(str(tmp_path)).jobs[0].after == "41"


def test_a_run_without_jobs_and_a_damaged_record_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no job was submitted for this run .* oar submit RECIPE"):
        find_jobs(str(tmp_path))
    (tmp_path / "jobs.json").write_text("[{")
    with pytest.raises(UserError, match=r"jobs.json: is damaged"):
        find_jobs(str(tmp_path))


def test_one_submission_of_a_run_at_a_time(tmp_path: Path) -> None:
    with locked(str(tmp_path)), pytest.raises(UserError, match="another oar submit works on this run"), locked(str(tmp_path)):
        pass


def test_a_forgotten_array_is_done_when_all_its_tasks_are(tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "1-extract"
    for name in ("42_0.0", "42_1.0", "42_1.1"):
        (folder / name).mkdir(parents=True)
    (job,) = submission().jobs
    (folder / "42_0.outcome").write_text("done\n")
    assert not _status(job, str(tmp_path), JobState("UNKNOWN")).done
    (folder / "42_1.outcome").write_text("failed: code 1\n")
    assert _status(job, str(tmp_path), JobState("UNKNOWN")).detail == "failed: code 1"
    (folder / "42_1.outcome").write_text("done\n")
    status = _status(job, str(tmp_path), JobState("UNKNOWN"))
    assert status.done and status.state == "COMPLETED"


def test_a_forgotten_job_that_left_no_word_is_not_done(tmp_path: Path) -> None:
    assert not _status(submission().jobs[0], str(tmp_path), JobState("UNKNOWN")).done


def test_a_failed_task_counts_though_slurm_lists_only_those_that_completed(tmp_path: Path) -> None:
    """Slurm forgets each task MinJobAge (5 min) after its own end."""
    job, folder = Job("extract", ["extract"], "42", "jobs/1-extract"), tmp_path / "jobs" / "1-extract"
    folder.mkdir(parents=True)
    (folder / "42_0.outcome").write_text("failed: failed with code 1, 4 times in a row\n")
    (folder / "42_1.outcome").write_text("done\n")
    status = _status(job, str(tmp_path), JobState("COMPLETED"))
    assert (status.state, status.done, status.over) == ("FAILED", False, True) and "4 times in a row" in status.detail


@pytest.mark.parametrize("other", ["CONFIGURING", "SUSPENDED"])
def test_an_array_with_a_task_that_is_not_over_is_not_over(other: str) -> None:
    assert not JobState(_array_state(["FAILED", other, "COMPLETED"])).over


def test_resubmit_sends_the_folder_that_submit_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(ray_client, "connect", lambda address: None)
    monkeypatch.setattr(ray_client, "start_job", lambda client, request, *_: sent.append(request["runtime_env"]["working_dir"]))
    monkeypatch.setattr(ray_jobs, "states", lambda submission: {job.id: JobState("FAILED") for job in submission.jobs})
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "p.yaml").write_text("type: ray\naddress: http://127.0.0.1:8265\nfolder: /shared\n")
    monkeypatch.chdir(project)
    jobs.submit(SMOKE, "p.yaml", overrides=["run_dir=runs/x"])
    monkeypatch.chdir(elsewhere)
    jobs.resubmit(str(project / "runs" / "x"))
    assert sent == [str(project)] * 2


def test_training_of_the_image_tokenizer_is_progress(tmp_path: Path) -> None:
    run = Run(load_recipe(SMOKE, [f"run_dir={tmp_path}/run"]))
    seen = [progress_fingerprint(run)]
    for step in (100, 200):
        save_training(run.vq_training_uri, {"step": torch.tensor(step)}, "id")
        seen.append(progress_fingerprint(run))
    assert len(set(seen)) == 3 and progress_fingerprint(run) == seen[-1]
