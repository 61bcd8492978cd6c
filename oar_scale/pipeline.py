"""Runs the stages of a recipe: what is already done, what has to be done again, and what is refused.

A finished stage leaves ``stages/NAME.json``, written last, with the part of the recipe it depends on and a fingerprint of
that and of all it needs. A stage with the same fingerprint is skipped; another fingerprint is an error, not a silent mix of
two recipes. A stage that was interrupted has no such file and resumes from what it finds (checkpoints, ledgers). Doing a
stage again on request removes its results and those of every stage that needs it.

The stages themselves are listed in ``oar_scale.registry``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib import import_module

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.loading import dump_recipe
from oar_scale.config.run_sections import REMOVED_EXTRACT
from oar_scale.config.schema import Recipe
from oar_scale.config.section import Section, operational_fields
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.observe.console import duration
from oar_scale.observe.watch import catch_up, watching
from oar_scale.registry import STAGES, Stage
from oar_scale.run.context import ONE_ORDER, OTHER_LAYOUT, Run
from oar_scale.storage import Missing, join, open_storage, read_json, write_json


def run_pipeline(run: Run, *, start: str | None = None, only: str | None = None) -> None:
    """Run the stages that are not done yet.

    Args:
        start: do this stage and all after it again, whatever is done.
        only: do this one stage again and no other; what it needs must be done.

    Raises:
        UserError: an unknown stage, a stage that needs one which is not done or was done with other settings, or whatever
            a stage cannot work with.
    """
    stages = run.recipe.stages()
    names: list[str] = [stage.name for stage in stages]
    wanted = only or start
    first = None if wanted is None else _stage(run.recipe, wanted)
    check_run_dir(run)
    if first is not None:
        _require(run, first)
        again = names[stages.index(first) :] if only is None else [only, *_dependents(stages, only)]
        _clear(run, [stage for stage in stages if stage.name in again])
    began = time.monotonic()
    with ExitStack() as stack:
        for stage in stages:
            if only in (None, stage.name):
                if stage.ray and _done(run, stage) is None:
                    stack.enter_context(_shared_ray(run.recipe))
                run_stage(run, stage.name, checked=True)
    catch_up(run.events, run.recipe, run.at(), names, run.console.say)
    run.console.say(f"finished in {duration(time.monotonic() - began)}")


def _shared_ray(recipe: Recipe) -> AbstractContextManager[None]:
    """One Ray for all stages, which takes seconds to start and to end; inside it this is the same one again."""
    from oar_scale.runtime.ray_session import ray_session

    parallel, extract = recipe.parallel, recipe.extract
    cpus = max(parallel.max_workers, extract.max_actors) * parallel.cpu_threads
    gpus = parallel.max_workers * parallel.gpus_per_worker
    if extract.gpus_per_actor:
        import torch

        gpus = max(gpus, torch.cuda.device_count())
    return ray_session(cpus, gpus)


def run_stage(run: Run, name: str, *, checked: bool = False) -> None:
    """Run one stage if it is not done yet; it resumes where it was interrupted.

    Args:
        checked: the run's folder and the stages that this one needs have been checked already.

    Raises:
        UserError: as :func:`run_pipeline`.
    """
    stage, stages = _stage(run.recipe, name), run.recipe.stages()
    if not checked:
        check_run_dir(run)
        _require(run, stage)
    label = f"[{stages.index(stage) + 1}/{len(stages)}] {stage.name}"
    done = _done(run, stage)
    if done is not None:
        run.console.say(f"{label}: done before in {duration(done['seconds'])}, skipped")
        return
    run.console.stage(label, stage.title, expected_duration(run.recipe, stage))
    function, arguments = entry_point(stage), (run, stage.name) if stage.training else (run,)
    if run.rank:  # the first process keeps the books for all of them
        function(*arguments)
        return
    bind_run_dir(run)
    started, clock = time.time(), time.monotonic()
    # A training stage is watched where its workers are started, which knows its steps; what several processes share, by the first.
    unwatched = bool(stage.training) or (run.array is not None and run.array.index > 0)
    with nullcontext() if unwatched else watching(run.events, stage.name, run.recipe, run.at(), console=run.console):
        results = function(*arguments)
    seconds = time.monotonic() - clock
    marker = {"stage": stage.name, "fingerprint": stage_fingerprint(run.recipe, stage), "settings": _settings(run.recipe, stage)}
    write_json(run.marker(stage.name), {**marker, "seconds": seconds, "started": started, "results": results})
    run.console.say(f"  {stage.name} took {duration(seconds)}")


def entry_point(stage: Stage) -> Callable[..., JsonObject]:
    """The function that does a stage. Imports its module, and torch or Ray with it."""
    module, _, name = stage.entry.partition(":")
    function: Callable[..., JsonObject] = getattr(import_module(module), name)
    return function


def expected_duration(recipe: Recipe, stage: Stage) -> str:
    """A guess for the console. Training: 20 s to start the workers, then about 35 images/s for each CPU worker at 5 M parameters."""
    if not stage.training:
        return stage.duration
    training = recipe.training(stage.training)
    if not training.steps:
        return "a copy of the given weights"
    seconds = 20 + training.steps * training.global_batch / (35 * recipe.parallel.max_workers)
    return f"about {max(1, round(seconds / 60))} min on CPU workers"


def check_run_dir(run: Run) -> None:
    """Refuse a folder that another recipe's run lives in.

    Raises:
        UserError: names the field in which the two recipes differ.
    """
    try:
        there = read_json(join(run.local(), "run.json"))
    except Missing:
        return
    for field, value in _run_identity(run).items():
        if there.get(field) != value:
            raise UserError(
                f"{run.local()}: this folder belongs to another run: {field} was {there.get(field)!r}, the recipe says {value!r}.\n"
                "Choose another folder with -o run_dir=..., or delete this one."
            )


def bind_run_dir(run: Run) -> None:
    """Write ``run.json``, which says whose folder it is, and the recipe as it is used."""
    write_json(join(run.local(), "run.json"), _run_identity(run))
    recipe = join(run.local(), "recipe.yaml")
    open_storage(recipe).write(recipe, dump_recipe(run.recipe).encode())


def stage_fingerprint(recipe: Recipe, stage: Stage) -> str:
    """The hash of a stage's settings and of the fingerprints of all stages it needs."""
    needed = [stage_fingerprint(recipe, each) for each in recipe.stages() if each.name in stage.needs]
    return fingerprint({"stage": stage.name, "settings": _settings(recipe, stage), "needs": needed})


