"""``oar compare``: the arms of runs side by side."""

from __future__ import annotations

import argparse

from oar_scale.cli.common import Subparsers
from oar_scale.text import say


def add(verbs: Subparsers) -> None:
    """Add ``oar compare``."""
    text = "arms and seeds of runs side by side: means, intervals, differences to the control"
    verb = verbs.add_parser("compare", help=text, description=text)
    verb.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, or its recipe")
    verb.add_argument("--json", metavar="FILE", help="write the figures as well, with the curves of each training")
    verb.add_argument(
        "--anyway", action="store_true", help="also where runs differ in more than the orders; such rows are marked, and say in what"
    )
    verb.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from oar_scale.studies.compare_runs import run_compare_runs

    for line in run_compare_runs(arguments.runs, out=arguments.json, anyway=arguments.anyway):
        say(line)
