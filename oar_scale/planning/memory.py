"""Everything a training worker holds, by part, for each ZeRO stage: what DeepSpeed 0.19 does with P parameters among W workers.

    e = 2 bytes in bf16, 4 in fp32

    part              ZeRO 0    1             2          3
    parameters        e P       e P           e P        e P / W        + e P / hpz_workers, the node's own copy
    gathered          -         -             -          e min(P, 10^9)    those in use, whole
    gradients         e P       e P *         e P / W    e P / W        * e P / W where a step is one micro-batch
    optimiser         8 P       12 P / W      12 P / W   12 P / W       two moments, and float32 weights under ZeRO; 4 P more for an average
    buckets           e b       e (B + b)     e (B + b)  e (B + b)      B = 5 10^8 numbers, b = min(P, B); a CPU touches 2 e b of them

Beside these there are either activations and logits (the backward pass), or the gradients as the optimiser takes them (its step):
(e + 4) P / W in bf16, 4 P / W in fp32, under ZeRO-3 of 10^9 parameters at a time. Offload moves the optimiser's part, and parameters, to
the node's memory. The table was found by counting the tensors of real engines (tests/planning/test_zero_memory.py), and agrees with
DeepSpeed's own estimators where they count the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.model.spec import ModelSpec
from oar_scale.planning import activations
from oar_scale.planning.activations import BYTES, Head, Trunk
from oar_scale.planning.assumptions import Assumptions
from oar_scale.planning.shape import parameters

BUCKET = 500_000_000
"""Numbers that DeepSpeed reduces at once (``reduce_bucket_size``)."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 holds whole (``stage3_max_live_parameters``), and takes one optimiser step for (``sub_group_size``)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker."""

    parameters: int
    gathered: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    activations: int
    logits: int
    """What the loss needs beyond the activations that are kept at that time, where that is more than the backward pass needs."""
    step: int
    """Gradients as the optimiser takes them, when there are no activations and buckets."""
    framework: int
    host: int
    """In the node's memory, for this worker."""

    @property
    def states(self) -> int:
        """Parameters, gradients and the optimiser's state."""
        return self.parameters + self.gradients + self.optimizer + self.average

    @property
    def total(self) -> int:
        """The most at any moment."""
        return self.states + max(self.gathered + self.buckets + self.activations + self.logits, self.step) + self.framework


def memory(
    spec: ModelSpec,
    parallel: ParallelConfig,
    *,
    workers: int,
    accumulation: int,
    average: bool,
    assumed: Assumptions,
    trunk: Trunk | None = None,
) -> Memory:
    """A worker's memory at ``parallel.micro_batch``.

    Args:
        accumulation: micro-batches of a step.
        average: a moving average of the weights is kept.
        trunk: traced; by formula where it is None.
    """
    gpu = parallel.gpus_per_worker > 0
    e, count = BYTES[parallel.precision], parameters(spec)
    total, share = count.total, -(-count.total // workers)
    stage, offloaded = parallel.zero_stage, parallel.offload != "none"
    whole_gradients = stage == 0 or (stage == 1 and accumulation > 1)
    optimizer, averaged = (12 * share, 4 * share * average) if stage else (8 * total, 4 * total * average)
    bucket = min(total, BUCKET)
    found = Memory(
        parameters=_parameters(parallel, total, share, e),
        gathered=e * min(total, LIVE) if stage == 3 else 0,
        gradients=0 if offloaded else e * (total if whole_gradients else share),
        optimizer=0 if offloaded else optimizer,
        average=0 if offloaded else averaged,
        buckets=_buckets(stage, bucket, workers, gpu) * e,
        activations=0,
        logits=0,
        step=_step(stage, share, e) if not offloaded else 0,
        framework=0,
        host=_host(parallel, share, optimizer + averaged, e, count.largest),
    )
    if offloaded:
        found = replace(found, buckets=found.buckets + e * count.largest)  # a gradient on its way
    traced = trunk or activations.trunk(spec, parallel.micro_batch, parallel.precision, parallel.activation_checkpointing)
    head = activations.head(spec, parallel.micro_batch, parallel.precision, gpu=gpu)
    padded = activations.padding(spec, parallel.micro_batch, parallel.precision, parallel.activation_checkpointing) if gpu else 0
    at_work, loss = traced.peak + padded, traced.kept + padded + head.at_work
    found = replace(found, activations=at_work, logits=max(0, loss - at_work))
    if not gpu:
        return replace(found, framework=int(assumed("memory.malloc") * found.total))
    return replace(found, framework=int(assumed("memory.framework_gb") * 1e9 + assumed("memory.fragmentation") * found.total))


def alone(total: int, trunk: Trunk, head: Head) -> int:
    """The peak of a process that trains in float32 without DeepSpeed: its gradients come into being as activations go."""
    states = 3 * 4 * total
    return states + max(trunk.kept + head.at_work, trunk.peak + head.kept, trunk.late + head.kept, 4 * total)


def micro_batches(recipe: Recipe, workers: int) -> list[int]:
    """Micro-batches that divide the global batches of all training stages among the workers, largest first."""
    per_worker = gcd(recipe.pretrain.global_batch, recipe.finetune.global_batch)
    if per_worker % workers:
        return []
    per_worker //= workers
    return [size for size in range(per_worker, 0, -1) if per_worker % size == 0]


def settings(parallel: ParallelConfig) -> Iterator[ParallelConfig]:
    """The ZeRO stages and offloads there are, at the given precision and micro-batch."""
    plain = {"hpz_workers": 1, "quantized_weights": False, "quantized_gradients": False, "offload": "none"}
    for stage in (0, 1, 2, 3):
        if stage == 0 and parallel.precision == "bf16":
            continue  # it would keep no float32 weights
        kept = {} if stage == 3 and parallel.zero_stage == 3 else plain
        yield parallel.model_copy(update={**kept, "offload": "none", "zero_stage": stage})
        if stage in (2, 3):
            yield parallel.model_copy(update={**plain, "offload": "optimizer", "zero_stage": stage})
    yield parallel.model_copy(update={**plain, "offload": "optimizer_and_parameters", "zero_stage": 3})


def _parameters(parallel: ParallelConfig, total: int, share: int, e: int) -> int:
    if parallel.zero_stage < 3:
        return e * total
    own = 0 if parallel.offload == "optimizer_and_parameters" else e * share
    return own + (e * -(-total // parallel.hpz_workers) if parallel.hpz_workers > 1 else 0)


def _buckets(stage: int, bucket: int, workers: int, gpu: bool) -> int:
    if stage == 0:
        return bucket if workers > 1 else 0
    return (BUCKET if gpu else bucket) + bucket


def _step(stage: int, share: int, e: int) -> int:
    """Beside the share of the gradients that is there already: flattened, and in float32 where it was not."""
    if stage == 0:
        return 0
    return (4 if e == 4 else e + 4) * (min(share, LIVE) if stage == 3 else share)


def _host(parallel: ParallelConfig, share: int, states: int, e: int, largest: int) -> int:
    if parallel.offload == "none":
        return 0
    # The optimiser's state, gradients in float32 and as they come, a copy of the parameters on their way back.
    parameters = e * share if parallel.offload == "optimizer_and_parameters" else 0
    return states + 4 * share + e * share + e * largest + parameters
