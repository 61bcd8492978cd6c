"""The stages of a run as a graph: what needs what, and what is already done.

    data -> tokenizer -> tokens -> pretrain -> extract -> finetune -> evaluate -> report
                                       \\-------------------> control -/

A finished stage leaves ``stages/NAME.json``, written last, with the part of the recipe it depends on and a fingerprint of
that and of all it needs. The same fingerprint is skipped; another one is an error, not a silent mix of two recipes. A
stage that was interrupted has no such file and goes on from what it finds (checkpoints, ledgers). Doing a stage again on
request removes its results and those of every stage that needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import OPERATIONAL, Recipe
from oar_scale.errors import UserError
from oar_scale.observe.console import duration
from oar_scale.observe.watch import catch_up, watching
from oar_scale.run.artifacts import ONE_ORDER, OTHER_LAYOUT
from oar_scale.run.context import Run
from oar_scale.stages import data, evaluate, extract, report, tokenizer, tokens, train
from oar_scale.storage import Missing, join, open_storage, read_json, write_json


@dataclass(frozen=True)
class Stage:
    """One stage: what it needs, what it depends on, what it leaves, and how it runs."""

    name: str
    what: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    """The parts of the recipe its result depends on (``a.b`` for a part of a part)."""
    outputs: tuple[str, ...]
    """Folders and objects of the run's storage that are its own."""
    run: Callable[[Run], dict[str, Any]]
    expected: Callable[[Run], str]