def _stage(recipe: Recipe, name: str) -> Stage:
    """The stage of that name. Raises UserError where the recipe has none: why, and which stages it has."""
    stages = recipe.stages()
    for stage in stages:
        if stage.name == name:
            return stage
    raster = recipe.model.layout == "raster"
    if raster and name in STAGES and not STAGES[name].raster:
        why = f"{ONE_ORDER}, so the run ends with the pretraining.\n{OTHER_LAYOUT}"
    elif name == "control" and not recipe.pipeline.control:
        why = "pipeline.control is false. Set it to true to fine-tune on random orders as well."
    else:
        why = "there is none of this name."
    raise UserError(f"no stage {name!r} in this recipe: {why} Its stages are: {', '.join(stage.name for stage in stages)}.")


def _run_identity(run: Run) -> JsonObject:
    source = run.recipe.data.source.model_dump(mode="json")
    return {"name": run.recipe.name, "seed": run.recipe.seed, "storage_root": run.recipe.storage.root, "source": source}


def _settings(recipe: Recipe, stage: Stage) -> JsonObject:
    """The stage's part of the recipe as plain values, ``section.field`` by name, without operational fields."""
    plain: JsonObject = recipe.model_dump(mode="json")
    chosen: JsonObject = {}
    for section in stage.sections:
        if section == "extract.views" and recipe.extract.views == 1:
            continue  # one view is what there was before recipes had this field: fingerprints of those runs still hold
        value: JsonObject = plain
        config: object = recipe
        for key in section.split("."):
            value, config = value[key], getattr(config, key)
        if isinstance(config, Section):
            changeable = operational_fields(type(config))
            chosen |= {f"{section}.{key}": item for key, item in value.items() if key not in changeable}
            if section == "extract":
                chosen |= {f"extract.{key}": item for key, item in REMOVED_EXTRACT.items()}  # older versions hashed them
        else:
            chosen[section] = value
    return chosen


def _done(run: Run, stage: Stage) -> JsonObject | None:
    """The marker of a finished stage, None if it is not finished.

    Raises:
        UserError: it was finished with other settings.
    """
    try:
        marker: JsonObject = read_json(run.marker(stage.name))
    except Missing:
        return None
    if marker["fingerprint"] == stage_fingerprint(run.recipe, stage):
        return marker
    then, now = marker["settings"], _settings(run.recipe, stage)
    changed = [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)
    ]
    raise UserError(
        f"stage {stage.name} in {run.at()} was done with other settings: {'; '.join(changed) or 'those of a stage it needs'}.\n"
        f"Set them back, do it again with --from {stage.name} (replaces its results and all after it), or choose another run_dir."
    )


def _require(run: Run, stage: Stage) -> None:
    """Check that all stages that one needs, directly or not, are done. Raises UserError with the first that is not."""
    stages = run.recipe.stages()
    for needed in stages:
        if stage.name in _dependents(stages, needed.name) and _done(run, needed) is None:
            raise UserError(
                f"stage {stage.name} needs stage {needed.name}, which is not finished in {run.at()}.\n"
                f"Run the whole recipe (oar run RECIPE), or that stage first (oar {' '.join(needed.command('RECIPE'))})."
            )


def _dependents(stages: list[Stage], name: str) -> list[str]:
    """All stages that need a stage, directly or not."""
    names = [name]
    for stage in stages:
        if any(need in names for need in stage.needs):
            names.append(stage.name)
    return names[1:]


def _clear(run: Run, again: list[Stage]) -> None:
    """Remove what stages left. All markers go first, the last stage's before those it needs: a kill on the way leaves
    unfinished stages, never finished ones that rest on what is gone."""
    for stage in reversed(again):
        open_storage(run.marker(stage.name)).delete(run.marker(stage.name))
    for stage in again:
        for output in (run.at(name) for name in stage.outputs):
            storage = open_storage(output)
            for uri in [output] if storage.exists(output) else storage.list(output):
                storage.delete(uri)
