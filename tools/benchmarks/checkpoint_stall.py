#!/usr/bin/env python3
"""How long training stands still for a checkpoint: against DeepSpeed's save with an upload behind it, done in line.

    python tools/benchmarks/checkpoint_stall.py                  # 100 M parameters, 2 workers over gloo, an S3 server on loopback
    python tools/benchmarks/checkpoint_stall.py --stages 3 --precision bf16 --ema

The two methods alternate on the same engine, so that they meet the same load of the machine. Each round of ours ends when the checkpoint is
committed; what counts is the time until the next step could begin, on the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import machine, median_ratio, run_ranks, table

from oar_scale.runtime.program import program

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for cluster/dev, which is not part of the package

MODEL = {"dim": 768, "layers": 12, "heads": 12}
WORKERS, CLASSES, CODES, GRID = 2, 1000, 16384, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="ZeRO stages")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ema", action="store_true", help="keep a moving average of the weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=MODEL["layers"])
    arguments = parser.parse_args()
    from cluster.dev import s3

    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    rows, parameters = [], 0
    with tempfile.TemporaryDirectory() as folder:
        server = s3.up(os.path.join(folder, "s3"), s3.free_port(), "stall")
        os.environ |= server.env
        try:
            for stage in arguments.stages:
                case = Case(
                    folder, f"s3://stall/zero{stage}", stage, arguments.precision, arguments.ema, arguments.rounds, arguments.layers
                )
                result = measure_stall(case)
                parameters = result["parameters"]
                rows.append(row(stage, result))
        finally:
            s3.down(os.path.join(folder, "s3"))
    setting = f"{parameters / 1e6:.0f} M parameters, {arguments.precision}, {WORKERS} workers"
    head = (
        "ZeRO",
        "DeepSpeed's save, s",
        "with upload, s",
        "ours, s",
        "ours / with upload",
        "committed after, s",
        "bytes / least",
        "DeepSpeed's",
    )
    print(f"{machine('cpu', 1)}\n{setting}, medians of {arguments.rounds} rounds\n\n{table(head, rows)}")


@dataclass(frozen=True)
class Case:
    """The setting of one measurement."""

    folder: str
    """Local, for the model and the scratch files."""
    root: str
    """Where checkpoints go."""
    stage: int
    precision: str
    ema: bool
    rounds: int
    layers: int


def measure_stall(case: Case) -> dict[str, Any]:
    """Seconds of each round, for both methods; ``least`` bytes: float32 weights, two moments and, if there is one, the average."""
    out = os.path.join(case.folder, f"zero{case.stage}.json")
    run_ranks(_worker, WORKERS, case, out)
    result: dict[str, Any] = json.loads(Path(out).read_text())
    return result


def row(stage: int, result: dict[str, Any]) -> list[str]:
    seconds = [f"{statistics.median(result[name]):.2f}" for name in ("save_s", "inline_s", "stall_s")]
    ratio = f"{median_ratio(result['stall_s'], result['inline_s']):.3f}"
    ratios = [f"{result[name] / result['least']:.3f}" for name in ("bytes", "inline_bytes")]
    return [str(stage), *seconds, ratio, f"{statistics.median(result['committed_s']):.2f}", *ratios]


def _worker(rank: int, case: Case, out: str) -> None:
    import torch.distributed as dist
    from deepspeed.utils import logger

    from oar_scale.distributed.checkpoints import Saver
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker_process import WorkerProcess
    from oar_scale.tokenizers.prompts import LabelEncoder

    logger.setLevel(logging.ERROR)
    job = _job(case)
    with WorkerProcess(job) as process:
        if rank == 0:
            _save_base(job)
        dist.barrier()
        engine = DeepSpeedEngine(job, LabelEncoder(CLASSES), process).deepspeed
        _one_step(engine)
        saver, result = Saver(job), _StallResult()
        for number in range(case.rounds + 1):  # the first one opens connections
            save_s, inline_s, inline_bytes = _in_line(engine, case, number)
            dist.barrier()
            begun = time.perf_counter()
            saver.save(engine, number + 1, {})
            stall_s = _slowest(time.perf_counter() - begun)
            outcomes = saver.finish(600)
            committed_s = _slowest(time.perf_counter() - begun)
            if number and rank == 0:
                if outcomes[0].fault is not None:
                    raise SystemExit(outcomes[0].fault)
                for name, seconds in (("save_s", save_s), ("inline_s", inline_s), ("stall_s", stall_s), ("committed_s", committed_s)):
                    getattr(result, name).append(seconds)
                result.bytes, result.inline_bytes = outcomes[0].bytes, inline_bytes
        result.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        result.least = result.parameters * (16 if case.ema else 12)
        if rank == 0:
            Path(out).write_text(json.dumps(vars(result)))
        engine.destroy()


class _StallResult:
    def __init__(self) -> None:
        self.bytes = self.inline_bytes = self.parameters = self.least = 0
        self.save_s: list[float] = []
        self.inline_s: list[float] = []
        self.stall_s: list[float] = []
        self.committed_s: list[float] = []


def _in_line(engine: Any, case: Case, number: int) -> tuple[float, float, int]:
    """DeepSpeed's own save to the local disk, then each rank uploads what it wrote.

    Seconds of the slowest rank for the save, and for both; bytes of all.
    """
    import torch
    import torch.distributed as dist

    from oar_scale.storage import open_storage

    own = os.path.join(case.folder, f"inline-{dist.get_rank()}")
    dist.barrier()
    begun = time.perf_counter()
    engine.save_checkpoint(own, tag="shards", save_latest=False)
    save_s = time.perf_counter() - begun
    written = [path for path in Path(own, "shards").iterdir() if path.is_file()]
    for path in written:
        open_storage(case.root).upload(str(path), f"{case.root}/inline/{number}/{path.name}")
    inline_s = _slowest(time.perf_counter() - begun)
    total = torch.tensor(sum(path.stat().st_size for path in written))
    dist.all_reduce(total)
    shutil.rmtree(own)
    return _slowest(save_s), inline_s, int(total)


def _slowest(seconds: float) -> float:
    import torch
    import torch.distributed as dist

    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _one_step(engine: Any) -> None:
    """The optimizer has no state before it."""
    import torch

    codes_bN = torch.randint(CODES, (1, GRID * GRID))
    order_bN = torch.randperm(GRID * GRID).expand(1, -1)
    loss, _ = engine(codes_bN, order_bN, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))
    engine.backward(loss)
    engine.step()


def _job(case: Case) -> Any:
    from oar_scale.config.schema import Recipe
    from oar_scale.training.job import TrainingJob

    class Job(TrainingJob):
        """A training job without data."""

        @property
        def identity(self) -> dict[str, object]:
            return {}

    recipe = Recipe.model_validate(
        {
            "name": "stall",
            "model": {**MODEL, "layers": case.layers},
            "parallel": {"workers": WORKERS, "zero_stage": case.stage, "precision": case.precision, "micro_batch": 1},
            "data": {"canonical_streams": WORKERS},
            "pretrain": {"global_batch": WORKERS, "ema_decay": 0.999 if case.ema else None, "keep_checkpoints": 1},
            "finetune": {"global_batch": WORKERS},
        }
    )
    base = os.path.join(case.folder, "base.safetensors")
    return Job(recipe, "pretrain", case.root, case.folder, base, base)


def _save_base(job: Any) -> None:
    from oar_scale.model import AnyOrderModel, ModelSpec, save_model
    from oar_scale.model.spec import ClassSpec

    if not os.path.exists(job.start_from):
        spec = ModelSpec.from_recipe(job.recipe.model, vocab_size=CODES, grid=GRID, condition=ClassSpec(classes=CLASSES))
        save_model(job.start_from, AnyOrderModel(spec))


if __name__ == "__main__":
    program(main)
