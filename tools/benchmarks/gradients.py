#!/usr/bin/env python3
"""What rounding does to the gradient that AdamW gets: accumulated in bf16 or in float32, reduced in bf16 or in float32.

    python tools/benchmarks/gradients.py                           # 3 M parameters, 2 workers over gloo, ZeRO 2 and 3
    python tools/benchmarks/gradients.py --accumulation 48 --workers 4

Each variant makes the gradient of the same global batch with the same weights, computed in bf16. An error is the norm of the difference to
the gradient that was accumulated and reduced in float32, over the norm of that gradient. Beside it stand two differences of the same kind
that no dtype of gradients changes: to the gradient of a model that computes in float32, and to that of the next global batch.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from dataclasses import dataclass
from typing import Any

from measure import machine, run_ranks, table

from oar_scale.runtime.program import program

CLASSES, CODES, GRID = 20, 512, 12
VARIANTS = {
    "bf16, reduced in bf16": {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"},
    "fp32, reduced in bf16": {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "bf16"},
    "fp32, reduced in fp32": {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"},
}
EXACT, FLOAT32_MODEL, NEXT_BATCH = "fp32, reduced in fp32", "a model in float32", "the next batch"


@dataclass(frozen=True)
class Case:
    """The setting of one gradient."""

    folder: str
    """Local, for the model and the gradients."""
    stage: int
    accumulation: int
    workers: int
    variant: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="ZeRO stages")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 16, 48], help="micro-batches of a step")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    others = [*(name for name in VARIANTS if name != EXACT), FLOAT32_MODEL, NEXT_BATCH]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in arguments.stages:
            for accumulation in arguments.accumulation:
                exact = gradient(Case(folder, stage, accumulation, arguments.workers, EXACT))
                errors = [error(gradient(Case(folder, stage, accumulation, arguments.workers, name)), exact) for name in others]
                rows.append([str(stage), str(accumulation), *errors])
    head = ("ZeRO", "micro-batches", *others)
    print(f"{machine('cpu', 1)}\n{arguments.workers} workers, a micro-batch of 4; error of the gradient, %\n\n{table(head, rows)}")


def error(gradient: Any, exact: Any) -> str:
    """The relative error in per cent."""
    return f"{100 * float((gradient - exact).norm() / exact.norm()):.2f}"


def gradient(case: Case) -> Any:
    """The gradient that the optimizer of rank 0 gets, float32 [parameters of its share]."""
    import torch

    run_ranks(_worker, case.workers, case)
    return torch.load(os.path.join(case.folder, "gradient.pt"))


def _worker(rank: int, case: Case) -> None:
    import torch
    import torch.distributed as dist
    from deepspeed.utils import logger

    from oar_scale.distributed import deepspeed_engine
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker_process import WorkerProcess
    from oar_scale.tokenizers.prompts import LabelEncoder

    logger.setLevel(logging.ERROR)
    job, config = _job(case), deepspeed_engine.deepspeed_config
    deepspeed_engine.deepspeed_config = lambda *given: {**config(*given), **VARIANTS.get(case.variant, VARIANTS[EXACT])}
    with WorkerProcess(job) as process:
        if rank == 0:
            _save_base(job)
        dist.barrier()
        engine, seen = DeepSpeedEngine(job, LabelEncoder(CLASSES), process), _record_gradients()
        engine.train_step(_batch(rank, case), lr=0.0)
        if rank == 0:
            torch.save(torch.cat(seen), os.path.join(case.folder, "gradient.pt"))
        dist.barrier()
        engine.destroy()


def _record_gradients() -> list[Any]:
    """The gradients that optimizers take from now on."""
    from oar_scale.training.optimizer import EmaAdamW

    seen: list[Any] = []

    def record(optimizer: EmaAdamW, closure: None = None) -> None:
        seen.extend(parameter.grad.detach().float().flatten().clone() for parameter in optimizer._parameters())

    EmaAdamW.step = record  # type: ignore[method-assign]
    return seen


def _batch(rank: int, case: Case) -> Any:
    """This rank's share: codes that depend on the class and on their neighbours."""
    import torch

    generator = torch.Generator().manual_seed(rank + 1000 * (case.variant == NEXT_BATCH))
    count, cells = 4 * case.accumulation, GRID * GRID
    labels_b1 = torch.randint(CLASSES, (count, 1), generator=generator)
    steps_bN = torch.randint(3, (count, cells), generator=generator)
    codes_bN = (labels_b1 * 25 + steps_bN.cumsum(1)) % CODES
    order_bN = torch.rand(count, cells, generator=generator).argsort(1)
    return _Batch(codes_bN, order_bN, labels_b1, torch.zeros(count, dtype=torch.bool))


@dataclass
class _Batch:
    """What an engine reads of a :class:`~oar_scale.data.stream.Batch`."""

    codes_bN: Any
    order_bN: Any
    encoded_prompts_b: Any
    drop_b: Any

    def orders(self, device: Any) -> Any:
        """The orders as they are."""
        return self.order_bN.to(device)


def _job(case: Case) -> Any:
    from oar_scale.config.schema import Recipe
    from oar_scale.training.job import TrainingJob

    precision = "fp32" if case.variant == FLOAT32_MODEL else "bf16"
    batch = {"global_batch": 4 * case.accumulation * case.workers, "clip_norm": 1e9}
    recipe = Recipe.model_validate(
        {
            "name": "gradients",
            "model": {"dim": 192, "layers": 6, "heads": 3, "dropout": 0.0},
            "parallel": {"workers": case.workers, "zero_stage": case.stage, "precision": precision, "micro_batch": 4},
            "data": {"canonical_streams": case.workers},
            "pretrain": batch,
            "finetune": batch,
        }
    )
    return TrainingJob(recipe, "pretrain", case.folder, case.folder, os.path.join(case.folder, "base.safetensors"), "")


def _save_base(job: Any) -> None:
    import torch

    from oar_scale.model import AnyOrderModel, ModelSpec, save_model
    from oar_scale.model.spec import ClassSpec

    torch.manual_seed(0)
    spec = ModelSpec.from_recipe(job.recipe.model, vocab_size=CODES, grid=GRID, condition=ClassSpec(classes=CLASSES))
    model = AnyOrderModel(spec)
    with torch.no_grad():
        for parameter in model.parameters():  # a new model's output is zero, and most gradients with it
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    save_model(job.start_from, model)


if __name__ == "__main__":
    program(main)
