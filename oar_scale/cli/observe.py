"""``oar status`` and ``oar tail``: look at a run from outside. They import neither torch nor Ray."""

from __future__ import annotations

import argparse
import os
import sys

from oar_scale.cli.common import Subparsers, count

RUN = "a run's folder, its recipe (.yaml), or its storage (s3://bucket/prefix)"


def add(verbs: Subparsers) -> None:
    text = "one screen: progress, speed, checkpoints, restarts, alerts"
    status = verbs.add_parser("status", help=text, description=text)
    status.add_argument("target", metavar="RUN", help=RUN)
    status.set_defaults(run=_status)
    text = "the events of a run as lines"
    tail = verbs.add_parser("tail", help=text, description=text)
    tail.add_argument("target", metavar="RUN", help=RUN)
    tail.add_argument("-n", dest="count", type=count, default=20, metavar="N", help="the last N events; default: %(default)s")
    tail.add_argument("-f", dest="follow", action="store_true", help="go on with what comes, until Ctrl-C")
    tail.add_argument("--kind", action="append", default=[], metavar="K", help="only events of this kind; may be repeated")
    tail.set_defaults(run=_tail)


def _status(arguments: argparse.Namespace) -> None:
    from oar_scale.observe.place import find_run
    from oar_scale.observe.status import status

    print(status(find_run(arguments.target)), end="")


def _tail(arguments: argparse.Namespace) -> None:
    from oar_scale.observe.place import find_run
    from oar_scale.observe.tail import tail

    try:
        for text in tail(find_run(arguments.target), arguments.count, arguments.kind, arguments.follow):
            print(text, flush=True)
    except KeyboardInterrupt:
        pass  # how one leaves -f
    except BrokenPipeError:  # oar tail RUN | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
