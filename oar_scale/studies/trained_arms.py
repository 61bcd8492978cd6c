"""What the fine-tunings of a run have left: for each arm and seed its figures, and what it has in common with others.

events           training loss and held-out likelihood, from the first step to the last
evaluation.json  likelihoods and distances of the ordered model and the control, of seed 0
flexibility/     means of what ``oar evaluate --flexibility`` has measured of its models (``--out RUN/flexibility``)
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from oar_scale.config.arms import FROM_EXTRACTION
from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.config.section import Section, silent_fields
from oar_scale.data.manifest import read_manifest
from oar_scale.errors import UserError
from oar_scale.evaluation.evaluation_record import upgraded
from oar_scale.json_object import JsonObject
from oar_scale.observe.events import read_events
from oar_scale.registry import STAGES, Stage, current_name, model_label
from oar_scale.results.estimates import OrderName
from oar_scale.results.flexibility import FORMAT
from oar_scale.run.context import Run
from oar_scale.run.stage_markers import Finished, read_finished
from oar_scale.storage import Missing, join, open_storage, read_json

RECIPE = "recipe.yaml"
OF_ORDERS = ("order", "random_share", "orders_of", "distinct_orders", "any_view_share")
"""The fields of ``finetune`` in which arms may differ. (The share of any view: see :func:`_alike`.)"""

OF_OWN_ORDERS = ("order_temperature", "first_cell", "commit_per_step", "cosine_steps")
"""The fields of ``extract`` that decide in which orders the stage ``evaluate`` finds a model's own likelihood."""
OF_EXTRACTED = ("mean", "extracted")
"""The orders of a flexibility report that come of the extraction of the run whose images it measured."""
LEAKING: OrderName = "own gt_logprob"
"""The orders that tell of the codes: likelihoods along them are no figures of a comparison."""
FLEXIBILITY = "flexibility"
STORED = "held-out nll stored"

Curve = list[tuple[int, float]]
Conditions = Mapping[str, object]
"""By its name: a setting or what images were measured, as JSON."""


@dataclass(frozen=True)
class TrainedArm:
    """One finished fine-tuning of a run."""

    run: str
    """As the user has named it."""
    stage: str
    arm: str
    """``ordered``, ``control``, or its name in ``pipeline.arms``."""
    number: int
    """Which seed of the run it is."""
    seed: int
    """What all that is random in it was drawn from."""
    model: str
    """The file of its model."""
    alike: Mapping[str, object]
    """What must be the same for it to be compared with others: everything but its orders."""
    orders: Mapping[str, object]
    """Where its orders come from."""
    curves: Mapping[str, Curve]
    """By the name of the measure: its value at steps."""
    figures: Mapping[str, float]
    """By the name of the measure: curves at their end, and what the evaluation has measured."""
    measured_on: Mapping[str, Conditions]
    """By the name of the measure: what its figure depends on beside the model. Figures of other images or settings are not compared."""


def open_run(path: str) -> Run:
    """The run of a recipe, or of its folder. Raises UserError where there is none."""
    if path.lower().endswith((".yaml", ".yml")):
        return Run(load_recipe(path))
    if not os.path.isfile(join(path, RECIPE)):
        raise UserError(f"{path}: no run here: neither its folder, which has a {RECIPE}, nor a recipe.")
    return Run(load_recipe(join(path, RECIPE)).model_copy(update={"run_dir": path}))


def trained_arms(path: str) -> tuple[list[TrainedArm], list[str]]:
    """The finished fine-tunings of a run, and a note on each that is none.

    Raises:
        UserError: there is no run, it has no fine-tuning that is finished, or its data or model are gone.
    """
    run = open_run(path)
    found, notes, missing = list[TrainedArm](), list[str](), list[str]()
    start, evaluation = None, _evaluation(run)
    for stage in run.recipe.stages():
        if stage.training != "finetune":
            continue
        try:
            finished = read_finished(run, stage)
        except UserError as error:
            notes.append(f"{path}: {str(error).splitlines()[0]}")
            continue
        if finished is None or finished.changes:
            missing.append(stage.name)
            continue
        start = start or _start(run)
        found.append(_trained(run, path, stage, finished, start, evaluation))
    orders = {entry["order"] for entry in evaluation.get("nll", {}).get("entries", ())}
    if LEAKING in orders and "own max_prob" not in orders:
        notes.append(
            f"{path}: likelihoods along {LEAKING} orders, the only own ones of its evaluation, are left out: these orders are chosen by "
            "the codes, and leak. Evaluate it anew: oar run RECIPE --from evaluate"
        )
    if missing:
        notes.append(f"{path}: not finished: {', '.join(missing)}")
    if not found:
        raise UserError(f"{path}: no fine-tuning of this run is finished, so there is nothing to compare.\n" + "\n".join(notes[:5]))
    return found, notes


