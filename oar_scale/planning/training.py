"""A training stage from its first step to its last: time, checkpoints, failures, money."""

from __future__ import annotations

import math
from dataclasses import dataclass

from oar_scale.config.schema import ParallelConfig, TrainingConfig
from oar_scale.model.flops import forward_flops, training_flops
from oar_scale.model.spec import ModelSpec
from oar_scale.planning.assumptions import Assumptions
from oar_scale.planning.cluster import Cluster
from oar_scale.planning.failures import Saving, Survival, best_interval, between_failures, survive
from oar_scale.planning.speed import Step, step_time
from oar_scale.planning.traffic import Checkpoint, Shard, checkpoint

HELDOUT_IMAGES = 256
"""That a training evaluates (``training/inputs.py``)."""


@dataclass(frozen=True)
class Saves:
    """The checkpoints of a stage."""

    bytes: int
    every: int
    """Steps, as the recipe says."""
    stall_s: float
    upload_s: float
    puts: int
    puts_per_s: float
    """While one is uploaded."""
    best_every: int | None
    """Steps, by Young and Daly; None where nothing fails."""
    between_failures_s: float | None


@dataclass(frozen=True)
class Stage:
    """One training stage."""

    name: str
    steps: int
    global_batch: int
    epochs: float | None
    """None: nobody knows how many images there are."""
    tokens: int
    """Rows of the trunk, those of the condition included."""
    flops: int
    """As they are computed, both passes."""
    step: Step
    evaluation_s: float
    saves: Saves
    survival: Survival
    best_survival: Survival | None
    """With ``best_every``."""
    hours: float
    gpu_hours: float
    money: float


def plan_stage(
    name: str,
    training: TrainingConfig,
    spec: ModelSpec,
    parallel: ParallelConfig,
    found: Cluster,
    *,
    workers: int,
    images: int | None,
    shard: Shard,
    assumed: Assumptions,
    mfu: float,
    per_gpu_year: float,
    seed: int,
) -> Stage:
    """Plan one stage on ``workers`` workers of ``found``."""
    batch, gpus = training.global_batch, workers * max(1, parallel.gpus_per_worker)
    step = step_time(spec, parallel, found, workers=workers, global_batch=batch, sample_bytes=shard.sample, assumed=assumed, mfu=mfu)
    evaluated = training.steps // training.evaluate_every * len(training.evaluate_orders) * -(-HELDOUT_IMAGES // workers)
    evaluation_s = evaluated * forward_flops(spec) / (found.flops * max(1, parallel.gpus_per_worker) * mfu)
    written = checkpoint(spec, workers, average=training.ema_decay is not None)
    apart = between_failures(per_gpu_year, gpus)
    saving = _saving(written, training.checkpoint_every * step.seconds, found, assumed, apart)
    work = training.steps * step.seconds + evaluation_s
    survival = survive(work, saving, seed=seed)
    best, best_survival = None, None
    if not math.isinf(apart):
        best = max(1, min(training.steps, round(best_interval(saving.stall_s, apart) / step.seconds)))
        best_survival = survive(work, _saving(written, best * step.seconds, found, assumed, apart), seed=seed)
    return Stage(
        name=name,
        steps=training.steps,
        global_batch=batch,
        epochs=None if images is None else training.steps * batch / images,
        tokens=training.steps * batch * spec.rows,
        flops=training.steps * batch * training_flops(spec, recompute=parallel.activation_checkpointing == "full"),
        step=step,
        evaluation_s=evaluation_s,
        saves=Saves(
            bytes=written.bytes,
            every=training.checkpoint_every,
            stall_s=saving.stall_s,
            upload_s=saving.upload_s,
            puts=written.puts,
            puts_per_s=written.puts / saving.upload_s,
            best_every=best,
            between_failures_s=None if math.isinf(apart) else apart,
        ),
        survival=survival,
        best_survival=best_survival,
        hours=survival.hours,
        gpu_hours=survival.hours * gpus,
        money=survival.hours * gpus * found.price,
    )


def _saving(written: Checkpoint, interval_s: float, found: Cluster, assumed: Assumptions, apart: float) -> Saving:
    """A save stops training while it goes to the local disk, and for as long as the one before is still on its way."""
    each = written.bytes / found.nodes / 1e9
    upload = each / assumed("storage.s3_write_gb_s") + 2 * assumed("storage.s3_request_s")
    return Saving(
        interval_s=interval_s,
        stall_s=each / assumed("storage.disk_write_gb_s") + max(0.0, upload - interval_s),
        upload_s=upload,
        restart_s=assumed("failures.restart_s") + each / assumed("storage.s3_read_gb_s"),
        between_failures_s=apart,
    )
