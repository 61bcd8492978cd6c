"""What gradients of many micro-batches are added up in, when the model computes in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import run_workers
from pydantic import ValidationError
from small_run import copy_run, prepare_small_run, pretraining
from small_training import tiny_recipe

from oar_scale.config.schema import ParallelConfig
from oar_scale.model import load_model, save_model
from oar_scale.run.context import Run
from oar_scale.training.job import TrainingJob


def record_gradients(seen: list[torch.Tensor]) -> None:
    """From now on optimizers of this process note their gradients, group by group, and move nothing."""
    from oar_scale.training.optimizer import EmaAdamW

    def note(optimizer: EmaAdamW, closure: None = None) -> None:
        for group in optimizer.param_groups:
            gradients = [parameter.grad.float().flatten() for parameter in group["params"] if parameter.grad is not None]
            if gradients:  # ZeRO-3 steps one group at a time
                seen.append(torch.cat(gradients).clone())
        optimizer.grad_norm = 0.0

    EmaAdamW.step = note  # type: ignore[method-assign]


def one_step(job: TrainingJob, out: str) -> None:
    """The gradient of 24 micro-batches, by DeepSpeed and by the plain engine, which adds in float32."""
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker_process import WorkerProcess
    from oar_scale.training.inputs import job_prompts, job_stream
    from oar_scale.training.plain_engine import PlainEngine

    with WorkerProcess(job) as process:
        prompts, found = job_prompts(job), dict[str, Any]()
        batch = next(job_stream(job, prompts, 0, 1).batches(0, 1))
        sharded = DeepSpeedEngine(job, prompts, process)
        for name, engine in (("sharded", sharded), ("plain", _plain(PlainEngine, job, prompts))):
            seen: list[torch.Tensor] = []
            record_gradients(seen)
            engine.train_step(batch, 0.0)
            found[name] = seen
        sharded.destroy()
        torch.save(found, out)


def _plain(engine: Any, job: TrainingJob, prompts: Any) -> Any:
    return engine(load_model(job.start_from), prompts, job.training, job.recipe.parallel)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    batch = {"global_batch": 24, "clip_norm": 1e9}
    parallel = {"workers": 1, "precision": "bf16", "micro_batch": 1}
    recipe = tiny_recipe(str(tmp_path_factory.mktemp("prepared")), parallel=parallel, pretrain=batch, finetune={"global_batch": 24})
    run = prepare_small_run(recipe)
    start_from = pretraining(run).start_from
    model = load_model(start_from)
    with torch.no_grad():
        for parameter in model.parameters():  # a new model's output is zero, and most gradients with it
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    save_model(start_from, model)
    return run


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_gradients_are_summed_in_float32_where_it_is_asked_for(prepared: Run, tmp_path: Path, zero_stage: int) -> None:
    errors = {}
    for dtype in ("fp32", "bf16"):
        run = copy_run(prepared, str(tmp_path / dtype), parallel={"zero_stage": zero_stage, "gradient_dtype": dtype})
        out = str(tmp_path / f"{dtype}.pt")
        run_workers(one_step, 1, pretraining(run), out)
        found = torch.load(out)
        plain, sharded = (found[name] for name in ("plain", "sharded"))
        pairs = [(a[: len(b)], b) for a, b in zip(sharded, plain, strict=True)]  # a partition is padded at its end
        errors[dtype] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    assert errors["fp32"] < 1e-6 and errors["bf16"] > 1e-3


def test_zero_1_keeps_to_bf16_and_says_so() -> None:
    with pytest.raises(ValidationError, match=r"ZeRO 1 adds gradients up in bf16\.\nUse zero_stage 2 or 3"):
        ParallelConfig(zero_stage=1, gradient_dtype="fp32")