def _start(run: Run) -> str:
    return _model_id(run.model_uri("any_order"))


def _model_id(file: str) -> str:
    from oar_scale.model import model_id  # torch

    return model_id(file)


def _trained(run: Run, path: str, stage: Stage, finished: Finished, start: str, evaluation: JsonObject) -> TrainedArm:
    recipe, arm = run.recipe.of(stage), stage.arm or ("control" if stage.kind == "control" else "ordered")
    assert stage.model is not None
    curves = _curves(run, stage.name)
    if stage.orders != STAGES["extract"].orders:  # its held-out images have orders of another extraction than those of other arms
        curves.pop(STORED, None)
    ends = {name: curve[-1][1] for name, curve in curves.items()}
    heldout = _images(run, "heldout")
    along_stored = {**heldout, **{f"extract.{name}": value for name, value in _extraction(run.recipe).items()}}
    figures = {name: (value, along_stored if name == STORED else heldout) for name, value in ends.items()}
    if not stage.arm and not stage.seed:
        figures |= _evaluated(run, arm, evaluation, heldout)
    figures |= _flexibility(run, stage.model)
    return TrainedArm(
        run=path,
        stage=stage.name,
        arm=arm,
        number=stage.seed,
        seed=recipe.seed,
        model=run.model_uri(stage.model),
        alike=_alike(run, recipe, start, finished.marker),
        orders=_orders(recipe, arm),
        curves=curves,
        figures={name: value for name, (value, _) in figures.items()},
        measured_on={name: conditions for name, (_, conditions) in figures.items()},
    )


def _alike(run: Run, recipe: Recipe, start: str, marker: JsonObject) -> dict[str, object]:
    """Everything that decides about a fine-tuning, but its orders and its seed, by its name in the recipe."""
    finetune = recipe.finetune
    plain = finetune.model_dump(mode="json", exclude={*silent_fields(finetune), *OF_ORDERS})
    alike: dict[str, object] = {
        "start model": start,
        "tokens": read_manifest(run.at("tokens", "train")).fingerprint,
        **{f"finetune.{name}": value for name, value in plain.items() if name != "mix"},
        "finetune.steps": marker["results"].get("steps", finetune.steps),
        "finetune.mix": [[read_manifest(mix.shards).fingerprint, mix.weight] for mix in finetune.mix],
        "model.dropout": recipe.model.dropout,
        "model.caption_dropout": recipe.model.caption_dropout,
        "extract.views": recipe.extract.views,
        "extract.mirror": recipe.extract.mirror,  # which decides about the views of all arms
        "parallel.precision": recipe.parallel.precision,
        "parallel.gradient_dtype": recipe.parallel.gradient_dtype,
        "data.canonical_streams": recipe.data.canonical_streams,
        "data.shuffle_window_shards": recipe.data.shuffle_window_shards,
    }
    if recipe.extract.views < len(recipe.tokenizer.views):  # else all samples take any view
        share = finetune.any_view_share
        alike["finetune.any_view_share"] = finetune.random_share if share is None else share
    return alike


def _orders(recipe: Recipe, arm: str) -> dict[str, object]:
    if arm == "control":
        return {"order": "random"}
    finetune = recipe.finetune
    orders: dict[str, object] = {"order": finetune.order or "stored", "random_share": finetune.random_share}
    if orders["order"] == "stored":
        orders |= {"orders_of": finetune.orders_of, "distinct_orders": finetune.distinct_orders}
    if orders["order"] in FROM_EXTRACTION:
        orders |= {"extract": _extraction(recipe)}
    return orders


def _extraction(recipe: Recipe) -> JsonObject:
    """How a model's orders are found."""
    return recipe.extract.model_dump(mode="json", exclude={*silent_fields(recipe.extract), "views", "batch"})


