"""Plan of one training stage from its first step to its last: time, checkpoints, failures, money."""

from __future__ import annotations

import math
from dataclasses import dataclass

from oar_scale.config.schema import ParallelConfig, TrainingConfig
from oar_scale.model.flops import forward_flops, training_flops
from oar_scale.planning.case import Case
from oar_scale.planning.failures import CheckpointTiming, Survival, best_interval, between_failures, simulate_failures
from oar_scale.planning.step_time import StepTime, step_time
from oar_scale.planning.traffic import CheckpointTraffic, checkpoint_traffic
from oar_scale.registry import STAGES, kind_of

HELDOUT_IMAGES = 256
"""That a training evaluates (``training/inputs.py``)."""


@dataclass(frozen=True)
class CheckpointPlan:
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
class TrainingStagePlan:
    """One training stage."""

    name: str
    steps: int
    global_batch: int
    epochs: float | None
    """None: the number of images is unknown."""
    tokens: int
    """Rows of the trunk, those of the condition included."""
    flops: int
    """As they are computed, both passes."""
    step: StepTime
    evaluation_s: float
    saves: CheckpointPlan
    survival: Survival
    best_survival: Survival | None
    """With ``best_every``."""
    hours: float
    gpu_hours: float
    money: float


def plan_stage(case: Case, name: str, parallel: ParallelConfig) -> TrainingStagePlan:
    """Plan one training stage."""
    training, spec = training_config(case, name), case.spec
    batch, gpus = training.global_batch, case.workers
    step = step_time(case, parallel, batch)
    evaluation_s = evaluation_seconds(case, training)
    written = checkpoint_traffic(spec, case.workers, average=training.ema_decay is not None)
    saving = checkpoint_timing(case, written, training.checkpoint_every * step.seconds)
    between, work = saving.between_failures_s, training.steps * step.seconds + evaluation_s
    survival = simulate_failures(work, saving, seed=case.seed)
    best, best_survival = None, None
    if not math.isinf(between):
        best = max(1, min(training.steps, round(best_interval(saving.stall_s, between) / step.seconds)))
        best_survival = simulate_failures(work, checkpoint_timing(case, written, best * step.seconds), seed=case.seed)
    return TrainingStagePlan(
        name=name,
        steps=training.steps,
        global_batch=batch,
        epochs=training.steps * batch / case.images.count if case.images else None,
        tokens=training.steps * batch * spec.rows,
        flops=training.steps * batch * training_flops(spec, recompute=parallel.activation_checkpointing == "full"),
        step=step,
        evaluation_s=evaluation_s,
        saves=CheckpointPlan(
            bytes=written.bytes,
            every=training.checkpoint_every,
            stall_s=saving.stall_s,
            upload_s=saving.upload_s,
            puts=written.puts,
            puts_per_s=written.puts / saving.upload_s,
            best_every=best,
            between_failures_s=None if math.isinf(between) else between,
        ),
        survival=survival,
        best_survival=best_survival,
        hours=survival.hours,
        gpu_hours=survival.hours * gpus,
        money=survival.hours * gpus * case.cluster.price,
    )


def training_config(case: Case, name: str) -> TrainingConfig:
    """The section of the recipe that a stage follows; the control has fine-tuning's."""
    return case.recipe.training(STAGES[kind_of(name)].training)


def evaluation_seconds(case: Case, training: TrainingConfig) -> float:
    """Seconds of a stage's evaluations."""
    images = training.steps // training.evaluate_every * len({"random", *training.evaluate_orders}) * -(-HELDOUT_IMAGES // case.workers)
    return images * forward_flops(case.spec) / case.worker_flops


def checkpoint_timing(case: Case, written: CheckpointTraffic, interval_s: float) -> CheckpointTiming:
    """A save stops training while it goes to the local disk, and for as long as the one before is still on its way."""
    assumed, each = case.assumed, written.bytes / case.cluster.nodes / 1e9
    sent = max(each / assumed("storage.s3_write_gb_s"), written.puts / assumed("storage.s3_puts_per_s"))
    upload = sent + 2 * assumed("storage.s3_request_s")
    return CheckpointTiming(
        interval_s=interval_s,
        stall_s=each / assumed("storage.disk_write_gb_s") + max(0.0, upload - interval_s),
        upload_s=upload,
        restart_s=assumed("failures.restart_s") + each / assumed("storage.s3_read_gb_s"),
        between_failures_s=between_failures(case.failures, case.workers),
    )
