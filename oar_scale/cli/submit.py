"""``oar submit`` and what follows it: the jobs of a run on a cluster."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from oar_scale.cli.common import Subparsers, add_verb

if TYPE_CHECKING:
    from oar_scale.launch import JobStatus
    from oar_scale.launch.submissions import Submission

RUN = "a run's folder, or its recipe (.yaml)"
FORGET = "where the cluster of the last submission does not answer: treat it and its jobs as gone"


def add(verbs: Subparsers) -> None:
    """Add ``oar submit``, ``jobs``, ``logs``, ``cancel`` and ``resubmit``."""
    submit = add_verb(verbs, "submit", "run a recipe on a Slurm or a Ray cluster", _submit)
    submit.add_argument("--cluster", required=True, metavar="PROFILE", help="a YAML file, e.g. cluster/slurm/gpu.yaml")
    submit.add_argument(
        "--stages", metavar="A,B+C,...", help="a job for each, one after the other; + puts stages into one job. Default: one job for all"
    )
    submit.add_argument("-p", dest="profile", action="append", default=[], metavar="KEY=VALUE", help="change a field of the profile")
    submit.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    submit.add_argument("--forget", action="store_true", help=FORGET)
    for name, text, function in (
        ("jobs", "the jobs of a run and their states", _jobs),
        ("logs", "the logs of a run's jobs", _logs),
        ("cancel", "cancel a run's jobs; what is saved stays", _cancel),
        ("resubmit", "submit what is not done of a run's last submission", _resubmit),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        if name == "jobs":
            verb.add_argument("targets", nargs="+", metavar="RUN", help=RUN)
            verb.add_argument("--metrics", action="store_true", help="as Prometheus reads it, for node_exporter's textfile collector")
        else:
            verb.add_argument("target", metavar="RUN", help=RUN)
        verb.set_defaults(run=function)
        if name == "resubmit":
            verb.add_argument("--forget", action="store_true", help=FORGET)
        if name == "logs":
            verb.add_argument("-f", dest="follow", action="store_true", help="follow new lines, until the jobs are over")
            verb.add_argument("--job", metavar="JOB", help="its name or id; default: the one that wrote last")


def _submit(arguments: argparse.Namespace) -> None:
    from oar_scale.launch import dry_run, submit

    if arguments.dry_run:
        for text in dry_run(arguments.recipe, arguments.cluster, arguments.stages, arguments.overrides, arguments.profile):
            print(text)
        return
    submission = submit(
        arguments.recipe,
        arguments.cluster,
        stages=arguments.stages,
        overrides=arguments.overrides,
        profile_overrides=arguments.profile,
        forget=arguments.forget,
    )
    _show(submission)


def _show(submission: Submission) -> None:
    from oar_scale.launch.slurm_client import ignored_options

    if submission.kind == "slurm" and (ignored := ignored_options(os.environ)):
        print(f"not used, as the profile decides: {', '.join(ignored)} of this shell", file=sys.stderr)
    for job in submission.jobs:
        print(f"submitted {job.name} as job {job.id}" + (f", after {job.after}" if job.after else ""))


def _jobs(arguments: argparse.Namespace) -> None:
    from oar_scale.launch import find_jobs

    if arguments.metrics:
        from oar_scale.launch.job_metrics import job_metrics

        print(job_metrics(arguments.targets), end="")
        return
    for run in arguments.targets:
        for status in find_jobs(run):
            print(job_line(status))


def job_line(status: JobStatus) -> str:
    """A job as a line of ``oar jobs``: name, id, state, detail."""
    return f"{status.job.name:24} {status.job.id:>12}  {status.state:12} {status.detail}".rstrip()


def _logs(arguments: argparse.Namespace) -> None:
    from oar_scale.launch import logs

    try:
        for line in logs(arguments.target, job=arguments.job, follow=arguments.follow):
            print(line, flush=True)
    except KeyboardInterrupt:
        pass  # how one leaves -f
    except BrokenPipeError:  # oar logs RUN | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _cancel(arguments: argparse.Namespace) -> None:
    from oar_scale.launch import cancel

    jobs = cancel(arguments.target)
    print("\n".join(f"cancelled {job.name} ({job.id})" for job in jobs) or "no job of this run is queued or running")


def _resubmit(arguments: argparse.Namespace) -> None:
    from oar_scale.launch import resubmit

    _show(resubmit(arguments.target, forget=arguments.forget))
