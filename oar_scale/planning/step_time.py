"""The time of a training step, from operations, bytes and rates.

    computing       useful operations of the micro-batches / (peak x MFU), and more where blocks are computed again or not compiled
    communication   bytes between workers / link speed. Most of ZeRO-3's hides behind the computation; under ZeRO 1 and 2 most of the
                    reduction of gradients behind the backward pass (of the last micro-batch, of each), and nothing of the rest
    offload         gradients and parameters over PCIe, AdamW at the speed of the node's memory
    data            shards from storage at the node's rate, prefetched: a wait is what is left beyond the rest

MFU is a published share of the peak, of trainings whose blocks are compiled or made of fused kernels: it already holds what its source
spent on its optimizer and its own communication.

Bytes that a worker sends in a step (P parameters, e bytes each, A micro-batches, times (W - 1) / W):

    ZeRO 0, 1       2 e P all-reduce, then under 1: e P all-gather
    ZeRO 2          2 e P A all-reduce (DeepSpeed reduces whole buckets: use_multi_rank_bucket_allreduce), e P all-gather
    ZeRO 3          A (2 e P all-gather + e P reduce-scatter); the second gather inside the node under hpZ, fewer bytes when quantised
"""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.config.deepspeed import overlaps, reduce_bucket
from oar_scale.config.schema import ParallelConfig
from oar_scale.model.flops import training_flops, useful_flops
from oar_scale.planning.activations import BYTES
from oar_scale.planning.case import Case

MATRICES = 5
"""Of a block: queries with keys and values, attention's output, and three of the feed-forward."""
BACKWARD = 2 / 3
"""Share of the backward pass in the time of both."""
REDUCED = "all-reduce of gradients"
ADAMW = 28
"""Bytes that AdamW reads and writes for a parameter: weight, gradient and two moments; all but the gradient back."""


@dataclass(frozen=True)
class StepTime:
    """Seconds and bytes of one optimizer step."""

    compute_s: float
    recompute_s: float
    """Of ``compute_s``: blocks that activation checkpointing computes again."""
    sent: dict[str, float]
    """Bytes that a worker sends, by collective."""
    communication_s: float
    exposed_s: float
    """Communication that nothing hides."""
    offload_s: float
    data_wait_s: float
    seconds: float
    images_per_s: float
    mfu: float
    """Of the whole step: useful operations against the peak."""


def step_time(case: Case, parallel: ParallelConfig, global_batch: int) -> StepTime:
    """One step of ``global_batch`` images on all of the case's workers."""
    assumed, own = case.assumed, global_batch / case.workers
    useful = own * useful_flops(case.spec) / case.worker_flops
    compute = useful * (1.0 if case.cluster.on_cpu or parallel.compiles_blocks else assumed("time.eager"))
    again = compute * _recompute_share(case, parallel)
    accumulation = global_batch // (parallel.micro_batch * case.workers)
    sent, seconds = communication(case, parallel, accumulation)
    hidden = _hidden(case, parallel, sent, seconds, (compute + again) / (accumulation if parallel.zero_stage == 1 else 1))
    offload = _offload(case, parallel)
    busy = compute + again + seconds - hidden + offload
    read = global_batch / case.cluster.nodes * case.shard.sample / (assumed("storage.s3_read_gb_s") * 1e9)
    loaded = own / assumed("time.loader_samples_per_s")
    wait = max(0.0, max(read, loaded) - busy)
    return StepTime(
        compute_s=compute + again,
        recompute_s=again,
        sent=sent,
        communication_s=seconds,
        exposed_s=seconds - hidden,
        offload_s=offload,
        data_wait_s=wait,
        seconds=busy + wait,
        images_per_s=global_batch / (busy + wait),
        mfu=case.mfu * useful / (busy + wait),
    )


def communication(case: Case, parallel: ParallelConfig, accumulation: int) -> tuple[dict[str, float], float]:
    """Bytes that a worker sends in a step, by collective, and the seconds that takes."""
    workers, cluster = case.workers, case.cluster
    if workers == 1:
        return {}, 0.0
    size = case.parameters.total * BYTES[parallel.precision] * (workers - 1) / workers
    link = cluster.link(workers)
    started = collectives(case, parallel, accumulation) * case.assumed("time.collective_s")
    if parallel.zero_stage < 3:
        reduced = 2 * size * (accumulation if parallel.zero_stage == 2 else 1)
        sent = {REDUCED: reduced} | ({"all-gather of weights": size} if parallel.zero_stage else {})
        return sent, started + sum(sent.values()) / link
    weight = size * (0.5 if parallel.quantized_weights else 1) * accumulation
    gradient = size * (0.25 if parallel.quantized_gradients else 1) * accumulation
    sent = {"all-gather, forward": weight, "all-gather, backward": weight, "reduce-scatter of gradients": gradient}
    near = cluster.link(parallel.hpz_workers) if parallel.hpz_workers > 1 else link
    return sent, started + (weight + gradient) / link + weight / near


def collectives(case: Case, parallel: ParallelConfig, accumulation: int) -> int:
    """Number of collectives in a step: one a bucket, and under ZeRO-3 two for each matrix besides, which is gathered when it is needed."""
    buckets = -(-case.parameters.total // reduce_bucket(parallel, case.workers))
    if parallel.zero_stage < 3:
        return buckets * (accumulation if parallel.zero_stage == 2 else 1) + (parallel.zero_stage > 0)
    return accumulation * (2 * (MATRICES * case.spec.layers + 2) + buckets)


def _hidden(case: Case, parallel: ParallelConfig, sent: dict[str, float], seconds: float, passes_s: float) -> float:
    """Seconds of communication behind ``passes_s`` seconds of forward and backward passes."""
    if parallel.zero_stage == 3:
        return min(case.assumed("time.hidden_share") * seconds, passes_s)
    if not overlaps(parallel, case.workers):
        return 0.0
    reduction_s = sent[REDUCED] / case.cluster.link(case.workers)
    return min(case.assumed("time.hidden_share") * reduction_s, BACKWARD * passes_s)


def _recompute_share(case: Case, parallel: ParallelConfig) -> float:
    """Recomputation of activation checkpointing, as a share of the useful operations."""
    match parallel.activation_checkpointing:
        case "full":
            return training_flops(case.spec, recompute=True) / training_flops(case.spec) - 1
        case "selective":
            return case.assumed("time.selective_recompute")
    return 0.0


def _offload(case: Case, parallel: ParallelConfig) -> float:
    """Seconds of offload: transfers over PCIe, and AdamW in the memory of the node."""
    if parallel.offload == "none":
        return 0.0
    share = case.parameters.total / case.workers
    moved = 2 * share * BYTES[parallel.precision] * (2 if parallel.offload == "optimizer_and_parameters" else 1)
    at_once = min(case.workers, case.cluster.per_node)
    return moved / (case.assumed("time.pcie_gb_s") * 1e9) + share * at_once * ADAMW / (case.assumed("time.host_memory_gb_s") * 1e9)
