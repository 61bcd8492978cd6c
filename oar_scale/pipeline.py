"""Runs the stages of a recipe: what is already done, what has to be done again, and what is refused.

A finished stage leaves a marker, written last (:mod:`oar_scale.run.stage_markers`): under the same settings it is skipped, a training
that gets more steps is continued, other settings are an error. A stage that was interrupted has no marker and resumes from what it finds
(checkpoints, ledgers). Doing stages again on request sets their results aside (:mod:`oar_scale.run.again`), and one driver at a time does
a stage (:mod:`oar_scale.run.drivers`).

The stages themselves are listed in ``oar_scale.registry``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import import_module

from oar_scale.config.extras import check_packages
from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import Recipe
from oar_scale.errors import Requeue, Unreachable, UserError
from oar_scale.json_object import JsonObject
from oar_scale.observe.console import duration
from oar_scale.observe.failure import ending, reporting_failure
from oar_scale.observe.prometheus import show_ending
from oar_scale.observe.watch import catch_up, watching
from oar_scale.orders.policies import check_policies
from oar_scale.registry import STAGES, Stage
from oar_scale.run.again import begin_again, drop_if_complete, finish_interrupted, is_again, say_what_is_aside, undo
from oar_scale.run.context import ONE_ORDER, OTHER_LAYOUT, Run
from oar_scale.run.drivers import Drivers
from oar_scale.run.stage_markers import Finished, dependents, mark_stale, read_finished, write_finished
from oar_scale.runtime.stop_signals import Deadline, StopSignals
from oar_scale.storage import Missing, absolute, join, open_storage, read_json, write_json
from oar_scale.storage.patience import patient
from oar_scale.text import shown


def run_pipeline(run: Run, *, start: str | None = None, only: str | None = None, yes: bool = False, minutes: float | None = None) -> None:
    """Run the stages that are not done yet.

    Args:
        start: do this stage and all after it again, whatever is done.
        only: do this one stage again and no other; what it needs must be done.
        yes: set results aside without asking.
        minutes: after so many begin no stage, have the one under way save its state and leave where it can, and say which ones are left.
            Called in another thread than the main one, where no stop request can be heard, the one under way goes on to its end.

    Raises:
        Requeue: asked to stop, or the minutes are over, and stages are left.
        UserError: an unknown stage, a stage that needs one which is not done or was done with other settings, another driver, a package
            that is missing, or whatever a stage cannot work with.
    """
    stages = run.recipe.stages()
    names: list[str] = [stage.name for stage in stages]
    wanted = only or start
    first = None if wanted is None else _stage_named(run.recipe, wanted)
    check_run_dir(run)
    _check_order_policies(run.recipe)
    began = time.monotonic()
    with patient(run.recipe.storage.patience_s), _driving(run) as drivers, ExitStack() as stack:
        deadline = None if minutes is None else stack.enter_context(Deadline(60 * minutes))
        again = [] if first is None else [first] if only else stages[stages.index(first) :]
        if first is not None:
            _require(run, first)
            for before in stages[: stages.index(first)] if start else ():
                read_finished(run, before)  # one that is refused is refused now
        _check_packages(run, again if only else stages, again)
        if again:
            begin_again(run, drivers, again, yes=yes)
        StopSignals.unheeded = None
        for stage in again if only else stages:
            reason = deadline.reason if deadline is not None and deadline.passed else StopSignals.unheeded
            if reason is not None and _say_what_is_left(run, stages, again):
                raise Requeue(reason)
            if stage.ray and _to_do(read_finished(run, stage)):
                with _reporting(run, stage):
                    stack.enter_context(_shared_ray(run.recipe))
            try:
                _run_stage(run, stage, drivers)
            except Requeue as stop:
                if deadline is not None and deadline.passed:
                    _say_what_is_left(run, stages, again)
                    raise Requeue(deadline.reason, stop.unfinished) from None
                raise
    catch_up(run.events, run.recipe, run.at(), names, run.console.say)
    run.console.say(f"finished in {duration(time.monotonic() - began)}")


def _check_order_policies(recipe: Recipe) -> None:
    """Refuse an order policy that there is none of now, not when the stage begins that trains or draws by it."""
    of_arms = {f"pipeline.arms.{name}.order": arm.order for name, arm in recipe.pipeline.arms.items()}
    check_policies(
        {"pretrain.order": recipe.pretrain.order, "finetune.order": recipe.finetune.order, **of_arms, "sample.order": recipe.sample.order}
    )


def _say_what_is_left(run: Run, stages: Sequence[Stage], again: Sequence[Stage]) -> bool:
    """Name the stages that are not done, if there are any; returns whether there are. ``again``: those that were begun once more."""
    left = [stage.name for stage in stages if _to_do(read_finished(run, stage))]
    if left:
        run.console.say(f"{len(left)} of {len(stages)} stages are left: {', '.join(left)}")
        if again:
            run.console.say("to resume: oar run without --from and --only, which would begin these stages once more")
    return bool(left)


def _check_packages(run: Run, chosen: Sequence[Stage], again: Sequence[Stage]) -> None:
    """Refuse to begin what a later stage could not finish. Raises UserError with the packages that stages to be done need."""
    names: dict[str, Stage] = {stage.name: stage for stage in chosen}
    check_packages(run.recipe, names, lambda name: names[name] not in again and not _to_do(read_finished(run, names[name])))


def undo_again(run: Run, *, yes: bool = False) -> None:
    """Put back the results that ``start`` or ``only`` has set aside. Raises UserError where there are none."""
    check_run_dir(run)
    with Drivers(run) as drivers:
        if not finish_interrupted(run, drivers):
            undo(run, drivers, yes=yes)


@contextmanager
def _driving(run: Run) -> Iterator[Drivers]:
    """This process as a driver of the run. What an earlier one has begun to move is moved first."""
    how = ending(None)
    try:
        with Drivers(run) as drivers:
            if run.rank == 0:
                finish_interrupted(run, drivers)
            try:
                yield drivers
            except BaseException:
                say_what_is_aside(run)
                raise
    except BaseException as error:
        how = ending(error)
        raise
    finally:
        show_ending(run.events, how)


def _shared_ray(recipe: Recipe) -> AbstractContextManager[None]:
    """One Ray for all stages, which takes seconds to start and to end; inside it this is the same one again."""
    from oar_scale.runtime.ray_session import ray_session

    parallel, extract = recipe.parallel, recipe.extract
    cpus = max(parallel.max_workers, extract.max_actors) * parallel.cpu_threads
    gpus = parallel.max_workers * parallel.gpus_per_worker
    if extract.gpus_per_actor:
        import torch

        gpus = max(gpus, torch.cuda.device_count())
    return ray_session(cpus, gpus, least_gpus=parallel.min_workers * parallel.gpus_per_worker)


def run_stage(run: Run, name: str) -> None:
    """Run one stage if it is not done yet; it resumes where it was interrupted.

    Raises:
        UserError: as :func:`run_pipeline`.
    """
    stage = _stage_named(run.recipe, name)
    check_run_dir(run)
    _check_order_policies(run.recipe)
    with patient(run.recipe.storage.patience_s), _driving(run) as drivers:
        _require(run, stage)
        _run_stage(run, stage, drivers)


def _run_stage(run: Run, stage: Stage, drivers: Drivers) -> None:
    """Run a stage whose folder and needs have been checked."""
    stages = run.recipe.stages()
    label = f"[{stages.index(stage) + 1}/{len(stages)}] {stage.name}"
    if _to_do(read_finished(run, stage)) and run.rank == 0:
        drivers.take(stage)
    finished = read_finished(run, stage)  # now that no other driver does it any more
    if finished is not None and not finished.changes:
        run.console.say(f"{label}: done before in {duration(finished.marker['seconds'])}, skipped")
        return
    run.console.stage(label, stage.title, expected_duration(run.recipe, stage))
    with _reporting(run, stage):
        _do_stage(run, stage, finished)


def _do_stage(run: Run, stage: Stage, finished: Finished | None) -> None:
    """Run a stage that nobody else does, and write down that it is done."""
    function, arguments = entry_point(stage), (run, stage.name) if stage.takes_name else (run,)
    # Pools wait for the storage by rules of their own, and go on with something else meanwhile.
    patience = patient(0.0) if stage.shared else nullcontext()
    if run.rank:  # rank 0 alone writes run.json and the marker
        with patience:
            function(*arguments)
        return
    bind_run_dir(run)
    if finished is not None:
        _announce_continuation(run, stage, finished)
    started, clock = time.time(), time.monotonic()
    with patience, _watched(run, stage):
        results = function(*arguments)
    # Of a training: of all commands that it took, as it counts its attempts.
    seconds = float(results["seconds"]) if stage.training and "seconds" in results else time.monotonic() - clock
    if finished is not None or is_again(run, stage):
        mark_stale(run, dependents(run.recipe.stages(), stage.name), stage)
    write_finished(run, stage, {"seconds": seconds, "started": started, "results": results})
    drop_if_complete(run)
    run.console.say(f"  {stage.name} took {duration(seconds)}")


def _reporting(run: Run, stage: Stage) -> AbstractContextManager[None]:
    """Of several processes that train a stage together rank 0 reports how it fails."""
    return nullcontext() if run.rank else reporting_failure(run.events, stage.name, run.recipe, run.at())


def _watched(run: Run, stage: Stage) -> AbstractContextManager[None]:
    """A training stage is watched where its workers are started, which knows its steps; what several processes share, by the first."""
    if stage.training or (run.array is not None and run.array.index > 0):
        return nullcontext()
    return watching(run.events, stage.name, run.recipe, run.at(), console=run.console)


def _to_do(finished: Finished | None) -> bool:
    """Whether a stage has something to do: for the first time, or because it is to be continued."""
    return finished is None or bool(finished.changes)


def _announce_continuation(run: Run, stage: Stage, finished: Finished) -> None:
    """Say how a finished training is continued, and keep the model that it has left: the export at its end replaces that."""
    named = ", ".join(f"{key} {then} -> {now}" for key, (then, now) in finished.changes.items())
    run.console.say(f"  continued from its last checkpoint: {named}")
    if stage.model is not None:
        model, steps = run.model_uri(stage.model), finished.marker["settings"][f"{stage.training}.steps"]
        kept = f"{model.removesuffix('.safetensors')}.step-{steps}.safetensors"
        storage = open_storage(model)
        if storage.exists(model) and not storage.exists(kept):
            storage.copy(model, kept)
        run.console.say(f"  the model of step {steps} is kept as {kept}")
    later = ", ".join(each.name for each in dependents(run.recipe.stages(), stage.name))
    if later:
        run.console.say(f"  after it these stages are stale, and stay as they are until you do them again: {later}")


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
    """Refuse a folder that another recipe's run lives in. One that has left nothing (its recipe was wrong) is in nobody's way.

    Raises:
        UserError: names the field in which the two recipes differ.
    """
    try:
        there = read_json(join(run.local(), "run.json"))
    except Missing:
        return
    difference = next(_differences(there, _run_identity(run)), None)
    if difference is not None and _left_something(run, there):
        field, then, now = difference
        section, dot, rest = field.partition(".")
        key = {"source": "data.source", "storage_root": "storage.root"}.get(section, section) + dot + rest  # as the recipe calls it
        raise UserError(
            f"{run.local()}: this folder belongs to another run: {key} was {shown(then)}, the recipe says {shown(now)}.\n"
            "Choose another folder with -o run_dir=..., or delete this one."
        )


def _differences(there: JsonObject, identity: JsonObject) -> Iterator[tuple[str, object, object]]:
    """The fields in which two runs differ: name, and what each of them has."""
    for field, now in identity.items():
        then = there.get(field)
        if isinstance(then, dict) and isinstance(now, dict):
            yield from ((f"{field}.{key}", then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key))
        elif then != now and not (field == "storage_root" and _absolute(then) == _absolute(now)):
            yield field, then, now


def _left_something(run: Run, there: JsonObject) -> bool:
    """Whether the run of this ``run.json`` has left any results, or a marker of a stage."""
    root = there.get("storage_root") or run.local()
    folders = {output.partition("/")[0] for stage in run.recipe.stages() for output in stage.outputs} | {"stages"}
    try:
        return any(open_storage(root).list(join(root, folder)) for folder in sorted(folders))
    except Unreachable:
        raise
    except UserError:  # there is no such bucket: the typing error that is corrected now
        return False


def bind_run_dir(run: Run) -> None:
    """Write ``run.json``, which says whose folder it is, and the recipe as it is used."""
    write_json(join(run.local(), "run.json"), _run_identity(run))
    recipe = join(run.local(), "recipe.yaml")
    open_storage(recipe).write(recipe, dump_recipe(run.recipe).encode())


def _stage_named(recipe: Recipe, name: str) -> Stage:
    """The stage of that name. Raises UserError where the recipe has none: why, and which stages it has."""
    stages = recipe.stages()
    for stage in stages:
        if stage.name == name:
            return stage
    raster = recipe.model.layout == "raster"
    if raster and name in STAGES and not STAGES[name].with_raster_layout:
        why = f"{ONE_ORDER}, so the run ends with the pretraining.\n{OTHER_LAYOUT}"
    elif name == "control" and not recipe.pipeline.control:
        why = "pipeline.control is false. Set it to true to fine-tune on random orders as well."
    else:
        why = "there is none of this name."
    raise UserError(f"no stage {name!r} in this recipe: {why} Its stages are: {', '.join(stage.name for stage in stages)}.")


def _run_identity(run: Run) -> JsonObject:
    source = run.recipe.data.source.model_dump(mode="json")
    return {"name": run.recipe.name, "seed": run.recipe.seed, "storage_root": run.recipe.storage.root, "source": source}


def _absolute(root: str | None) -> str | None:
    """A storage as whoever works in another folder names it: jobs get absolute paths."""
    return root and absolute(root)


def _require(run: Run, stage: Stage) -> None:
    """Check that all stages that one needs, directly or not, are done. Raises UserError with the first that is not."""
    stages = run.recipe.stages()
    for needed in stages:
        if stage in dependents(stages, needed.name) and _to_do(read_finished(run, needed)):
            raise UserError(
                f"stage {stage.name} needs stage {needed.name}, which is not finished in {run.at()}.\n"
                f"Run the whole recipe (oar run RECIPE), or that stage first (oar {' '.join(needed.command('RECIPE'))})."
            )
