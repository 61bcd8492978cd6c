"""Recipes to clusters: one command submits a run to Slurm or to a Ray cluster, and finds it again.

    submit("recipes/imagenet.yaml", "cluster/slurm/gpu.yaml")         -> Submission, written down in RUN/jobs.json
    find_jobs("runs/imagenet")                                        -> the jobs of the run and what has become of them
    cancel("runs/imagenet"); resubmit("runs/imagenet")

A job runs the same ``oar`` commands that a laptop would; what it adds is the allocation, Ray across it, and an answer to each
way in which it may end (docs/launching.md).
"""

from oar_scale.launch.jobs import JobStatus, cancel, dry_run, find_jobs, resubmit, submit
from oar_scale.launch.logs import logs
from oar_scale.launch.submissions import Job, Submission

__all__ = ["Job", "JobStatus", "Submission", "cancel", "dry_run", "find_jobs", "logs", "resubmit", "submit"]
