"""The DeepSpeed settings of a recipe, given to the real DeepSpeed: ZeRO-2 on CPU over gloo."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest
from launcher import run_workers

from oar_scale.config.deepspeed import OVERLAP_BUCKET, deepspeed_config
from oar_scale.config.schema import ParallelConfig, TrainingConfig

GLOBAL_BATCH, STEPS, WIDTH = 8, 6, 16
TRAINING = TrainingConfig(global_batch=GLOBAL_BATCH, lr=0.02, weight_decay=0.1, clip_norm=0.5)


OVERLAP = {"overlap_comm": True, "reduce_bucket_size": 200}
"""As on GPUs, but for buckets that so small a model fills several of."""


def train(workers: int, parallel: ParallelConfig, result: str, zero: dict[str, object]) -> None:
    """Fit a small regression; rank 0 writes the mean loss of each global step and the optimizer's settings."""
    import deepspeed
    import torch
    from torch import nn

    from oar_scale.distributed.deepspeed_optimizer import DeepSpeedAdamW

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    deepspeed.init_distributed("gloo", verbose=False)
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, 1))
    inputs, weights = torch.randn(STEPS, GLOBAL_BATCH, WIDTH), torch.randn(WIDTH, 1)
    groups = [{"params": list(model.parameters()), "weight_decay": TRAINING.weight_decay}]
    given = DeepSpeedAdamW(groups, lr=TRAINING.lr, betas=TRAINING.betas, ema_decay=None)
    config = deepspeed_config(parallel, TRAINING, workers)
    config["zero_optimization"] |= zero
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=given, config=config)
    given.armed = True
    dtype = next(engine.parameters()).dtype
    losses = []
    for _ in range(2):
        for batch in inputs:
            total = torch.zeros(())
            for micro in batch.view(-1, workers, parallel.micro_batch, WIDTH)[:, rank]:
                loss = ((engine(micro.to(dtype)).float() - micro @ weights) ** 2).mean()
                engine.backward(loss)
                engine.step()
                total += loss.detach() / engine.gradient_accumulation_steps()
            torch.distributed.all_reduce(total)
            losses.append(float(total) / workers)
    if rank == 0:
        group = optimizer.param_groups[0]
        settings = {name: group[name] for name in ("lr", "betas", "weight_decay")}
        inner = type(optimizer.optimizer).__name__
        report = {
            "losses": losses,
            "settings": settings,
            "optimizer": inner,
            "dtype": str(dtype),
            "stage": engine.zero_optimization_stage(),
        }
        Path(result).write_text(json.dumps(report))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(workers: int, parallel: ParallelConfig, folder: Path, **zero: object) -> dict[str, object]:
    result = folder / f"{workers}-{parallel.precision}.json"
    run_workers(train, workers, workers, parallel, str(result), zero)
    report: dict[str, object] = json.loads(result.read_text())
    return report


def test_two_workers_learn_what_one_learns_with_accumulation(tmp_path: Path) -> None:
    parallel = ParallelConfig(micro_batch=4, zero_stage=2, precision="fp32")
    one, two = run(1, parallel, tmp_path), run(2, parallel, tmp_path)
    losses = one["losses"]
    assert isinstance(losses, list) and losses[-1] < losses[0]
    assert two["losses"] == pytest.approx(losses, rel=1e-4)
    assert two["stage"] == 2
    assert two["settings"] == {"lr": 0.02, "betas": [0.9, 0.95], "weight_decay": 0.1}
    assert two["optimizer"] == "DeepSpeedAdamW"


def test_bf16_zero_2_learns_on_two_workers(tmp_path: Path) -> None:
    report = run(2, ParallelConfig(micro_batch=2, zero_stage=2, precision="bf16"), tmp_path)
    losses = report["losses"]
    assert report["dtype"] == "torch.bfloat16"
    assert isinstance(losses, list) and sum(losses[STEPS:]) < 0.9 * sum(losses[:STEPS])


@pytest.mark.parametrize("stage", [1, 2])
def test_overlapped_reduction_changes_no_bit(stage: Literal[1, 2], tmp_path: Path) -> None:
    """Two micro-batches a step; gradients are reduced in two buckets by turns while others are still computed."""
    parallel = ParallelConfig(micro_batch=2, zero_stage=stage, precision="bf16")
    assert run(2, parallel, tmp_path, **OVERLAP)["losses"] == run(2, parallel, tmp_path)["losses"]


@pytest.mark.parametrize(
    ("settings", "workers", "overlapped"),
    [
        ({"zero_stage": 1}, 4, True),
        ({"zero_stage": 2}, 2, True),
        ({"zero_stage": 3}, 4, False),  # DeepSpeed does so by itself
        ({"zero_stage": 2}, 1, False),
        ({"zero_stage": 2, "offload": "optimizer"}, 4, False),
        ({"zero_stage": 2, "gpus_per_worker": 0}, 4, False),
        ({"zero_stage": 0, "precision": "fp32"}, 4, False),
    ],
    ids=str,
)
def test_reduction_overlaps_on_gpus_below_zero_3(settings: dict[str, Any], workers: int, overlapped: bool) -> None:
    parallel = ParallelConfig(**{"gpus_per_worker": 1, "micro_batch": 1, **settings})
    zero = deepspeed_config(parallel, TRAINING, workers)["zero_optimization"]
    assert zero.get("overlap_comm", False) == overlapped
    assert zero.get("reduce_bucket_size") == (OVERLAP_BUCKET if overlapped else None)


def test_the_batch_must_come_out_exact() -> None:
    assert deepspeed_config(ParallelConfig(micro_batch=2), TRAINING, 2)["gradient_accumulation_steps"] == 2
    with pytest.raises(ValueError, match="8 is not a multiple of 3 x 2"):
        deepspeed_config(ParallelConfig(micro_batch=3), TRAINING, 2)
    with pytest.raises(ValueError, match="8 is not a multiple of 16 x 1"):
        deepspeed_config(ParallelConfig(micro_batch=16), TRAINING, 1)
