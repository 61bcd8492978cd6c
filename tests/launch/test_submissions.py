"""What is recorded of a submission, and the status of jobs that the scheduler has forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from oar_scale.errors import UserError
from oar_scale.launch import find_jobs
from oar_scale.launch.job_state import JobState
from oar_scale.launch.jobs import _status
from oar_scale.launch.submissions import Job, Submission, last_submission, locked, read_submissions, write_submissions


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
