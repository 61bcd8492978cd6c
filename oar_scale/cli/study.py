"""``oar study``: which of two pictures do people prefer?"""

from __future__ import annotations

import argparse
import re

from oar_scale.cli.common import Subparsers, count, port, seed, share
from oar_scale.errors import UserError
from oar_scale.text import say

_NAME = r"\w[\w .+-]{0,59}"


def add(verbs: Subparsers) -> None:
    """Add ``oar study`` and its actions."""
    text = "ask people which of two pictures they prefer, blind, in a browser"
    actions = verbs.add_parser("study", help=text, description=text).add_subparsers(metavar="ACTION", required=True)
    _add_build(actions)
    _add_serve(actions)
    _add_results(actions)


def _add_build(actions: Subparsers) -> None:
    text = "make a study of folders with drawings of the same captions"
    build = actions.add_parser("build", help=text, description=text)
    build.add_argument("arms", nargs="+", type=_arm, metavar="NAME=FOLDER", help="what is compared: folders of oar sample, or any pictures")
    build.add_argument("--out", required=True, metavar="STUDY", help="a new folder")
    build.add_argument("--pairs", type=count, metavar="N", help="pairs in all; default: all there are, at most 200")
    build.add_argument(
        "--per-rater", type=count, default=60, metavar="M", help="pairs that one rater is shown at most; default: %(default)s"
    )
    build.add_argument(
        "--checks", type=_number, metavar="K", help="attention checks that each rater is shown as well; default: 10, or as many as fit"
    )
    build.add_argument("--seed", type=seed, default=0, help="of all that is random; default: %(default)s")
    build.add_argument("--question", help="what raters are asked; {caption} stands for the caption")
    build.set_defaults(run=_build)


def _add_serve(actions: Subparsers) -> None:
    text = "show the pairs to raters, on phones or computers, and keep their answers"
    serve = actions.add_parser("serve", help=text, description=text)
    serve.add_argument("study", metavar="STUDY", help="a folder that oar study build has made")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback want a token; default: %(default)s")
    serve.add_argument("--port", type=port, default=8000, help="0: any that is free; default: %(default)s")
    serve.add_argument(
        "--token", help="which raters need, as #token=TOKEN behind the address; better in OAR_SERVE_TOKEN, which nobody else sees"
    )
    serve.set_defaults(run=_serve)


def _add_results(actions: Subparsers) -> None:
    text = "what the answers say: who is preferred, by how much, how sure that is"
    results = actions.add_parser("results", help=text, description=text)
    results.add_argument("places", nargs="+", metavar="STUDY", help="the study's folder; then further copies of it, or their SQLite files")
    results.add_argument("--json", metavar="FILE", help="write the figures there, too")
    results.add_argument(
        "--threshold",
        type=share,
        default=0.85,
        metavar="SHARE",
        help="of the attention checks that raters have to pass; they also have to do better than chance; default: %(default)s",
    )
    results.set_defaults(run=_results)


def _build(arguments: argparse.Namespace) -> None:
    from oar_scale.preference.build import BuildRequest, build_study

    given = {name: value for name, value in vars(arguments).items() if name != "run" and value is not None}
    build_study(BuildRequest(**given), say)


def _serve(arguments: argparse.Namespace) -> None:
    _need_extra("fastapi", "uvicorn")
    from oar_scale.preference.server import StudyRequest, serve_study

    serve_study(StudyRequest(**{name: value for name, value in vars(arguments).items() if name != "run"}), say)


def _results(arguments: argparse.Namespace) -> None:
    _need_extra("evalica", "pandas", "scipy")
    from oar_scale.preference.results import study_results

    study_results(arguments.places, arguments.threshold, arguments.json, say)


def _need_extra(*packages: str) -> None:
    from importlib.util import find_spec

    for name in packages:
        if find_spec(name) is None:
            raise UserError(f"oar study needs the package {name}: pip install 'oar_scale[study]'")


def _arm(text: str) -> tuple[str, str]:
    name, separator, folder = text.partition("=")
    if not separator or not folder or not re.fullmatch(_NAME, name):
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=FOLDER, the name of letters, digits and blanks")
    return name, folder


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) > 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 1000")
    return int(text)
