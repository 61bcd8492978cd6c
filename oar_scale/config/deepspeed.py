"""DeepSpeed's JSON configuration, made from the recipe's parallelism.

    global_batch = micro_batch x workers x accumulation

The optimizer is ours (``training/optimizer.py``), and the training loop sets its rate before each step, so neither is named here.
"""

from __future__ import annotations

from oar_scale.config.schema import ParallelConfig, TrainingConfig
from oar_scale.json_object import JsonObject

BUCKET = 500_000_000
"""Numbers that DeepSpeed reduces at once (``reduce_bucket_size``)."""
OVERLAP_BUCKET = 100_000_000
"""The same where the reduction overlaps the backward pass. What is in the last bucket hides behind nothing, and a model of 0.3 B in one
bucket would overlap nothing at all. Not measured on a GPU yet: 200 MB of bf16 are well above what an all-reduce needs to fill its links."""
_NEVER = 10**9
"""Steps between DeepSpeed's own progress lines: the events of the loop say the same, better."""


def deepspeed_config(parallel: ParallelConfig, training: TrainingConfig, workers: int) -> JsonObject:
    """Return the configuration for ``deepspeed.initialize``.

    Args:
        parallel: micro batch, precision, ZeRO and its options.
        training: global batch, clipping.
        workers: processes that train, which may differ from ``parallel.workers`` after nodes were lost.

    Raises:
        ValueError: ``global_batch`` is not a multiple of ``micro_batch x workers``.
    """
    accumulation, remainder = divmod(training.global_batch, parallel.micro_batch * workers)
    if remainder or not accumulation:
        raise ValueError(f"global_batch {training.global_batch} is not a multiple of {parallel.micro_batch} x {workers} workers")
    return {
        "train_micro_batch_size_per_gpu": parallel.micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Without ZeRO the optimizer clips, which also has to know the norm.
        "gradient_clipping": training.clip_norm if parallel.zero_stage else 0.0,
        "bf16": {"enabled": parallel.precision == "bf16", "check_grad_overflow": True},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if parallel.sums_in_fp32 else {}),
        "zero_optimization": _zero(parallel, workers),
        "zero_allow_untested_optimizer": True,  # training/optimizer.py: AdamW, element by element as ZeRO needs it
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own kernel would need a compiler on every node
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }


def overlaps(parallel: ParallelConfig, workers: int) -> bool:
    """Whether gradients are reduced while the backward pass still computes others: below ZeRO-3, where DeepSpeed does not do so by itself.

    On GPUs only: a CPU computes and sends with the same cores. Not under offload, whose copies of gradients wait for the reduction anyway.
    """
    return parallel.gpus_per_worker > 0 and workers > 1 and parallel.zero_stage in (1, 2) and parallel.offload == "none"


def reduce_bucket(parallel: ParallelConfig, workers: int) -> int:
    """Numbers that are reduced at once. Where that overlaps the backward pass there are two such buckets."""
    return OVERLAP_BUCKET if overlaps(parallel, workers) else BUCKET


def _zero(parallel: ParallelConfig, workers: int) -> JsonObject:
    zero: JsonObject = {"stage": parallel.zero_stage}
    if overlaps(parallel, workers):
        zero |= {"overlap_comm": True, "reduce_bucket_size": OVERLAP_BUCKET}
    if parallel.hpz_workers > 1:
        zero["zero_hpz_partition_size"] = parallel.hpz_workers
    if parallel.quantized_weights:
        zero["zero_quantized_weights"] = True
    if parallel.quantized_gradients:
        zero["zero_quantized_gradients"] = True
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": parallel.gpus_per_worker > 0}
    if parallel.offload == "optimizer_and_parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": parallel.gpus_per_worker > 0}
    return zero
