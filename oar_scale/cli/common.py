"""What the verbs share: how one is added, and how a recipe is read."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

from oar_scale.errors import UserError
from oar_scale.registry import MODELS, current_name

if TYPE_CHECKING:
    from oar_scale.config.schema import Recipe

REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: something is left, and the same command goes on with it. A scheduler that sees it starts the command again."""
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verb(verbs: Subparsers, name: str, text: str, function: object, *, needs_recipe: bool = True) -> argparse.ArgumentParser:
    """Add ``oar NAME RECIPE [-o KEY=VALUE ...]``, which calls ``function`` with the arguments."""
    verb = verbs.add_parser(name, help=text, description=text)
    verb.add_argument("recipe", nargs=None if needs_recipe else "?", help="a YAML file, e.g. recipes/quickstart.yaml")
    verb.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change a field of the recipe")
    verb.set_defaults(run=function)
    return verb


def add_model(verb: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    """``--model``: one of a run's models, also by the name that an earlier version gave it."""
    verb.add_argument("--model", type=model_name, metavar="NAME", default=default, help=f"{text} ({', '.join(MODELS)}, or an arm's)")


def model_name(text: str) -> str:
    """Parse the name of a model: one that every run has, or ``ARM`` or ``ARM.s1`` of a recipe with arms and seeds."""
    name = current_name(text)
    if not re.fullmatch(r"[a-z0-9_]+(\.s[0-9]+)?", name):
        raise argparse.ArgumentTypeError(f"{text!r} is no model: there are {', '.join(MODELS)}, those of arms, and of seeds NAME.s1, ...")
    return name


def check_stage(recipe: Recipe, name: str, verb: str) -> None:
    """Raise UserError where a recipe has no stage of this name that ``oar VERB`` does."""
    stage = recipe.stage(name)
    if (stage.verb or stage.kind) != verb:
        here = [each.name for each in recipe.stages() if (each.verb or each.kind) == verb]
        raise UserError(f"--stage {name}: oar {verb} does the stages {', '.join(here)} of this recipe.")


def refuse_unused(verb: argparse.ArgumentParser, arguments: argparse.Namespace, names: Iterable[str], way: str) -> None:
    """Raise UserError where an option of ``verb`` is given that does nothing in this way: "--images means nothing without --compare"."""
    for name in names:
        if getattr(arguments, name) not in (verb.get_default(name), []):
            option = "a caption" if name == "captions" else f"--{name.removeprefix('of_').replace('_', '-')}"
            raise UserError(f"{option} means nothing {way}: leave it out")


def count(text: str) -> int:
    """Parse a number of things: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def minutes(text: str) -> float:
    """Parse a time in minutes: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes")
    return value


def seed(text: str) -> int:
    """Parse a seed: an integer of 64 bits."""
    if not re.fullmatch("-?[0-9]{1,19}", text) or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from -2^63 to 2^63 - 1")
    return int(text)


def share(text: str) -> float:
    """Parse a share of a whole: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def port(text: str) -> int:
    """Parse a port to listen on; 0 is any that is free."""
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to 65535")
    return int(text)


def load(arguments: argparse.Namespace) -> Recipe:
    """The recipe, before torch is imported: a typing error is answered at once."""
    from oar_scale.config.loading import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides)
