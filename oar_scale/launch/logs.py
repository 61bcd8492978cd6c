"""``oar logs``: the logs of the newest attempts of a run's jobs, as one stream of lines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from oar_scale.errors import UserError
from oar_scale.launch.jobs import find_jobs, run_folder
from oar_scale.launch.submissions import Job, last_submission

POLL_S = 0.5
"""How often the files are read for new lines."""
STATE_POLL_S = 10.0
"""Seconds between two queries to the scheduler whether the jobs are over."""
NO_ANSWER_S = 300.0
"""How long the scheduler may not answer, e.g. because its controller restarts. The lines come from files meanwhile."""


def logs(run: str, *, job: str | None = None, follow: bool = False) -> Iterator[str]:
    """Yield lines, each with its file's name before it.

    Args:
        run: a run's folder, or its recipe.
        job: a job's name or id; default: the one that wrote last.
        follow: wait for new lines, through requeues, until the jobs are over.

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
    offsets: dict[str, int] = {}
    if not follow:
        chosen = [max(chosen, key=lambda each: max((os.path.getmtime(path) for path in _files(run_dir, each)), default=0.0))]
    polled, over, answered = 0.0, False, time.monotonic()
    while True:
        for path in [path for each in chosen for path in _files(run_dir, each)]:
            yield from (f"{os.path.relpath(path, run_dir)}: {line}" for line in _new_lines(path, offsets))
        if not follow or over:
            return
        if time.monotonic() - polled > STATE_POLL_S:
            polled = time.monotonic()
            try:
                over = all(status.over for status in find_jobs(run_dir) if status.job.id in {each.id for each in chosen})
                answered = polled
            except UserError:
                if polled - answered > NO_ANSWER_S:
                    raise
        time.sleep(POLL_S)


def _files(run_dir: str, job: Job) -> list[str]:
    """The log of the job's shell, and the driver logs of the newest attempts; Ray's own logs are not shown."""
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


def _new_lines(path: str, offsets: dict[str, int]) -> Iterator[str]:
    """The whole lines that were added since the last call; ``offsets`` keeps what was read of each file."""
    with open(path, "rb") as file:
        file.seek(offsets.get(path, 0))
        for line in file:
            if not line.endswith(b"\n"):
                break
            offsets[path] = offsets.get(path, 0) + len(line)
            yield line.decode(errors="replace").rstrip("\n").rsplit("\r", 1)[-1]
