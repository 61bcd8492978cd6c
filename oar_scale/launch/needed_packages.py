"""The first command of a chain of jobs: ``python -m oar_scale.launch.needed_packages RECIPE STAGE...`` fails where a package is missing.

The environment of the nodes may be another one than that of the shell that submits (a container, ``setup``), and the stage that needs the
package may come days later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection

from oar_scale.config import extras
from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.launch.profile import RayProfile, SlurmProfile
from oar_scale.observe.run_location import RunLocation


def check_packages(recipe: Recipe, stages: Collection[str]) -> None:
    """Raise UserError where this environment lacks a package that one of these stages needs, and that stage is not finished.

    Args:
        stages: none: those of the recipe.
    """
    extras.check_packages(recipe, stages or [stage.name for stage in recipe.stages()], lambda stage: stage in _finished(recipe))


def _finished(recipe: Recipe) -> set[str]:
    """The stages of the recipe's run that are finished; none where its storage does not answer here, which the job itself may reach."""
    run = RunLocation(recipe.name, os.path.join(os.path.abspath(recipe.local_dir), "events"), recipe.root)
    try:
        return {name for name, stage in run.finished().items() if stage.stale is None}
    except (UserError, OSError):
        return set()


def is_environment_of(profile: SlurmProfile | RayProfile) -> bool:
    """Whether the jobs of a profile run in the environment of this process, as far as one can tell from the profile."""
    if isinstance(profile, RayProfile) or profile.container is not None:
        return False
    return not profile.setup or any(f"{sys.prefix}/bin/" in line for line in profile.setup)


if __name__ == "__main__":
    try:
        check_packages(load_recipe(sys.argv[1]), sys.argv[2:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
