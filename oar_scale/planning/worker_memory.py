"""Memory of a training worker, by part, for each ZeRO stage: what DeepSpeed 0.19 holds for P parameters on W workers.

    e = 2 bytes in bf16, 4 in fp32;  g = 4 bytes where gradients are added up in fp32, else e

    part              ZeRO 0    1             2          3
    parameters        e P       e P           e P        e P / W        + e P / hpz_workers, the node's own copy
    gathered          -         -             -          e min(P, 10^9)    those in use, whole
    gradients         e P       e P *         g P / W    g P / W        * e P / W where a step is one micro-batch
    optimizer         8 P       12 P / W      12 P / W   12 P / W       two moments, and float32 weights under ZeRO; 4 P more for an average
    buckets           e b       e (B + b)     e (B + b)  e (B + b)      B = 5 10^8 numbers, b = min(P, B); a CPU touches 2 e b of them;
                                                                        overlapping, e (2 B + b) with B = 10^8

Besides weights, optimizer and average a worker holds, at successive moments of a step (the largest counts):

    forward     activations that are kept, and the memory of the loss: logits, and its gradients so far
    backward    activations, the head's gradient, the bucket B (a CPU touches of it what gradients have come)
    late        the first block's activations with all gradients whole: ZeRO 0 and 1, which reduce at the end (1 not where that overlaps)
    reduction   the bucket and its copy b, with the activations that are left when the first bucket is full: none where P < B
    step        gradients as the optimizer takes them: (e + 4) P / W in bf16, 4 P / W in fp32, under ZeRO-3 of 10^9 parameters at a time;
                where bf16's are added up in fp32, ZeRO-2 has them as it takes them, and e P / W of new parameters

and gradients from the micro-batches before (or the buffer they are added to in fp32, and one of them as it is added), gathered parameters
and ZeRO-3's bucket in all passes. Offload moves the optimizer's part,
and parameters, to the node's memory. The table was found by counting the tensors of real engines (tests/planning/test_zero_memory.py),
and agrees with DeepSpeed's own estimators where they count the same; the maximum is what real training workers take on a CPU
(tests/planning/test_planned_memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from oar_scale.config.deepspeed import overlaps, reduce_bucket
from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.model.spec import ModelSpec
from oar_scale.planning import activations
from oar_scale.planning.activations import BYTES, HeadActivations, TrunkActivations
from oar_scale.planning.assumptions import Assumptions
from oar_scale.planning.shape import parameters

LIVE = 1_000_000_000
"""Parameters that ZeRO-3 holds whole (``stage3_max_live_parameters``), and takes one optimizer step for (``sub_group_size``)."""


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of one worker, by part."""

    parameters: int
    gathered: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    activations: int
    """Maximum in the backward pass."""
    logits: int
    """Logits with all other memory of the loss, after the forward pass."""
    step: int
    """Gradients as the optimizer takes them, when there are no activations and buckets."""
    moments: dict[str, int]
    """All that is held besides weights, optimizer and average, by moment of the step."""
    worst: str
    """The moment of the largest sum."""
    tensors: int
    """Everything that torch has allocated at that moment."""
    other: int
    """On a GPU, framework and fragmentation; on a CPU, freed memory that the allocator keeps."""
    total: int
    """``tensors`` and ``other``."""
    host: int
    """Offloaded to the memory of the node, for this worker."""

    @property
    def states(self) -> int:
        """Parameters, gradients and the optimizer's state."""
        return self.parameters + self.gradients + self.optimizer + self.average


