"""Cheaper settings for the same training: fewer GPUs, another ZeRO stage, other activation checkpointing."""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.config.schema import ParallelConfig
from oar_scale.planning.case import Case
from oar_scale.planning.cluster import Cluster
from oar_scale.planning.memory_fit import MODES, fits_on, memory_function
from oar_scale.planning.step_time import step_time
from oar_scale.planning.traffic import checkpoint_traffic
from oar_scale.planning.training_stage import TrainingStagePlan, checkpoint_timing, evaluation_seconds, training_config
from oar_scale.planning.worker_memory import micro_batch_sizes

WORTH = 0.03
"""A smaller share of the money, or of the time, is within what the assumptions leave open."""
SHOWN = 4


@dataclass(frozen=True)
class Alternative:
    """Other settings for the training stages together."""

    nodes: int
    per_node: int
    zero_stage: int
    activation_checkpointing: str
    micro_batch: int
    hours: float
    money: float
    saved: float
    """Share of the plan's money."""


def alternatives(case: Case, planned: ParallelConfig, stages: list[TrainingStagePlan]) -> list[Alternative]:
    """The cheapest few settings. A slower one has to be cheaper by at least ``WORTH`` than every faster one.

    Failures enter by their expected cost, which changes little between these settings.
    """
    money = sum(stage.money for stage in stages)
    tried: list[Alternative] = []
    for part in _smaller_clusters(case.cluster):
        smaller = case.on(part)
        if not smaller.workers or case.recipe.data.canonical_streams % smaller.workers:
            continue
        for setting in _settings(planned, smaller.workers):
            if (parallel := _largest(smaller, setting)) is not None:
                tried.append(_cost(smaller, parallel, stages, money))
    front: list[Alternative] = []
    for candidate in sorted((one for one in tried if one.saved >= WORTH), key=lambda one: (one.hours, one.money)):
        if all(candidate.money < faster.money * (1 - WORTH) for faster in front):
            front.append(candidate)
    return sorted(front, key=lambda one: one.money)[:SHOWN]


def _smaller_clusters(cluster: Cluster) -> list[Cluster]:
    """The cluster, and halves of it down to one GPU."""
    clusters, nodes, per_node = [cluster], cluster.nodes, cluster.per_node
    while nodes > 1 or per_node > 1:
        nodes, per_node = (nodes // 2, per_node) if nodes > 1 else (1, per_node // 2)
        clusters.append(cluster.part(nodes, per_node))
    return clusters


def _settings(planned: ParallelConfig, workers: int) -> list[ParallelConfig]:
    """All ZeRO stages and kinds of checkpointing without offload."""
    plain = {"workers": workers, "hpz_workers": 1, "quantized_weights": False, "quantized_gradients": False, "offload": "none"}
    stages = (1, 2, 3) if planned.precision == "bf16" else (0, 1, 2, 3)
    return [
        planned.model_copy(update={**plain, "zero_stage": stage, "activation_checkpointing": mode}) for stage in stages for mode in MODES
    ]


def _largest(case: Case, setting: ParallelConfig) -> ParallelConfig | None:
    """The setting with the largest micro-batch that fits; None where none does."""
    holds = memory_function(case)
    sizes = (setting.model_copy(update={"micro_batch": size}) for size in micro_batch_sizes(case.recipe, case.workers))
    return next((parallel for parallel in sizes if fits_on(case, holds(parallel))), None)


def _cost(case: Case, parallel: ParallelConfig, stages: list[TrainingStagePlan], planned_money: float) -> Alternative:
    """Hours and money of all training stages with these settings, failures by their expected cost."""
    hours = 0.0
    for stage in stages:
        training = training_config(case, stage.name)
        step = step_time(case, parallel, training.global_batch)
        interval = training.checkpoint_every * step.seconds
        saving = checkpoint_timing(case, checkpoint_traffic(case.spec, case.workers, average=training.ema_decay is not None), interval)
        lost = (interval / 2 + saving.upload_s + saving.restart_s) / saving.between_failures_s
        work = training.steps * step.seconds * (1 + saving.stall_s / interval) + evaluation_seconds(case, training)
        hours += work * (1 + lost) / 3600
    money = hours * case.workers * case.cluster.price
    return Alternative(
        nodes=case.cluster.nodes,
        per_node=case.cluster.per_node,
        zero_stage=parallel.zero_stage,
        activation_checkpointing=parallel.activation_checkpointing,
        micro_batch=parallel.micro_batch,
        hours=hours,
        money=money,
        saved=1 - money / planned_money if planned_money else 0.0,
    )
