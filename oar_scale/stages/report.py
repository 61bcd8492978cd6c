"""Stage ``report``: one page with everything the run has so far. Needs no model: it reads what the other stages wrote."""

from __future__ import annotations

from dataclasses import replace

from oar_scale.config.loading import dump_recipe
from oar_scale.evaluation.evaluation_record import Evaluation, load_evaluation
from oar_scale.json_object import JsonObject
from oar_scale.report import run_metadata as metadata
from oar_scale.report import write_report
from oar_scale.report.report_data import ReportData, TrainingCurve, training_curve
from oar_scale.run.context import Run


def run_report(run: Run) -> JsonObject:
    """Write ``report/index.html`` in the run's local folder; sections whose stage has not finished say so."""
    path = run.local("report", "index.html")
    write_report(report_data(run), path)
    run.console.say(f"  report: {path}")
    return {"path": path}


def report_data(run: Run) -> ReportData:
    """Gather what the stages left."""
    markers, evaluation = metadata.read_markers(run), load_evaluation(run.local())
    results = {name: marker["results"] for name, marker in markers.items()}
    report = ReportData(
        run=metadata.run_metadata(run, markers),
        recipe_yaml=dump_recipe(run.recipe),
        stages=metadata.stage_rows(run, markers),
        data=metadata.data_metadata(run, results["data"]) if "data" in results else None,
        tokenizer=metadata.tokenizer_metadata(run, results["tokenizer"]) if "tokenizer" in results else None,
        model=metadata.model_metadata(run, results["pretrain"]) if "pretrain" in results else None,
        curves=_curves(run),
        trained_on=metadata.finetune_orders(run.recipe.finetune),
        notes=_notes(run, evaluation),
    )
    if evaluation is None:
        return report
    return replace(
        report,
        tokenizer=evaluation.tokenizer,
        pretrain=evaluation.pretrain,
        nll=evaluation.nll,
        calibration=evaluation.calibration,
        groups=evaluation.groups,
        captions=evaluation.captions,
        distances=evaluation.distances,
        distance_differences=evaluation.distance_differences,
        samples=evaluation.samples,
        drawing=evaluation.drawing,
        edits=evaluation.edits,
        gallery=evaluation.gallery,
        leaks=evaluation.leaks,
        orders=evaluation.orders,
    )


def _curves(run: Run) -> tuple[TrainingCurve, ...]:
    curves = []
    for stage in run.recipe.stages():
        curve = training_curve(run.events, stage.name, stage.curve) if stage.curve else None
        if curve is not None:
            curves.append(replace(curve, loss_name="tokenizer loss") if stage.name == "tokenizer" else curve)
    return tuple(curves)


def _notes(run: Run, evaluation: Evaluation | None) -> tuple[str, ...]:
    """What a reader must know before quoting a number."""
    notes = ["One seed, one training run of each model: the errors given are those of the held-out images alone."]
    if run.recipe.pipeline.arms or run.recipe.pipeline.seeds > 1:
        notes.append(f"Arms and other seeds have curves on this page at most; their figures: oar compare {run.recipe.local_dir}")
    if not run.recipe.pipeline.control:
        notes.append("No control (pipeline.control: false): a gain over the any-order model may come from the further training alone.")
    if evaluation is not None and any(row.name.startswith("training images") for row in evaluation.distances):
        notes.append(
            "Read the distances of the models by those of real training images, and of training images encoded and decoded: "
            "the best that these codes can do."
        )
    if run.recipe.parallel.precision == "bf16":
        notes.append("Orders are extracted and images drawn in bfloat16; likelihoods are computed in float32.")
    return tuple(notes)