def _curves(run: Run, stage: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for event in read_events(run.events, stage):
        if event["kind"] == "train" and isinstance(event.get("loss"), float):
            curves.setdefault("training loss", []).append((int(event["step"]), event["loss"]))
        if event["kind"] == "heldout":
            values = {name: value for name, value in event.items() if name.startswith("nll_") and isinstance(value, float)}
            for name, value in values.items():
                curves.setdefault(f"held-out {name.replace('_', ' ')}", []).append((int(event["step"]), value))
    return curves


def _images(run: Run, split: str) -> Conditions:
    """Which images a split holds."""
    try:
        return {f"images of {split}": read_manifest(run.at("tokens", split)).fingerprint}
    except UserError:  # of a run whose tokens are gone, or that holds out none
        return {f"images of {split}": None}


def _evaluation(run: Run) -> JsonObject:
    """What the stage ``evaluate`` has written; empty where it has not, or of other models than those of today."""
    try:
        marker, evaluation = read_json(run.marker("evaluate")), read_json(join(run.local(), "evaluation.json"))
    except Missing:
        return {}
    return {} if "stale" in marker else upgraded(evaluation)


def _evaluated(run: Run, model: str, evaluation: JsonObject, images: Conditions) -> dict[str, tuple[float, Conditions]]:
    """What the stage ``evaluate`` has measured of one of its models."""
    recipe = run.recipe
    likelihood = {**images, "evaluate.nll_images": recipe.evaluate.nll_images}
    own = {**likelihood, **_fields("extract", recipe.extract, OF_OWN_ORDERS)}
    drawn = {**images, **_fields("evaluate", recipe.evaluate, ("feature_images", "features"))}
    drawn |= _fields("sample", recipe.sample, [name for name in type(recipe.sample).model_fields if name != "images"])

    def conditions(name: str) -> Conditions:
        return drawn if name.startswith("evaluated kid") else own if " own " in name else likelihood

    return {name: (value, conditions(name)) for name, value in _numbers(evaluation, model)}


def _fields(name: str, section: Section, fields: Collection[str]) -> dict[str, object]:
    """Some fields of a section by their names in the recipe, but those that tell nothing of results."""
    silent = silent_fields(section)
    return {f"{name}.{field}": value for field, value in section.model_dump(mode="json").items() if field in fields and field not in silent}


def _numbers(evaluation: JsonObject, model: str) -> Iterator[tuple[str, float]]:
    for entry in evaluation.get("nll", {}).get("entries", ()):
        if current_name(entry["model"]) == model and entry["order"] != LEAKING:
            yield f"evaluated nll {entry['order']}", float(entry["nll"]["mean"])
    for row in evaluation.get("distances", ()):
        if row["name"] == model_label(model):
            yield f"evaluated kid_{row.get('features', 'efflite0')}", float(row["kid"])


def _flexibility(run: Run, model: str) -> dict[str, tuple[float, Conditions]]:
    """The means over images of what the run's flexibility report has measured of a model; empty where it does not know the model."""
    folder = run.local(FLEXIBILITY)
    try:
        report = read_json(join(folder, f"{FLEXIBILITY}.json"))
    except Missing:
        return {}
    if report.get("format") != FORMAT:
        raise UserError(
            f"{folder}: a flexibility report of format {report.get('format')}, this version of oar_scale reads {FORMAT}: measures of one "
            "name are other figures. Write it anew (oar evaluate --flexibility), or move it away."
        )
    own = _model_id(run.model_uri(model))
    try:
        files = [join(folder, entry["arrays"]) for entry in report["models"] if entry["id"] == own]
        if not files:
            return {}
        images = {**_images(run, report["split"]), "flexibility --split": report["split"], "flexibility --images": report["images"]}
        drawn = {**images, "sampling": report["sampling"], "flexibility --features": report["features"]}
        tried = sorted({(row["temperature"], row["guidance"]) for row in report["sweep"]})
        with np.load(io.BytesIO(open_storage(folder).read(files[0])), allow_pickle=False) as arrays:
            means = {name: float(arrays[name].mean()) for name in arrays.files}
        found = dict[str, tuple[float, Conditions]]()
        for measure in (each for each in report["measures"] if each["name"] in means):
            name, conditions = measure["name"], images if measure["chapter"] in ("likelihood", "calibration") else drawn
            if name.split("/")[1] in OF_EXTRACTED:
                conditions = {**conditions, "orders extracted in": report["run"]}
            if name.startswith("samples/best/"):
                conditions = {**conditions, "flexibility --sweep": [tried, report["sweep_images"]]}
            found[f"flexibility {name} ({measure['unit']})"] = means[name], conditions
        return found
    except (KeyError, TypeError, ValueError, EOFError, Missing, zipfile.BadZipFile) as error:
        raise UserError(f"{folder}: no flexibility report of this version ({error!r}). Write it anew, or move it away.") from error