def worker_memory(
    spec: ModelSpec,
    parallel: ParallelConfig,
    *,
    workers: int,
    accumulation: int,
    average: bool,
    assumed: Assumptions,
    trunk: TrunkActivations | None = None,
) -> WorkerMemory:
    """A worker's memory at ``parallel.micro_batch``.

    Args:
        accumulation: micro-batches of a step.
        average: whether a moving average of the weights is kept.
        trunk: activations that were traced; None: by formula.
    """
    gpu = parallel.gpus_per_worker > 0
    e, count = BYTES[parallel.precision], parameters(spec)
    total, share = count.total, -(-count.total // workers)
    stage, offloaded = parallel.zero_stage, parallel.offload != "none"
    whole_gradients = stage == 0 or (stage == 1 and accumulation > 1)
    g = 4 if parallel.sums_in_fp32 else e
    early = overlaps(parallel, workers)
    bucket = reduce_bucket(parallel, workers)
    gradients = 0 if offloaded else e * total if whole_gradients else g * share
    optimizer, averaged = (12 * share, 4 * share * average) if stage else (8 * total, 4 * total * average)
    traced = trunk or activations.trunk(spec, parallel.micro_batch, parallel.precision, parallel.activation_checkpointing)
    head = activations.head(spec, parallel.micro_batch, parallel.precision, gpu=gpu)
    padded = activations.padding(spec, parallel.micro_batch, parallel.precision, parallel.activation_checkpointing) if gpu else 0
    sizes = _Sizes(
        gradients=e * total,
        share=0 if offloaded else g * share,
        earlier=gradients if accumulation > 1 or stage == 3 or g > e else 0,
        gathered=e * min(total, LIVE) if stage == 3 else 0,
        bucket=(e * bucket * (1 + early) if gpu else 0) if stage else 0,
        copy=e * min(total, bucket) if stage or workers > 1 else 0,
        in_transfer=e * count.largest if offloaded else 4 * count.largest if stage == 2 and g > e else 0,
        in_place=g > e,
        added=4 * -(-min(total, bucket) // workers) if stage == 3 and g > e and accumulation > 1 else 0,
    )
    step = 0 if offloaded else e * share if stage == 2 and g > e else _step(stage, share, g)
    moments = {**_passes(stage, early, sizes, TrunkActivations(*(size + padded for size in traced)), head)}
    # Under ZeRO 1 the buckets have taken whole gradients apart by then, if they are reduced as they come.
    moments["step"] = (g * share if stage == 1 and early else gradients) + step
    weights = _parameters(parallel, total, share, e)
    tensors = weights + (0 if offloaded else optimizer + averaged) + max(moments.values())
    if gpu:
        other = int(assumed("memory.framework_gb") * 1e9 + assumed("memory.fragmentation") * tensors)
    else:
        other = int(assumed("memory.malloc") * tensors)
    return WorkerMemory(
        parameters=weights,
        gathered=sizes.gathered,
        gradients=gradients,
        optimizer=0 if offloaded else optimizer,
        average=0 if offloaded else averaged,
        buckets=sizes.buckets(stage),
        activations=traced.peak + padded,
        logits=head.working,
        step=step,
        moments=moments,
        worst=max(moments, key=moments.__getitem__),
        tensors=tensors,
        other=other,
        total=tensors + other,
        host=_host(parallel, share, optimizer + averaged, e, count.largest),
    )


@dataclass(frozen=True)
class _Sizes:
    """Bytes of gradients, gathered weights and buckets in a pass."""

    gradients: int
    """All of them, whole."""
    share: int
    """Those that this worker keeps."""
    earlier: int
    """Those of the micro-batches before."""
    gathered: int
    bucket: int
    """Allocated before a gradient is in it; a CPU's is there as far as it is filled."""
    copy: int
    """Of the gradients in a full bucket."""
    in_transfer: int
    """The gradient that is being copied to the node's memory, or to float32."""
    in_place: bool
    """Under ZeRO 2: gradients are added to the earlier ones as they come, not when all of them are there."""
    added: int
    """In float32, of a bucket's gradients, as they are added to those of before."""

    def buckets(self, stage: int) -> int:
        """Bytes of a full bucket, its copy, and what is made of it."""
        return (max(self.bucket, self.copy) if stage else 0) + self.copy + self.in_transfer + self.added


def _passes(stage: int, early: bool, sizes: _Sizes, trunk: TrunkActivations, head: HeadActivations) -> dict[str, int]:
    """Bytes besides weights, optimizer and average at each moment of a pass (see the module's docstring).

    Args:
        early: gradients are reduced as they come, also under ZeRO 1.
    """
    stays = sizes.gathered + sizes.earlier + (max(sizes.bucket, sizes.copy) if stage == 3 else 0)
    comes = stays + (sizes.bucket if stage in (1, 2) else 0) + sizes.in_transfer
    several = sizes.gradients > sizes.copy  # buckets: what was reduced of the first is there when the next one is full
    whole = sizes.earlier or not early  # under ZeRO 1: gradients that no bucket has taken yet
    beside = (
        sizes.gradients,
        (sizes.gradients - sizes.copy) * bool(whole) + sizes.share * several,
        sizes.share * min(several + bool(sizes.earlier), 1 if sizes.in_place else 2),
        sizes.share,
    )[stage]
    left = 1 - sizes.copy / sizes.gradients if stage > 1 or early else 0.0
    moments = {
        "forward": stays + trunk.kept + head.working,
        "backward": comes + trunk.peak + head.kept,
        "reduction": sizes.gathered + sizes.buckets(stage) + beside + int(left * trunk.peak),
    }
    if stage < 2 and not sizes.earlier and not early:
        moments["late"] = comes + trunk.late + head.kept
    return moments


def micro_batch_sizes(recipe: Recipe, workers: int) -> list[int]:
    """Micro-batches that divide the global batches of all training stages among the workers, largest first."""
    per_worker = gcd(recipe.pretrain.global_batch, recipe.finetune.global_batch)
    if per_worker % workers:
        return []
    per_worker //= workers
    return [size for size in range(per_worker, 0, -1) if per_worker % size == 0]


def zero_settings(parallel: ParallelConfig) -> Iterator[ParallelConfig]:
    """All ZeRO stages and offloads, at the given precision and micro-batch."""
    plain = {"hpz_workers": 1, "quantized_weights": False, "quantized_gradients": False, "offload": "none"}
    for stage in (0, 1, 2, 3):
        if stage == 0 and parallel.precision == "bf16":
            continue  # DeepSpeed would keep no float32 weights
        if stage == 1 and parallel.sums_in_fp32:
            continue  # DeepSpeed would take another optimizer, whose checkpoints are not ours
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


def _step(stage: int, share: int, e: int) -> int:
    """Bytes of the optimizer step beside the gradients that exist already: flattened, and in float32 where it was not."""
    if stage == 0:
        return 0
    return (4 if e == 4 else e + 4) * (min(share, LIVE) if stage == 3 else share)


def _host(parallel: ParallelConfig, share: int, states: int, e: int, largest: int) -> int:
    if parallel.offload == "none":
        return 0
    # The optimizer's state, gradients in float32 and as they come, a copy of the parameters on their way back.
    parameters = e * share if parallel.offload == "optimizer_and_parameters" else 0
    return states + 4 * share + e * share + e * largest + parameters
