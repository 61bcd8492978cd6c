"""What DeepSpeed is told: the recipe's parallelism and optimiser as its JSON.

    global_batch = micro_batch x workers x accumulation

The learning rate starts at the recipe's peak; the training loop sets it before each step, so no scheduler is named here.
"""

from __future__ import annotations

from typing import Any

from oar_scale.config.schema import ParallelConfig, TrainingConfig

_NEVER = 10**9
"""Steps between DeepSpeed's own progress lines: the events of the loop say the same, better."""


def deepspeed_config(parallel: ParallelConfig, training: TrainingConfig, workers: int) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``.

    Args:
        parallel: micro batch, precision, ZeRO stage.
        training: global batch, optimiser, clipping.
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
        "gradient_clipping": training.clip_norm,
        "bf16": {"enabled": parallel.precision == "bf16"},
        "zero_optimization": {"stage": parallel.zero_stage},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.lr,
                "betas": list(training.betas),
                "weight_decay": training.weight_decay,
                "torch_adam": True,  # the plain PyTorch optimiser: DeepSpeed's own kernels need a compiler on every node
            },
        },
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }
