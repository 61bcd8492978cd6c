"""The logs of a run's jobs, the newest attempt's, as one stream of lines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from oar_scale.errors import UserError
from oar_scale.launch.jobs import find_jobs, run_folder
from oar_scale.launch.submissions import Job, last_submission

POLL_S = 0.5
LOOK_S = 10.0
PATIENCE_S = 300.0
"""How long a scheduler may not answer: a controller is restarted, or busy. The lines come from files meanwhile."""


def logs(run: str, *, job: str | None = None, follow: bool = False) -> Iterator[str]:
    """Lines, each with its file's name before it.

    Args:
        run: a run's folder, or its recipe.
        job: a job's name or id; default: the one that wrote last.
        follow: go on with what comes, through requeues, until the jobs are over.

    Raises:
        UserError: nothing was submitted, there is no such job, or its scheduler does not answer for minutes.
    """
    run_dir = run_folder(run)
    submission = last_submission(run_dir)
    if submission.kind == "ray":
        from oar_scale.launch import ray_jobs

        yield from ray_jobs.logs(submission, job, follow)
        return
    chosen = [each for each in submission.jobs if job in (None, each.name, each.id)]
    if not chosen:
        names = ", ".join(f"{each.name} ({each.id})" for each in submission.jobs)
        raise UserError(f"{run_dir}: no job {job!r} in the last submission; it has {names}")
    places: dict[str, int] = {}
    if not follow:
        chosen = [max(chosen, key=lambda each: max((os.path.getmtime(path) for path in _files(run_dir, each)), default=0.0))]
    looked, over, answered = 0.0, False, time.monotonic()
    while True:
        for path in [path for each in chosen for path in _files(run_dir, each)]:
            yield from (f"{os.path.relpath(path, run_dir)}: {line}" for line in _new_lines(path, places))
        if not follow or over:
            return
        if time.monotonic() - looked > LOOK_S:
            looked = time.monotonic()
            try:
                over = all(status.over for status in find_jobs(run_dir) if status.job.id in {each.id for each in chosen})
                answered = looked
            except UserError:
                if looked - answered > PATIENCE_S:
                    raise
        time.sleep(POLL_S)


def _files(run_dir: str, job: Job) -> list[str]:
    """The shell's log and the drivers' of the newest attempts; Ray's own are for who looks closer."""
    folder = os.path.join(run_dir, job.folder)
    if not os.path.isdir(folder):
        return []
    names = sorted(os.listdir(folder))
    shells = [os.path.join(folder, name) for name in names if name.endswith(".log")]
    newest: dict[str, int] = {}
    for name in names:
        task, _, attempt = name.rpartition(".")
        if attempt.isdecimal():
            newest[task] = max(newest.get(task, 0), int(attempt))
    drivers = [os.path.join(folder, f"{task}.{attempt}", "driver.log") for task, attempt in newest.items()]
    return shells + [path for path in drivers if os.path.exists(path)]


def _new_lines(path: str, places: dict[str, int]) -> Iterator[str]:
    """What is new since the last look, whole lines only."""
    with open(path, "rb") as file:
        file.seek(places.get(path, 0))
        for line in file:
            if not line.endswith(b"\n"):
                break
            places[path] = places.get(path, 0) + len(line)
            yield line.decode(errors="replace").rstrip("\n").rsplit("\r", 1)[-1]