def stages(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, each after those it needs."""

    def training(name: Any, what: str, needs: str, *sections: str) -> Stage:
        return Stage(
            name,
            what,
            (needs,),
            sections,
            (f"checkpoints/{name}", f"models/{train.RESULT[name]}.safetensors"),
            lambda run: train.run_train(run, name),
            lambda run: train.expected_seconds(run, name),
        )

    def other(name: str, what: str, needs: tuple[str, ...], sections: tuple[str, ...], outputs: tuple[str, ...], module: Any) -> Stage:
        return Stage(name, what, needs, sections, outputs, getattr(module, f"run_{name}"), lambda run: str(module.EXPECTED))

    found = [
        other("data", "captioned images into shards", (), ("data",), ("images",), data),
        other(
            "tokenizer", "image and text tokenizers", ("data",), ("tokenizer.image", "tokenizer.text", "seed"), ("tokenizers",), tokenizer
        ),
        other("tokens", "images into codes, by Ray actors", ("tokenizer",), ("tokenizer.views",), ("tokens",), tokens),
        training("pretrain", "pretraining", "tokens", "model", "pretrain", "seed", "parallel.precision"),
    ]
    if recipe.model.layout == "raster":  # one order for all images: there is none to extract, and nothing to fine-tune on
        return found
    found += [
        other(
            "extract",
            "an order for every training image, by Ray actors",
            ("pretrain",),
            ("extract", "parallel.precision"),
            ("orders",),
            extract,
        ),
        training("finetune", "fine-tuning on those orders", "extract", "finetune", "parallel.precision"),
    ]
    if recipe.pipeline.control:
        views = ("extract.views",) if recipe.extract.views > 1 else ()  # the control takes the views that have orders
        found.append(training("control", "the same fine-tuning on random orders", "pretrain", "finetune", "parallel.precision", *views))
    models = ("finetune", "control") if recipe.pipeline.control else ("finetune",)
    found.append(other("evaluate", "likelihoods, samples, distances", models, ("sample", "evaluate"), (), evaluate))
    found.append(other("report", "one page with everything", ("evaluate",), (), (), report))
    return found


def run_pipeline(run: Run, *, start: str | None = None, only: str | None = None) -> None:
    """Run the stages that are not done yet.

    Args:
        start: do this stage and all after it again, whatever is done.
        only: do this one stage again and no other; what it needs must be done.

    Raises:
        UserError: an unknown stage, a stage that needs one which is not done or was done with other settings, or whatever
            a stage cannot work with.
    """
    todo = stages(run.recipe)
    names = [stage.name for stage in todo]
    wanted = only or start
    if wanted is not None and wanted not in names:
        raise _no_stage(run.recipe, wanted, names)
    check_run_dir(run)
    if wanted is not None:
        _require(run, todo, wanted)
        again = names[names.index(wanted) :] if only is None else [only, *_dependents(todo, only)]
        _clear(run, [stage for stage in todo if stage.name in again])
    began = time.monotonic()
    for stage in todo:
        if only in (None, stage.name):
            _run_unless_done(run, todo, stage)
    catch_up(run.events, run.recipe, run.at(), names, run.console.say)
    run.console.say(f"finished in {duration(time.monotonic() - began)}")


def run_stage(run: Run, name: str) -> None:
    """Run one stage if it is not done yet; it goes on where it was interrupted. Raises as :func:`run_pipeline`."""
    todo = stages(run.recipe)
    check_run_dir(run)
    for stage in todo:
        if stage.name == name:
            _require(run, todo, name)
            return _run_unless_done(run, todo, stage)
    raise _no_stage(run.recipe, name, [stage.name for stage in todo])


def _no_stage(recipe: Recipe, name: str, names: list[str]) -> UserError:
    """Why a recipe has no such stage, and what to do."""
    if name in ("extract", "finetune", "control", "evaluate", "report") and recipe.model.layout == "raster":
        why = f"{ONE_ORDER}, so the run ends with the pretraining.\n{OTHER_LAYOUT}"
    elif name == "control" and not recipe.pipeline.control:
        why = "pipeline.control is false. Set it to true to fine-tune on random orders as well."
    else:
        why = "there is none of this name."
    return UserError(f"no stage {name!r} in this recipe: {why} Its stages are: {', '.join(names)}.")


def _run_unless_done(run: Run, todo: list[Stage], stage: Stage) -> None:
    label = f"[{todo.index(stage) + 1}/{len(todo)}] {stage.name}"
    done = _done(run, todo, stage)
    if done is not None:
        run.console.say(f"{label}: done before in {duration(done['seconds'])}, skipped")
        return
    run.console.stage(label, stage.what, stage.expected(run))
    _run_stage(run, todo, stage)


def _run_stage(run: Run, todo: list[Stage], stage: Stage) -> None:
    if run.rank:
        stage.run(run)
        return
    bind_run_dir(run)
    started, clock = time.time(), time.monotonic()
    # A training stage is watched where its workers are started, which knows its steps; what several processes share, by the first.
    unwatched = stage.name in train.RESULT or (run.array is not None and run.array.index > 0)
    with nullcontext() if unwatched else watching(run.events, stage.name, run.recipe, run.at(), console=run.console):
        results = stage.run(run)
    seconds = time.monotonic() - clock
    marker = {"stage": stage.name, "fingerprint": _fingerprint(run, todo, stage), "settings": _settings(run, stage)}
    write_json(run.marker(stage.name), {**marker, "seconds": seconds, "started": started, "results": results})
    run.console.say(f"  {stage.name} took {duration(seconds)}")


def check_run_dir(run: Run) -> None:
    """Refuse a folder that another recipe's run lives in."""
    try:
        there = read_json(join(run.local(), "run.json"))
    except Missing:
        return
    for field, value in _run_facts(run).items():
        if there.get(field) != value:
            raise UserError(
                f"{run.local()}: this folder belongs to another run: {field} was {there.get(field)!r}, the recipe says {value!r}.\n"
                "Choose another folder with -o run_dir=..., or delete this one."
            )


def bind_run_dir(run: Run) -> None:
    """Write down whose folder it is, and the recipe as it is used."""
    write_json(join(run.local(), "run.json"), _run_facts(run))
    recipe = join(run.local(), "recipe.yaml")
    open_storage(recipe).write(recipe, dump_recipe(run.recipe).encode())


def _run_facts(run: Run) -> dict[str, Any]:
    source = run.recipe.data.source.model_dump(mode="json")
    return {"name": run.recipe.name, "seed": run.recipe.seed, "storage_root": run.recipe.storage.root, "source": source}


def _settings(run: Run, stage: Stage) -> dict[str, Any]:
    """The stage's part of the recipe as plain values, ``section.field`` by name."""
    plain: dict[str, Any] = run.recipe.model_dump(mode="json")
    chosen: dict[str, Any] = {}
    for section in stage.sections:
        value: Any = plain
        for key in section.split("."):
            value = value[key]
        fields = value.items() if isinstance(value, dict) else [("", value)]
        chosen |= {f"{section}.{key}".rstrip("."): item for key, item in fields if key not in OPERATIONAL}
    return chosen


def _fingerprint(run: Run, todo: list[Stage], stage: Stage) -> str:
    """Of the stage's settings and of all it needs."""
    needed = [_fingerprint(run, todo, each) for each in todo if each.name in stage.needs]
    return fingerprint({"stage": stage.name, "settings": _settings(run, stage), "needs": needed})


def _done(run: Run, todo: list[Stage], stage: Stage) -> dict[str, Any] | None:
    """The marker of a finished stage, None if it is not finished.

    Raises:
        UserError: it was finished with other settings.
    """
    try:
        marker: dict[str, Any] = read_json(run.marker(stage.name))
    except Missing:
        return None
    if marker["fingerprint"] == _fingerprint(run, todo, stage):
        return marker
    then, now = marker["settings"], _settings(run, stage)
    changed = [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)
    ]
    raise UserError(
        f"stage {stage.name} in {run.at()} was done with other settings: {'; '.join(changed) or 'those of a stage it needs'}.\n"
        f"Set them back, do it again with --from {stage.name} (replaces its results and all after it), or choose another run_dir."
    )


def _require(run: Run, todo: list[Stage], name: str) -> None:
    """Check that all a stage needs, directly or not, is done; the first that is not is named."""
    needed = [stage for stage in todo if name in _dependents(todo, stage.name)]
    for stage in needed:
        if _done(run, todo, stage) is None:
            raise UserError(
                f"stage {name} needs stage {stage.name}, which is not finished in {run.at()}.\n"
                f"Run the whole recipe (oar run RECIPE), or that stage first (oar {_verb(stage.name)})."
            )


def _verb(stage: str) -> str:
    if stage in train.RESULT:
        return f"train RECIPE --stage {stage}"
    return "prepare RECIPE" if stage == "data" else f"{stage} RECIPE"


def _dependents(todo: list[Stage], name: str) -> list[str]:
    """All stages that need a stage, directly or not."""
    found = [name]
    for stage in todo:
        if any(need in found for need in stage.needs):
            found.append(stage.name)
    return found[1:]


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
