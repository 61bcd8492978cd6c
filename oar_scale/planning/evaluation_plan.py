"""Plan of what is drawn and measured: the stage ``evaluate``, and the samples that published distances rest on.

A pass of drawing B images costs the larger of two times (a roofline),

    operations of B images / rate        rate: the peak x ``time.extraction_mfu``
    bytes read / bandwidth               bandwidth: the memory's x ``time.bandwidth_share``;  bytes: the weights of the trunk and the head,
                                         once for all rows that pass together, and keys and values in the cache, once in each layer

By confidence a pass asks about all empty cells of an image, and on a GPU matrix products take longer than memory; along a given order it
asks about one, and memory decides. Pictures are decoded in float32, as likelihoods are.
"""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.model.flops import drawing_steps, forward_flops
from oar_scale.orders.step_sizes import cells_per_step
from oar_scale.planning.activations import BYTES, ROWS_AT_ONCE
from oar_scale.planning.case import Case
from oar_scale.planning.extraction_plan import checked_order_flops, plain_order_flops
from oar_scale.registry import MODELS
from oar_scale.tokenizers.flops import decoder_flops

TASK_IMAGES = 64
"""Images that the evaluation draws at once (``stages/evaluate.py``, which imports torch; a test compares them)."""
SAMPLES = 50_000
"""Images of a published distance on ImageNet (docs/evaluation.md)."""
PICTURES_AT_ONCE = 32
"""``oar sample --batch``."""
NLL_PASSES = 5
"""Forward passes for the likelihoods of an image: random and raster orders, the model's own by two scores, and captions
of other images (``evaluation/eval_tasks.py``)."""
OWN_ORDERS = 2
"""Orders that each model finds for an image whose likelihood is taken: one for each of ``eval_tasks.OWN_SCORES``, unguided."""
BRUTE_FORCE_IMAGES = 2
"""Whose orders the evaluation also finds by a fresh forward pass for every candidate (``stages/evaluate.py``)."""


@dataclass(frozen=True)
class DrawingCost:
    """What an image costs that is drawn with the recipe's settings (``sample``)."""

    batch: int
    """Images that are drawn at once."""
    flops: int
    """Operations, decoding included."""
    seconds: float
    """Of a GPU; on CPUs, of a worker."""
    reading_share: float
    """Share of that in which memory is waited for."""


def drawing_cost(case: Case, batch: int) -> DrawingCost:
    """Draw images with the recipe's settings: a roofline for each pass (see the module's docstring).

    Orders that are known only after some cells (``order-head``) are counted as given ones, drafts as one cell a pass.
    """
    spec, sample, precision = case.spec, case.recipe.sample, case.recipe.parallel.precision
    sizes = cells_per_step(spec.cells, sample.steps)
    steps = drawing_steps(spec, sizes, guided=sample.guided, ordered=sample.order not in (None, "confidence"))
    weights = (case.parameters.blocks + spec.vocab_size * spec.dim) * BYTES[precision]
    of_row = spec.layers * 2 * (spec.kv_heads or spec.heads) * spec.head_dim * BYTES[precision]
    branches, at_once = batch * (1 + sample.guided), ROWS_AT_ONCE["cpu" if case.cluster.on_cpu else "cuda"]
    computing = reading = 0.0
    for step in steps:
        loads = -(-branches // max(1, at_once // max(1, step.rows)))
        compute_s = batch * step.flops / case.decoding_rate
        read_s = (loads * weights + branches * step.keys * of_row) / case.bandwidth
        computing, reading = computing + compute_s * (compute_s >= read_s), reading + read_s * (read_s > compute_s)
    decoding = decoder_flops(case.recipe.tokenizer.image, case.recipe.grid)
    seconds = (computing + reading) / batch + decoding / case.float32_rate
    return DrawingCost(batch, sum(step.flops for step in steps) + decoding, seconds, reading / batch / seconds)


@dataclass(frozen=True)
class SamplesPlan:
    """As many samples of a model as published distances rest on, and of all models of the run. No stage of it."""

    images: int
    """Of a model."""
    models: int
    """Models of the run that draw: any-order, ordered, control, and those of arms and seeds."""
    drawing: DrawingCost
    gpu_hours: float
    """Of a model."""
    money: float


def plan_samples(case: Case) -> SamplesPlan:
    """Plan ``oar sample --labels balanced --images 50000``, or as many captions, with the recipe's settings."""
    recipe, drawing = case.recipe, drawing_cost(case, PICTURES_AT_ONCE)
    left_out = {"base"} | (set() if recipe.pipeline.control else {"control"})
    models = 1 if case.spec.layout == "raster" else len(set(recipe.models()) - left_out)
    hours = SAMPLES * drawing.seconds / 3600
    return SamplesPlan(SAMPLES, models, drawing, hours, hours * case.cluster.price)


@dataclass(frozen=True)
class EvaluationPlan:
    """The stage ``evaluate``: on the GPUs of one node, or on the CPU cores of workers that have none."""

    drawn: int
    """Images that each of :attr:`models` draws."""
    models: int
    flops: float
    processes: int
    on: str
    seconds: float
    gpu_hours: float
    money: float


def plan_evaluation(case: Case) -> EvaluationPlan | None:
    """Plan the stage ``evaluate``: sampled images, likelihoods under several orders, two images by brute force; None for raster models.

    Edits, features, reading of pictures and loading of models are left out.
    """
    recipe, spec = case.recipe, case.spec
    if spec.layout == "raster":
        return None
    drawn, scored = max(recipe.evaluate.feature_images, recipe.sample.images), recipe.evaluate.nll_images
    if case.images is not None:
        heldout = round(case.images.count * recipe.data.heldout_fraction / recipe.data.train_fraction)
        drawn, scored = min(drawn, heldout), min(scored, heldout)
    models = len(MODELS) - 1 - (not recipe.pipeline.control)  # the base model does not draw, and has one likelihood
    drawing = drawing_cost(case, min(TASK_IMAGES, max(drawn, 1)))
    own = models * scored * OWN_ORDERS * plain_order_flops(case)
    likelihoods = (1 + models * NLL_PASSES) * scored * forward_flops(spec)
    brute = BRUTE_FORCE_IMAGES * checked_order_flops(case)  # one process does it, in float32
    busy_s = models * drawn * drawing.seconds + own / case.decoding_rate + (likelihoods + brute) / case.float32_rate
    gpus = min(case.cluster.per_node, case.workers)
    processes, on = (recipe.parallel.max_workers, "CPUs") if case.cluster.on_cpu else (gpus, "GPUs")
    start_s = case.assumed("actors.start_on_cpu_s" if case.cluster.on_cpu else "actors.start_s")
    seconds = start_s + max(busy_s / processes, brute / case.float32_rate)
    hours = processes * seconds / 3600
    flops = float(models * drawn * drawing.flops + own + likelihoods + brute)
    return EvaluationPlan(drawn, models, flops, processes, on, seconds, hours, hours * case.cluster.price)
