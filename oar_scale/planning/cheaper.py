"""The same training on other settings: fewer GPUs, another ZeRO stage, another way to save memory. What would be cheaper?"""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.model.spec import ModelSpec
from oar_scale.planning.assumptions import Assumptions
from oar_scale.planning.cluster import Cluster, workers_of
from oar_scale.planning.failures import between_failures
from oar_scale.planning.fitting import MODES, accumulation, average
from oar_scale.planning.memory import memory, micro_batches
from oar_scale.planning.speed import step_time
from oar_scale.planning.traffic import Shard
from oar_scale.planning.training import Stage

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


def alternatives(
    recipe: Recipe,
    spec: ModelSpec,
    found: Cluster,
    planned: ParallelConfig,
    stages: list[Stage],
    shard: Shard,
    assumed: Assumptions,
    mfu: float,
    per_gpu_year: float,
) -> list[Alternative]:
    """The best few by money; of two that cost the same only the faster one is shown.

    Failures enter by their expected cost, which changes little between these settings.
    """
    planned_money = sum(stage.money for stage in stages)
    tried: list[Alternative] = []
    for part in _sizes(found):
        workers = workers_of(part, planned)
        if not workers or recipe.data.canonical_streams % workers:
            continue
        for parallel in _settings(planned, workers):
            size = _largest(recipe, spec, part, parallel, workers, assumed)
            if size:
                tried.append(
                    _cost(
                        recipe,
                        spec,
                        part,
                        parallel.model_copy(update={"micro_batch": size}),
                        stages,
                        shard,
                        assumed,
                        mfu,
                        per_gpu_year,
                        planned_money,
                    )
                )
    better = sorted((found for found in tried if found.saved >= WORTH), key=lambda a: (a.money, a.hours))
    front: list[Alternative] = []
    for candidate in better:
        if all(candidate.hours < other.hours * (1 - WORTH) for other in front):
            front.append(candidate)
    return front[-SHOWN:]


def _sizes(found: Cluster) -> list[Cluster]:
    """The cluster, and halves of it down to one GPU."""
    sizes, nodes, per_node = [found], found.nodes, found.per_node
    while nodes > 1 or per_node > 1:
        nodes, per_node = (nodes // 2, per_node) if nodes > 1 else (1, per_node // 2)
        sizes.append(found.smaller(nodes, per_node))
    return sizes


def _settings(planned: ParallelConfig, workers: int) -> list[ParallelConfig]:
    plain = {"workers": workers, "hpz_workers": 1, "quantized_weights": False, "quantized_gradients": False, "offload": "none"}
    stages = (1, 2, 3) if planned.precision == "bf16" else (0, 1, 2, 3)
    return [
        planned.model_copy(update={**plain, "zero_stage": stage, "activation_checkpointing": mode}) for stage in stages for mode in MODES
    ]


def _largest(recipe: Recipe, spec: ModelSpec, part: Cluster, parallel: ParallelConfig, workers: int, assumed: Assumptions) -> int:
    for size in micro_batches(recipe, workers):
        setting = parallel.model_copy(update={"micro_batch": size})
        held = memory(
            spec, setting, workers=workers, accumulation=accumulation(recipe, setting, workers), average=average(recipe), assumed=assumed
        )
        if held.total <= part.memory:
            return size
    return 0


def _cost(
    recipe: Recipe,
    spec: ModelSpec,
    part: Cluster,
    parallel: ParallelConfig,
    stages: list[Stage],
    shard: Shard,
    assumed: Assumptions,
    mfu: float,
    per_gpu_year: float,
    planned_money: float,
) -> Alternative:
    workers, hours = workers_of(part, parallel), 0.0
    gpus = workers * max(1, parallel.gpus_per_worker)
    for stage in stages:
        training = recipe.pretrain if stage.name == "pretrain" else recipe.finetune
        step = step_time(
            spec, parallel, part, workers=workers, global_batch=training.global_batch, sample_bytes=shard.sample, assumed=assumed, mfu=mfu
        )
        work = training.steps * step.seconds
        stall = stage.saves.bytes / part.nodes / 1e9 / assumed("storage.disk_write_gb_s")
        interval = training.checkpoint_every * step.seconds
        lost = (interval / 2 + assumed("failures.restart_s")) / between_failures(per_gpu_year, gpus)
        hours += work * (1 + stall / interval) * (1 + lost) / 3600
    money = hours * gpus * part.price
    return Alternative(
        nodes=part.nodes,
        per_node=part.per_node,
        zero_stage=parallel.zero_stage,
        activation_checkpointing=parallel.activation_checkpointing,
        micro_batch=parallel.micro_batch,
        hours=hours,
        money=money,
        saved=1 - money / planned_money,
    )
