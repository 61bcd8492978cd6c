"""Stages that are done again, ``oar run --from`` and ``--only``: what becomes of the earlier results.

said and asked      which results are set aside, how large they are, which stages are stale afterwards
set aside           ROOT/previous (:mod:`oar_scale.run.previous`)
done again          as any stage is, over as many attempts as it takes
complete            what is set aside is removed; the stages that rest on it and were not done again are stale
or not              ``oar run RECIPE --undo`` removes the new results and puts back those of before
"""

from __future__ import annotations

import sys
from contextlib import suppress

from oar_scale.errors import UserError
from oar_scale.registry import Stage
from oar_scale.run.context import Run
from oar_scale.run.drivers import Drivers
from oar_scale.run.previous import FOLDER, Redo, drop, finish, put_back, read_redo, results, set_aside
from oar_scale.run.stage_markers import dependents
from oar_scale.storage import open_storage

UNDO = "oar run RECIPE --undo"


def begin_again(run: Run, drivers: Drivers, again: list[Stage], *, yes: bool) -> None:
    """Set the results of stages aside, after saying so and being told to go on.

    Raises:
        UserError: the user does not want it, or cannot be asked; another driver works on the run.
    """
    earlier = read_redo(run) or Redo()
    removed = "  (removed now: earlier results are set aside already)"
    lines = [line for stage in again if (line := _amount(run, stage, removed if stage.name in earlier.stages else ""))]
    if lines:
        head = f"{run.at()}: these stages are done again. Their results are set aside in {run.at(FOLDER)} until the new ones are complete:"
        _ask(run, [head, *lines, *_stale(run, again), f"  until then {UNDO} puts them back"], yes)
        drivers.take_alone(again)
    for stage in () if lines else again:
        drivers.take(stage)  # there are only markers to move: other stages may be worked on, as while a report is written anew
    set_aside(run, again)


def undo(run: Run, drivers: Drivers, *, yes: bool) -> None:
    """Put back what is set aside.

    Raises:
        UserError: nothing is; the user does not want it, or cannot be asked; another driver works on the run.
    """
    redo = read_redo(run)
    if redo is None:
        raise UserError(f"{run.at()}: nothing is set aside here: the last --from or --only is complete, or was undone.")
    stages = [stage for stage in run.recipe.stages() if stage.name in redo.stages]
    lines = [line for stage in stages if (line := _amount(run, stage))]
    if lines:
        _ask(run, [f"{run.at()}: the earlier results are put back, and the new ones removed:", *lines], yes)
    drivers.take_alone(stages)
    put_back(run, redo)
    run.console.say(f"the earlier results are back: {', '.join(redo.stages)}")
    over = [stage.name for stage in stages if stage.local and not open_storage(run.marker(stage.name)).exists(run.marker(stage.name))]
    if over:
        run.console.say(f"  written over meanwhile, and done again by oar run RECIPE: {', '.join(over)}")


def finish_interrupted(run: Run, drivers: Drivers) -> bool:
    """Finish a move of results that another driver has begun and not ended, or the removal of those that it has replaced.

    Returns:
        Whether earlier results were put back.

    Raises:
        UserError: the other one is still at it.
    """
    redo = read_redo(run)
    if redo is None:
        return False
    stages = [stage for stage in run.recipe.stages() if stage.name in redo.stages]
    if redo.interrupted:
        drivers.take_alone(stages)
        finish(run)
    elif _is_complete(run, redo):
        with suppress(UserError):  # another driver works on this run: the next one sees to it
            drivers.take_alone(stages)
            drop_if_complete(run)
    return redo.put_back


def is_again(run: Run, stage: Stage) -> bool:
    """Whether a stage is done again, and its earlier results are set aside."""
    redo = read_redo(run)
    return redo is not None and stage.name in redo.stages


def drop_if_complete(run: Run) -> None:
    """Remove what is set aside where all stages that were to be done again are finished, also those that the recipe has no more."""
    redo = read_redo(run)
    if redo is not None and _is_complete(run, redo):
        drop(run, redo)


def _is_complete(run: Run, redo: Redo) -> bool:
    return not redo.interrupted and all(open_storage(run.marker(name)).exists(run.marker(name)) for name in redo.stages)


def say_what_is_aside(run: Run) -> None:
    """After a failure: where the earlier results are, and how to get them back."""
    try:
        redo = read_redo(run)
    except UserError:  # the storage does not answer, which is said already
        return
    if redo is not None:
        names = ", ".join(redo.stages)
        run.console.say(f"  earlier results ({names}) are kept in {run.at(FOLDER)}: oar run RECIPE goes on, {UNDO} puts them back")


def _amount(run: Run, stage: Stage, note: str = "") -> str:
    """A line about what a stage has left; empty where that is nothing."""
    sizes = results(run, stage)
    return f"  {stage.name:10} {len(sizes)} objects, {sum(sizes.values()) / 1e6:,.1f} MB{note}" if sizes else ""


def _stale(run: Run, again: list[Stage]) -> list[str]:
    """Lines about stages that rest on the earlier results, and are not done again: finished ones, and trainings with checkpoints."""
    later = {each.name: each for stage in again for each in dependents(run.recipe.stages(), stage.name) if each not in again}
    names = [name for name in later if open_storage(run.marker(name)).exists(run.marker(name))]
    begun = [name for name, stage in later.items() if stage.training and name not in names and results(run, stage)]
    lines = [f"  stale afterwards, and kept as they are: {', '.join(names)}"] if names else []
    if begun:
        lines.append(
            f"  begun on them, not finished, and kept as they are: {', '.join(begun)}; to begin them anew on the new results: "
            f"oar run RECIPE --from {begun[0]}"
        )
    return lines


def _ask(run: Run, lines: list[str], yes: bool) -> None:
    text = "\n".join(lines)
    if yes:
        run.console.say(text)
        return
    if not sys.stdin.isatty():
        raise UserError(f"{text}\nNothing has been changed, as there is no terminal to ask: add --yes to go on.")
    run.console.say(text)
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("nothing has been changed.")
