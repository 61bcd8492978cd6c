"""Twenty steps of each layout have the losses that are committed in tests/golden/losses.json, with every engine.

The tolerance is 1e-5 of the loss, in float32: another number of threads, CPU or version of torch adds sums in another order, which
changes the last digits. A wrong seed, mask or learning rate changes far more.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_training import IMAGES, LAYOUTS, PROMPTS, STEPS, golden, golden_batch, golden_model, golden_recipe, losses
from launcher import run_workers

from oar_scale.config.schema import Layout
from oar_scale.model import save_model
from oar_scale.training.job import TrainingJob
from oar_scale.training.plain_engine import PlainEngine


def engine(layout: Layout = "instructed", precision: str = "fp32", micro_batch: int = 1) -> PlainEngine:
    recipe = golden_recipe(layout, precision=precision, micro_batch=micro_batch, zero_stage=1)
    return PlainEngine(golden_model(layout), PROMPTS, recipe.pretrain, recipe.parallel)


def weights(of: PlainEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in of.whole_weights()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_losses_are_the_golden_ones(layout: Layout) -> None:
    values = losses(engine(layout))
    assert values == pytest.approx(golden(layout), rel=1e-5)
    assert values[-1] < values[0] - 0.3


def test_micro_batches_add_up_to_the_batch() -> None:
    assert losses(engine(micro_batch=IMAGES)) == pytest.approx(golden("instructed"), rel=1e-5)


def test_bf16_follows_float32() -> None:
    """Within the rounding of the weights; that they are moved in float32 shows in the last losses, which rounded steps would not reach."""
    values = losses(engine(precision="bf16"))
    assert values == pytest.approx(golden("instructed"), rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_averaged_weights_come_and_go_bit_for_bit(precision: str) -> None:
    trained = engine(precision=precision)
    losses(trained, end=3)
    before = weights(trained)
    with trained.averaged():
        assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(trained).items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trained).items())


def test_non_finite_gradient_skips_the_step() -> None:
    trained = engine()
    losses(trained, end=2)
    before = weights(trained)
    hook = trained.model.norm.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    assert trained.train_step(golden_batch("instructed", 2), 1e-2).skipped
    hook.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trained).items())
    result = trained.train_step(golden_batch("instructed", 2), 1e-2)
    assert not result.skipped and result.loss == pytest.approx(golden("instructed")[2], rel=1e-5)


def deepspeed_losses(job: TrainingJob, out: str) -> None:
    """In each of two workers: half of the images of each step."""
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker_process import WorkerProcess

    with WorkerProcess(job) as process:
        for layout in LAYOUTS:
            model = f"{job.root}/{layout}.safetensors"
            sharded = DeepSpeedEngine(replace(job, start_from=model), PROMPTS, process)
            own = torch.tensor(losses(sharded, slice(process.rank, None, process.world)), dtype=torch.float64)
            curve = (process.all_reduce(own) / process.world).tolist()
            sharded.destroy()
            if process.rank == 0:
                Path(out, f"{layout}.json").write_text(json.dumps(curve))


def test_deepspeed_losses_are_the_golden_ones(tmp_path: Path) -> None:
    """ZeRO-0 on two processes over gloo."""
    root = str(tmp_path)
    for layout in LAYOUTS:
        save_model(os.path.join(root, f"{layout}.safetensors"), golden_model(layout))
    job = TrainingJob(golden_recipe(workers=2), "pretrain", root, root, "", "")
    run_workers(deepspeed_losses, 2, job, root)
    for layout in LAYOUTS:
        curve = json.loads((tmp_path / f"{layout}.json").read_text())
        assert len(curve) == STEPS and curve == pytest.approx(golden(layout), rel=1e-5)
