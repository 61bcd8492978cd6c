"""Training step by step inside test workers: an engine of any ZeRO stage, batches, losses, and a digest of all that it holds."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from crc32c import crc32c
from small_run import small_recipe

from oar_scale.config.schema import Recipe
from oar_scale.storage import join
from oar_scale.training.job import TrainingJob


def tiny_recipe(run_dir: str, **changes: Any) -> Recipe:
    """Eleven thousand parameters, and six images a step for one, two or three workers."""
    settings: dict[str, Any] = {
        "data": {"source": {"type": "openmoji", "limit": 48}, "canonical_streams": 6},
        "tokenizer": {"text": {"vocab_size": 100}, "views": ("center",)},
        "model": {"dim": 16, "layers": 1, "heads": 2, "ffn_multiple_of": 16, "dropout": 0.0},
        "parallel": {"micro_batch": 1, "precision": "fp32"},
        "pretrain": {"steps": 20, "global_batch": 6, "ema_decay": 0.9},
        "finetune": {"global_batch": 6},
    }
    for section, value in changes.items():
        settings[section] = {**settings.get(section, {}), **value} if isinstance(value, dict) else value
    return small_recipe(run_dir, **settings)


def with_stage(job: TrainingJob, zero_stage: int, precision: str = "fp32", root: str | None = None) -> TrainingJob:
    """The same job under another ZeRO stage, its checkpoints at another ``root``."""
    parallel = job.recipe.parallel.model_copy(update={"zero_stage": zero_stage, "precision": precision})
    return replace(job, recipe=job.recipe.model_copy(update={"parallel": parallel}), root=root or job.root)


def rooted(job: TrainingJob, name: str) -> str:
    """A root beside the job's own that shares its tokens and tokenizers."""
    root = join(os.path.dirname(job.root), name)
    os.makedirs(root, exist_ok=True)
    for part in ("tokens", "tokenizers"):
        with suppress(FileExistsError):  # made before, or by another rank at this moment
            os.symlink(join(job.root, part), join(root, part))
    return root


@dataclass
class Trainer:
    """An engine and the batches of the first steps."""

    ours: Any
    batches: list[Any]
    process: Any

    @property
    def engine(self) -> Any:
        """DeepSpeed's own, which checkpoints are saved of."""
        return self.ours.deepspeed

    @property
    def parameters(self) -> int:
        """Trained ones, whole."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters() if p.requires_grad)

    def losses(self, first: int, end: int) -> list[float]:
        """Take the steps ``first`` to ``end``; the loss of each over all ranks. Collective."""
        import torch
        import torch.distributed as dist

        losses = []
        for batch in self.batches[first:end]:
            loss = torch.tensor(self.ours.train_step(batch, 1e-2).loss, dtype=torch.float64)
            dist.all_reduce(loss)
            losses.append(float(loss) / self.process.world)
        return losses

    def digest(self) -> dict[str, int]:
        """Checksums of all float32 weights and moments, whole. Collective."""
        from oar_scale.distributed.checkpoints.live import LiveState

        live = LiveState(self.engine)
        kinds = ("weights", "exp_avg", "exp_avg_sq", "ema")
        values = {"steps": int(max(live.steps()))}
        for name in live.parameters:
            for kind in kinds:
                whole = live.get(name, kind).cpu() + 0.0  # adding the ranks' parts up makes a minus zero positive
                values[f"{name} {kind}"] = crc32c(whole.numpy().tobytes())
        return values


@contextmanager
def training(job: TrainingJob, count: int) -> Iterator[Any]:
    """Yields a function that makes a :class:`Trainer` of a job; one process group and ``count`` batches for all of them."""
    from deepspeed.utils import logger

    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker_process import WorkerProcess
    from oar_scale.training.inputs import job_prompts, job_stream

    logger.setLevel(logging.ERROR)
    with WorkerProcess(job) as process:
        prompts = job_prompts(job)
        batches = list(job_stream(job, prompts, process.rank, process.world).batches(0, count))
        engines = []

        def make(of: TrainingJob) -> Trainer:
            engines.append(DeepSpeedEngine(of, prompts, process))
            return Trainer(engines[-1], batches, process)

        yield make
        for engine in engines:
            engine.destroy()


def note(folder: str, name: str, value: Any) -> None:
    """Leave a result for the test, from rank 0."""
    if os.environ["RANK"] == "0":
        with open(os.path.join(folder, f"{name}.json"), "w") as file:
            json.dump(value, file)


def noted(folder: str, name: str) -> Any:
    with open(os.path.join(folder, f"{name}.json")) as file:
        return json.load(file)
