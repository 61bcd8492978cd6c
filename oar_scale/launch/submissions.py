"""The record of what was submitted for a run: ``RUN/jobs.json``, and beside it a folder for each job with its script and its logs.

RUN/jobs.json
RUN/jobs/recipe-1.yaml             the recipe as it was submitted, first time
RUN/jobs/excluded                  nodes that failed their check
RUN/jobs/holder                    the lease of the run: the job and attempt that may work on it
RUN/jobs/1-pretrain/job.sbatch     what sbatch got
                    42.log         output of the job's shell
                    42.0/          logs of the first attempt: driver.log, ray-NODE.log; done-N where command N has succeeded; 42.1/ the next
                    42.failures    attempts in a row that failed
                    42.reached     progress fingerprint of the run at the last stop
                    42.avoided     a node that failed its check when there was no other node to compare
                    42.holder      instead of holder, the lease of a task of an array
                    42.outcome     how it ended
                    setup-failed   a task of an array has reported that a line of setup failed: the others need not
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import IO

from oar_scale.errors import UserError
from oar_scale.json_object import parse_json
from oar_scale.storage.local import atomic_file
from oar_scale.storage.own_folder import no_follow


@dataclass
class Job:
    """One job of the scheduler."""

    name: str
    stages: list[str]
    """Empty: the whole pipeline."""
    id: str
    folder: str
    """Relative to the run's."""
    after: str | None = None
    """The id of the job that it waits for."""

    def outcomes(self, run_dir: str) -> list[str]:
        """The recorded outcome of the job, or of each task of an array; empty for a task that recorded none.

        Args:
            run_dir: the run's folder.
        """
        folder = os.path.join(run_dir, self.folder)
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        tasks = dict.fromkeys(name.split(".")[0] for name in names if name.split(".")[0].split("_")[0] == self.id)
        return [_content(os.path.join(folder, f"{task}.outcome")) for task in tasks]

    def recorded_done(self, run_dir: str) -> bool:
        """Whether the job has recorded that it is done; never of an array, whose tasks may not all have begun."""
        return _content(os.path.join(run_dir, self.folder, f"{self.id}.outcome")) == "done"


@dataclass
class Submission:
    """The jobs of one ``oar submit``."""

    number: int
    time: float
    kind: str
    cluster: str
    """Path of the cluster profile."""
    overrides: list[str]
    recipe: str
    """Copy of the recipe, relative to the run's folder."""
    stages: list[str] | None
    where: str
    """Address of the scheduler: SLURM_CONF, or the URL of a Ray cluster."""
    folder: str
    """The folder to which relative paths of the recipe refer."""
    jobs: list[Job] = field(default_factory=list)


def _content(path: str) -> str:
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def read_submissions(run_dir: str) -> list[Submission]:
    """All submissions of a run, oldest first; empty where there are none. Raises UserError where ``jobs.json`` is damaged."""
    path = os.path.join(run_dir, "jobs.json")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        try:
            stored = parse_json(file.read())
        except ValueError as error:
            raise UserError(f"{path}: is damaged ({error}). Move it away; its jobs keep running, but are no longer known here.") from error
    try:
        return [Submission(**{**each, "jobs": [Job(**job) for job in each["jobs"]]}) for each in stored]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is no record of submissions ({error}). Move it away; its jobs keep running, but are no longer known here."
        ) from error


def write_submissions(run_dir: str, submissions: list[Submission]) -> None:
    """Replace the record of a run's submissions, atomically."""
    with atomic_file(os.path.join(run_dir, "jobs.json")) as file:
        file.write((json.dumps([asdict(each) for each in submissions], indent=1) + "\n").encode())


@contextmanager
def locked(run_dir: str) -> Iterator[None]:
    """Hold the lock of a run's submissions. If the block raises, folders that were made for it are removed, unless something is in them.

    Raises:
        UserError: another ``oar submit`` of this run holds the lock.
    """
    jobs = os.path.join(run_dir, "jobs")
    lock, absent = os.path.join(jobs, ".lock"), _missing_folders(jobs)
    with _locked_file(lock, run_dir):
        try:
            yield
        except BaseException:  # Ctrl-C as well
            if absent:
                os.unlink(lock)
            with suppress(OSError):  # other runs may have started beside this one
                for folder in absent:
                    os.rmdir(folder)
            raise


def _missing_folders(folder: str) -> list[str]:
    """The folder and those above it that do not exist; the innermost first."""
    missing = []
    while not os.path.exists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def _locked_file(path: str, run_dir: str) -> IO[str]:
    """The lock's file, open and locked. Retries, since a refused submission may remove file and folder between two steps."""
    for tries_left in reversed(range(10)):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = open(path, "w", opener=no_follow)  # noqa: SIM115 (as long as it is locked)
        except FileNotFoundError:
            if not tries_left:
                raise
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            break
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()
    raise UserError(f"{run_dir}: another oar submit works on this run right now. Wait for it, then check: oar jobs {run_dir}")


def last_submission(run_dir: str) -> Submission:
    """The newest submission of a run. Raises UserError where nothing was submitted."""
    submissions = read_submissions(run_dir)
    if not submissions:
        raise UserError(
            f"{run_dir}: no job was submitted for this run (there is no jobs.json). Submit one: oar submit RECIPE --cluster PROFILE"
        )
    return submissions[-1]
