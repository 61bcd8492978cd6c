"""Which stages of a run are finished, and whether that still counts.

A finished stage leaves ``stages/NAME.json`` (:meth:`Run.marker`), written last:

    settings       the part of the recipe that it depends on, ``section.field`` by name, without operational fields
    fingerprint    a hash of the settings and of the fingerprints in the markers of the stages that it needs
    stale          only where one of these has been done again since, or continued: which one

Under the same fingerprint the stage is finished. Where settings differ, their mark in the recipe decides (``config/section.py``): a
limit never matters to what came to its end; other changeable settings matter to trainings alone, and a training that gets more steps
with them is continued from its last checkpoint. Every other difference is an error, not a silent mix of two recipes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.run_sections import REMOVED_EXTRACT
from oar_scale.config.schema import Recipe
from oar_scale.config.section import Section, changeable_fields, limit_fields, silent_fields
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.registry import Stage
from oar_scale.run.context import Run
from oar_scale.storage import Missing, read_json, write_json

VIEWS_BEFORE: dict[str, object] = {"extract.views": 1, "extract.mirror": False}
"""What there was before recipes had these fields, which trainings read."""
OF_TRAININGS = {"extract": frozenset({"mirror"})}
"""Fields of a section that change nothing about the stage that is named like it, but about trainings on its results."""
_ABSENT = object()


@dataclass(frozen=True)
class Finished:
    """A stage that has been finished."""

    marker: JsonObject
    changes: dict[str, tuple[object, object]]
    """Settings with which it is to be continued: what they were, and what they are. Empty: there is nothing to do."""


def stage_fingerprint(recipe: Recipe, stage: Stage) -> str:
    """The hash of a stage's settings and of the fingerprints of all stages it needs, all of them as the recipe has them."""
    return _fingerprint(stage, stage_settings(recipe, stage), [stage_fingerprint(recipe, each) for each in _needed(recipe, stage)])


def stage_settings(recipe: Recipe, stage: Stage) -> JsonObject:
    """The stage's part of the recipe as plain values, ``section.field`` by name, without operational fields."""
    recipe = recipe.of(stage)
    plain: JsonObject = recipe.model_dump(mode="json")
    chosen: JsonObject = {}
    for section in stage.sections:
        value: JsonObject = plain
        for key in section.split("."):
            value = value[key]
        if VIEWS_BEFORE.get(section, _ABSENT) == value:
            continue  # fingerprints of runs without this field still hold
        config = _section(recipe, section)
        if config is not None:
            silent = silent_fields(config) | OF_TRAININGS.get(section, frozenset())
            chosen |= {f"{section}.{key}": item for key, item in value.items() if key not in silent}
            if section == "extract":
                chosen |= {f"extract.{key}": item for key, item in REMOVED_EXTRACT.items()}  # older versions hashed them
        else:
            chosen[section] = value
    return chosen


def read_finished(run: Run, stage: Stage) -> Finished | None:
    """A finished stage, None if it is not finished.

    Raises:
        UserError: it was finished with other settings, or a stage that it needs has been done again since.
    """
    marker = _read(run, stage)
    if marker is None:
        return None
    if "stale" in marker:
        raise UserError(
            f"stage {stage.name} in {run.at()} is stale: stage {marker['stale']}, which it needs, has been done again or continued since.\n"
            f"Its results are all there. Do it again with: oar run RECIPE --from {stage.name}"
        )
    if marker["fingerprint"] == stage_fingerprint(run.recipe, stage):
        return Finished(marker, {})
    then, now = marker["settings"], stage_settings(run.recipe, stage)
    limits, changeable = _marked(run.recipe, stage)
    changes = {key: (then.get(key), now.get(key)) for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)}
    changes = {key: change for key, change in changes.items() if key not in (limits if stage.training else limits | changeable)}
    if marker["fingerprint"] == _fingerprint(stage, then, _recorded(run, stage)):
        if not changes:
            return Finished(marker, {})
        if changes.keys() <= changeable and _more_steps(stage, changes):
            return Finished(marker, changes)
    raise UserError(_other_settings(run, stage, changes, changeable))


def write_finished(run: Run, stage: Stage, facts: JsonObject) -> None:
    """Write the marker of a finished stage, with what else is to be said of it."""
    settings = stage_settings(run.recipe, stage)
    marker = {"stage": stage.name, "fingerprint": _fingerprint(stage, settings, _recorded(run, stage)), "settings": settings}
    write_json(run.marker(stage.name), {**marker, **facts})


def mark_stale(run: Run, stages: Iterable[Stage], cause: Stage) -> None:
    """Note in the markers of finished stages that ``cause``, which they need, is not what it was; nothing else becomes of them."""
    for stage in stages:
        marker = _read(run, stage)
        if marker is not None:
            write_json(run.marker(stage.name), {"stale": cause.name, **marker})


def dependents(stages: list[Stage], name: str) -> list[Stage]:
    """All stages that need a stage, directly or not."""
    names, found = {name}, list[Stage]()
    for stage in stages:
        if names.intersection(stage.needs):
            names.add(stage.name)
            found.append(stage)
    return found


def _read(run: Run, stage: Stage) -> JsonObject | None:
    try:
        return read_json(run.marker(stage.name))
    except Missing:
        return None


def _needed(recipe: Recipe, stage: Stage) -> list[Stage]:
    return [each for each in recipe.stages() if each.name in stage.needs]


def _recorded(run: Run, stage: Stage) -> list[str]:
    """The fingerprints of the stages that one needs, as they were done."""
    markers = [(each, _read(run, each)) for each in _needed(run.recipe, stage)]
    return [str(marker["fingerprint"]) if marker else stage_fingerprint(run.recipe, each) for each, marker in markers]


def _fingerprint(stage: Stage, settings: JsonObject, needs: list[str]) -> str:
    return fingerprint({"stage": stage.name, "settings": settings, "needs": needs})


def _section(recipe: Recipe, section: str) -> Section | None:
    """A part of the recipe; None for a single field."""
    config: object = recipe
    for key in section.split("."):
        config = getattr(config, key)
    return config if isinstance(config, Section) else None


def _marked(recipe: Recipe, stage: Stage) -> tuple[set[str], set[str]]:
    """The stage's settings that are limits, and those that are changeable."""
    classes = [(section, type(config)) for section in stage.sections if (config := _section(recipe, section)) is not None]
    limits = {f"{section}.{name}" for section, kind in classes for name in limit_fields(kind)}
    return limits, {f"{section}.{name}" for section, kind in classes for name in changeable_fields(kind)}


def _more_steps(stage: Stage, changes: dict[str, tuple[object, object]]) -> bool:
    match changes.get(f"{stage.training}.steps"):
        case (int(then), int(now)):
            return now > then
        case _:
            return False


def _other_settings(run: Run, stage: Stage, changes: dict[str, tuple[object, object]], changeable: set[str]) -> str:
    named = "; ".join(f"{key} was {then!r}, is {now!r}" for key, (then, now) in changes.items()) or "those of a stage it needs"
    steps = f"{stage.training}.steps"
    more = f"continue it with them by more steps (-o {steps}=...), " if changes and changes.keys() <= changeable - {steps} else ""
    return (
        f"stage {stage.name} in {run.at()} was done with other settings: {named}.\n"
        f"Set them back, {more}do it again with --from {stage.name} (replaces its results and all after it), or choose another run_dir."
    )
