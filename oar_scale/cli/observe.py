"""``oar status`` and ``oar tail``: look at a run from outside. They import neither torch nor Ray."""

from __future__ import annotations

import argparse
import os
import sys

from oar_scale.cli.common import Subparsers, count
from oar_scale.cli.submit import job_line
from oar_scale.errors import UserError
from oar_scale.text import say

RUN = "a run's folder, its recipe (.yaml), or its storage (s3://bucket/prefix)"


def add(verbs: Subparsers) -> None:
    """Add ``oar status`` and ``oar tail``."""
    text = "one screen: progress, speed, checkpoints, restarts, alerts, and its jobs on a cluster"
    status = verbs.add_parser("status", help=text, description=text)
    status.add_argument("target", metavar="RUN", help=RUN)
    status.set_defaults(run=_status)
    text = "the events of a run as lines"
    tail = verbs.add_parser("tail", help=text, description=text)
    tail.add_argument("target", metavar="RUN", help=RUN)
    tail.add_argument("-n", dest="count", type=count, default=20, metavar="N", help="the last N events; default: %(default)s")
    tail.add_argument("-f", dest="follow", action="store_true", help="follow new events, until Ctrl-C")
    tail.add_argument("--kind", action="append", default=[], metavar="K", help="only events of this kind; may be repeated")
    tail.set_defaults(run=_tail)


def _status(arguments: argparse.Namespace) -> None:
    from oar_scale.observe.run_location import find_run
    from oar_scale.observe.status import status

    submitted = _submitted(arguments.target)
    try:
        say(status(find_run(arguments.target)).removesuffix("\n"))
    except UserError as error:
        if not submitted:
            raise
        say(str(error).partition("\n")[0])
    if submitted:
        say("\n".join(["", *_job_lines(arguments.target)]))


def _submitted(run: str) -> bool:
    """Whether jobs of the run were submitted to a cluster; only then it is worth the imports to ask."""
    if run.endswith((".yaml", ".yml")):
        from oar_scale.config.loading import load_recipe

        run = load_recipe(run).local_dir
    return not run.startswith("s3://") and os.path.exists(os.path.join(run, "jobs.json"))


def _job_lines(run: str) -> list[str]:
    """The scheduler's state of the run's jobs. A scheduler that does not answer is reported, and the run is shown without it."""
    from oar_scale.launch import find_jobs

    try:
        return [job_line(status) for status in find_jobs(run)]
    except UserError as error:
        return [f"its jobs: {error}"]


def _tail(arguments: argparse.Namespace) -> None:
    from oar_scale.observe.run_location import find_run
    from oar_scale.observe.tail import tail

    try:
        for text in tail(find_run(arguments.target), arguments.count, arguments.kind, arguments.follow):
            say(text)
    except KeyboardInterrupt:
        pass  # how one leaves -f
    except BrokenPipeError:  # oar tail RUN | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
