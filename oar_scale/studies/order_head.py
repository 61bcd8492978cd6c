"""``oar orders --train-head`` and ``--predict``: an order head for one of the run's models, and its orders for all training images."""

from __future__ import annotations

import dataclasses
import time
from functools import partial

import torch

from oar_scale.model import AnyOrderModel, load_model, model_id
from oar_scale.observe.failure import reporting_failure
from oar_scale.orders.analysis.analysis_values import HeadReport, HeadRow
from oar_scale.orders.head import load_head, save_head
from oar_scale.orders.order_files import head_file, head_report_file, run_files
from oar_scale.registry import ModelName
from oar_scale.run.artifacts import prompt_encoder, require, require_any_order, require_model
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import on_gpu_node, threads_here
from oar_scale.storage import Missing, read_json, write_json
from oar_scale.studies.order_head_training import HeadData, train_head, write_predicted

EVENTS = "order-head"
"""The name of its training among the events of the run's stages."""


def run_train_head(run: Run, model: ModelName) -> HeadReport:
    """Train a head on the extracted orders, and write it and what it is worth beside the model.

    Args:
        model: whose rows it reads.

    Raises:
        UserError: a stage before this one has not finished, or too few images.
    """
    return on_gpu_node(run, partial(_train_head, model=model), gpus=run.recipe.extract.gpus_per_actor > 0)


def _train_head(run: Run, model: ModelName) -> HeadReport:
    data, uri = _data(run, model)
    config = run.recipe.order_head
    started = time.monotonic()
    with run.log(EVENTS) as log, reporting_failure(run.events, EVENTS, run.recipe, run.at()):
        with run.console.progress(config.steps, "steps") as tally:

            def on_step(step: int, loss: float) -> None:
                log.emit("order_head", step=step, loss=loss)
                tally.update(step)

            head, report = train_head(data, config, model_id(uri), run.recipe.seed, on_step)
        save_head(head_file(uri), head)
        write_json(head_report_file(uri), dataclasses.asdict(report))
        log.emit("end", step=config.steps, seconds=time.monotonic() - started)  # or it would count as stalled from then on
    for line in report_lines(report):
        run.console.say(f"  {line}")
    run.console.say(f"  order head: {head_file(uri)}")
    return report


def run_predict(run: Run) -> int:
    """Write order tables with the orders that the any-order model's head predicts for all training images; returns their number.

    Raises:
        UserError: there is no head, it is another model's, or it learned from other orders than the run has now.
    """
    return on_gpu_node(run, _predict, gpus=run.recipe.extract.gpus_per_actor > 0)


def _predict(run: Run) -> int:
    data, uri = _data(run, "any_order")
    head = load_head(require(run, head_file(uri), "oar orders --train-head"), data.model, model_id(uri), data.settings_id)
    with run.console.progress(data.manifest.samples, "predicted orders") as tally:
        done = write_predicted(data, head, run.recipe.extract.batch, tally.update, run.recipe.extract.views)
    run.console.say(f"  predicted orders: {data.files.predicted}")
    return done


def read_report(uri: str, settings_id: str) -> HeadReport | None:
    """The report of :func:`run_train_head` about a head that learned from the orders of ``settings_id``; None where there is none."""
    try:
        stored = read_json(uri)
    except Missing:
        return None
    if stored.get("settings_id") != settings_id:
        return None
    return HeadReport(**{**stored, "rows": tuple(HeadRow(**row) for row in stored["rows"])})


def report_lines(report: HeadReport) -> list[str]:
    """The figures as lines of columns."""
    width = max(len(row.name) for row in report.rows)
    head = f"{'method':{width}}  {'tau':>6}  {'of the cells it decides':>23}  candidate rows"
    rows = [f"{row.name:{width}}  {row.tau:6.3f}  {row.tau_rest:23.3f}  {row.rows:,}" for row in report.rows]
    exact = f"{'exact extraction':{width}}  {1:6.3f}  {1:23.3f}  {report.exact_rows:,}"
    title = f"Kendall tau to the exact orders of {report.heldout} training images kept out, learned from {report.images}:"
    return [title, head, *rows, exact]


def _data(run: Run, model: ModelName) -> tuple[HeadData, str]:
    """The training images as a model of the run sees them, and the model's file."""
    require_any_order(run)
    recipe, uri = run.recipe, require_model(run, model)
    return HeadData(_open(run, uri), prompt_encoder(run), run_files(run.at()), run.cache, recipe.storage.cache_bytes), uri


def _open(run: Run, uri: str) -> AnyOrderModel:
    """Load the model, on a GPU where extraction uses one."""
    parallel = run.recipe.parallel
    network = load_model(uri)
    if run.recipe.extract.gpus_per_actor > 0:
        return network.to("cuda", torch.bfloat16 if parallel.precision == "bf16" else torch.float32)
    torch.set_num_threads(threads_here(parallel.cpu_threads * parallel.max_workers))
    return network
