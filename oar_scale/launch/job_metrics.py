"""``oar jobs RUN ... --metrics``: what the scheduler says about runs, as Prometheus reads it.

A driver's own ``/metrics`` begin when its job runs and end with it. What lies before, between and after (a job that waits in the queue,
one that failed for good) only the scheduler knows. A cron job writes this text to where node_exporter's textfile collector reads it;
every call asks anew, and nothing is kept in between.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from oar_scale.config.loading import load_recipe
from oar_scale.errors import UserError
from oar_scale.launch.jobs import JobStatus, find_jobs, run_folder
from oar_scale.launch.submissions import Submission, read_submissions

log = logging.getLogger(__name__)

JOB_METRICS = {
    "oar_job_failed": "1: the job has failed and does not come back; one that was cancelled, or is forgotten without a word, has not.",
    "oar_job_pending_seconds": "Time that the job has waited in the queue, now that nothing of its own run holds it up.",
}


def job_metrics(runs: Sequence[str]) -> str:
    """The metrics of the last submission of each run; a run without one is left out, and one whose scheduler is silent is a warning.

    Args:
        runs: folders or recipes.
    """
    registry = CollectorRegistry()
    failed = Gauge("oar_job_failed", JOB_METRICS["oar_job_failed"], ["run", "name", "job", "state"], registry=registry)
    pending = Gauge("oar_job_pending_seconds", JOB_METRICS["oar_job_pending_seconds"], ["run", "name", "job"], registry=registry)
    for run in runs:
        run_dir = run_folder(run)
        try:
            submissions = read_submissions(run_dir)
            if not submissions:
                continue
            recipe = load_recipe(os.path.join(run_dir, submissions[-1].recipe)).name
            statuses = find_jobs(run, believe_done=True)  # Slurm is not asked every minute about all that ever ran
        except (UserError, OSError) as error:  # the other runs are still to be told of
            log.warning("%s: %s", run, error)
            continue
        for status in statuses:
            labels = (recipe, status.job.name, status.job.id)
            failed.labels(*labels, status.state).set(_failed(status, run_dir))
            since = _pending_since(status, statuses, submissions[-1], run_dir)
            if since is not None:
                pending.labels(*labels).set(max(0.0, time.time() - since))
    return generate_latest(registry).decode()


def _failed(status: JobStatus, run_dir: str) -> bool:
    """Whether a job has failed for good. A job that the scheduler has forgotten may have been cancelled: it has failed if it said so."""
    if status.state == "UNKNOWN":
        return any(each.startswith("failed") for each in status.job.outcomes(run_dir))
    return status.over and not status.done and status.state != "CANCELLED"


def _pending_since(status: JobStatus, statuses: Sequence[JobStatus], submission: Submission, run_dir: str) -> float | None:
    """When a job began to wait: submitted, set free by the job before it, or put back by its last attempt. None: it does not wait."""
    before = next((each for each in statuses if each.job.id == status.job.after), None)
    if status.state != "PENDING" or (before is not None and not before.over):
        return None
    folders = [Path(run_dir, each.job.folder) for each in (status, before) if each is not None]
    return max([submission.time, *(path.stat().st_mtime for folder in folders for path in folder.glob("**/*") if path.is_file())])
