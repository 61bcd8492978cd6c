"""Submit a recipe to Slurm or to a Ray cluster, and follow, cancel or resubmit its jobs.

    submit("recipes/imagenet.yaml", "cluster/slurm/gpu.yaml")         -> Submission, recorded in RUN/jobs.json
    find_jobs("runs/imagenet")                                        -> the jobs of the run and their states
    cancel("runs/imagenet"); resubmit("runs/imagenet")

A job runs the same ``oar`` commands as a laptop does. It adds the allocation, a Ray cluster across its nodes, and a rule for each way
in which an attempt may end: done, requeue, retry after a pause, or fail (docs/launching.md).
"""

from oar_scale.launch.jobs import JobStatus, cancel, dry_run, find_jobs, resubmit, submit
from oar_scale.launch.logs import logs
from oar_scale.launch.submissions import Job, Submission

__all__ = ["Job", "JobStatus", "Submission", "cancel", "dry_run", "find_jobs", "logs", "resubmit", "submit"]
