"""What the shell of a Slurm job does by itself, run here with scripts in place of Slurm's programs: whom it tells that it has failed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from oar_scale.config.loading import load_recipe
from oar_scale.launch.job_specs import JobSpec
from oar_scale.launch.jobs import job_files
from oar_scale.launch.profile import Resources, SlurmProfile

ROOT = Path(__file__).resolve().parents[2]
PROFILE = SlurmProfile(type="slurm", cpus_per_node=1, time="00:10:00")
REPORTS = "*oar_scale.launch.report_failure*"


class Job:
    """A job of one stage on the nodes n1 and n2, whose batch shell is on n2."""

    def __init__(self, folder: Path, stage: str, profile: SlurmProfile) -> None:
        self._folder, self.calls = folder, folder / "calls"
        (file,) = job_files(load_recipe(str(ROOT / "recipes" / "smoke.yaml")), profile, [JobSpec((stage,))], folder=str(folder))
        self.logs = folder / "runs" / "smoke" / file.folder
        self.logs.mkdir(parents=True)
        (folder / "job.sbatch").write_text(file.text)
        (folder / "bin").mkdir()
        note = f'echo "${{0##*/}} $*" >> {self.calls}\ncase "$*" in {REPORTS}) exit 0 ;; esac'
        for name, body in {"srun": f"{note}\nexit 2", "python": note, "scontrol": '[ "$2" = job ] || printf "n1\\nn2\\n"'}.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)

    def start(self, **env: str) -> subprocess.Popen[bytes]:
        own = {"PATH": f"{self._folder}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n2"}
        return subprocess.Popen(["bash", str(self._folder / "job.sbatch")], env={"HOME": os.environ["HOME"], **own, **env})

    def reports(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if "oar_scale.launch.report_failure" in line]

    def outcomes(self) -> dict[str, str]:
        return {path.stem: path.read_text() for path in self.logs.glob("*.outcome")}


def test_a_failure_is_reported_from_the_node_of_the_shell(tmp_path: Path) -> None:
    """The first node of the job may be the one that was lost."""
    job = Job(tmp_path, "report", PROFILE)
    assert job.start().wait(60) == 2
    (report,) = job.reports()
    assert "--nodelist=n2 " in report and "--nodelist=n1" not in report
    assert "something to fix" in job.outcomes()["7"]


def test_a_setup_that_fails_in_all_tasks_is_reported_once(tmp_path: Path) -> None:
    job = Job(tmp_path, "extract", PROFILE.model_copy(update={"setup": ("false",), "stages": {"extract": Resources(array=8)}}))
    tasks = [job.start(SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(task)) for task in range(8)]
    assert [task.wait(60) for task in tasks] == [2] * 8
    assert len(job.reports()) == 1
    assert set(job.outcomes()) == {f"7_{task}" for task in range(8)} and all("`false` of setup" in each for each in job.outcomes().values())


@pytest.mark.parametrize("there", [None, "a file"], ids=["absent", "file"])
def test_a_tmp_dir_that_is_not_there_ends_the_job(tmp_path: Path, there: str | None) -> None:
    """At once, instead of after Ray has been waited for in every attempt."""
    tmp_dir = tmp_path / "own"
    if there:
        tmp_dir.write_text(there)
    job = Job(tmp_path, "pretrain", PROFILE.model_copy(update={"tmp_dir": str(tmp_dir)}))
    assert job.start().wait(60) == 2
    assert job.outcomes()["7"].startswith(f"failed: tmp_dir {tmp_dir} is not a folder on n2 that can be written to")
    assert job.calls.read_text().splitlines() == job.reports() and len(job.reports()) == 1
