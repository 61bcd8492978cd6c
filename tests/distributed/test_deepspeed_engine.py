"""DeepSpeed's engine on two processes over gloo: what the averaged weights compute, and what is left when it has been destroyed."""

from __future__ import annotations

import importlib
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import run_workers
from small_run import copy_run, prepare_small_run, pretraining, small_recipe

from oar_scale.json_object import JsonObject
from oar_scale.run.context import Run
from oar_scale.training.job import TrainingJob


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = small_recipe(str(tmp_path_factory.mktemp("prepared")), model={"dropout": 0.0}, parallel={"precision": "fp32"})
    return prepare_small_run(recipe)


def average_and_copy(job: TrainingJob, out: str) -> None:
    """Held-out NLL by the engine's own model with its averaged weights, and by a plain model of these weights."""
    from oar_scale.distributed import deepspeed_engine
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker_process import WorkerProcess
    from oar_scale.training.heldout_images import HeldoutImages
    from oar_scale.training.inputs import job_prompts, job_stream

    config = deepspeed_engine.deepspeed_config

    def sharded(*args: Any) -> JsonObject:
        """Without this, so small a model is kept whole on every rank, and nothing is gathered."""
        whole = config(*args)
        return {**whole, "zero_optimization": {**whole["zero_optimization"], "stage3_param_persistence_threshold": 0}}

    deepspeed_engine.deepspeed_config = sharded
    with WorkerProcess(job) as process:
        prompts = job_prompts(job)
        engine, heldout = DeepSpeedEngine(job, prompts, process), HeldoutImages(job, prompts, process)
        for batch in job_stream(job, prompts, process.rank, process.world).batches(0, 4):
            engine.train_step(batch, 1e-2)
        before = heldout.nll(engine.model)
        with engine.averaged():
            averaged = heldout.nll(engine.model), heldout.nll(engine.plain_model())
        after = heldout.nll(engine.model)
        if process.rank == 0:
            Path(out).write_text(json.dumps([before, *averaged, after]))
        engine.destroy()


@pytest.mark.parametrize("hpz_workers", [1, 2])
def test_hpz_evaluates_the_average_and_not_the_weights(prepared: Run, tmp_path: Path, hpz_workers: int) -> None:
    run = copy_run(prepared, str(tmp_path), parallel={"zero_stage": 3, "hpz_workers": hpz_workers}, pretrain={"ema_decay": 0.9})
    run_workers(average_and_copy, 2, pretraining(run), str(tmp_path / "nll.json"))
    before, averaged, copied, after = json.loads((tmp_path / "nll.json").read_text())
    assert averaged == pytest.approx(copied, abs=1e-5) and before == pytest.approx(after, abs=1e-5)
    assert abs(averaged - before) > 0.01  # or the test could not tell them apart


def refused(job: TrainingJob, out: str) -> None:
    from oar_scale.distributed.worker import train
    from oar_scale.errors import UserError

    try:
        train(job)
    except UserError as error:
        Path(f"{out}-{os.environ['RANK']}").write_text(str(error))


def test_every_worker_refuses_damaged_weights(prepared: Run, tmp_path: Path) -> None:
    """Under ZeRO-3 only the first one reads them."""
    run = copy_run(prepared, str(tmp_path), parallel={"zero_stage": 3})
    base = Path(run.model_uri("base"))
    data = bytearray(base.read_bytes())
    data[-100] ^= 1
    base.write_bytes(data)
    run_workers(refused, 2, pretraining(run), str(tmp_path / "error"))
    for rank in range(2):
        assert (tmp_path / f"error-{rank}").read_text().startswith(f"{base}: damaged")


def rolled_back(job: TrainingJob, out: str) -> None:
    """The worker, three of whose attempts end in a roll-back; notes the largest number of engines that live at a time."""
    from oar_scale.distributed import worker
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.training.callbacks.memory import MemoryUsage
    from oar_scale.training.loop import Loop, RollBack

    engines: list[weakref.ref[torch.nn.Module]] = []
    alive, undone = [], [0]
    make = DeepSpeedEngine.__init__

    def made(self: DeepSpeedEngine, *args: object) -> None:
        make(self, *args)  # type: ignore[arg-type]
        engines.append(weakref.ref(self.model))
        alive.append(sum(engine() is not None for engine in engines))

    def undo(self: MemoryUsage, loop: Loop) -> None:
        if undone[0] < 3 and loop.step == 3:
            undone[0] += 1
            raise RollBack(next_batch=loop.step + loop.batch_offset, started_at=loop.started_at, times=loop.roll_backs + 1)
        if loop.step == job.training.steps:
            alive.append(loop.roll_backs)

    DeepSpeedEngine.__init__ = made  # type: ignore[method-assign,assignment]
    MemoryUsage.after_step = undo  # type: ignore[method-assign,assignment]
    worker.train(job)
    Path(out).write_text(json.dumps(alive))


@pytest.mark.parametrize(("zero_stage", "checkpoint_every"), [(2, 2), (3, 2), (2, 9)])
def test_a_roll_back_needs_no_second_engine(prepared: Run, tmp_path: Path, zero_stage: int, checkpoint_every: int) -> None:
    """Whether there is a checkpoint to return to (every second step), or only the first weights."""
    training = {"steps": 6, "checkpoint_every": checkpoint_every}
    run = copy_run(prepared, str(tmp_path), parallel={"zero_stage": zero_stage}, pretrain=training)
    run_workers(rolled_back, 1, pretraining(run), str(tmp_path / "alive.json"))
    *alive, times = json.loads((tmp_path / "alive.json").read_text())
    assert max(alive) == 1 and times == 3


def not_made_twice(job: TrainingJob, out: str) -> None:
    """The worker, whose first weights are gone when a roll-back to them needs a second engine."""
    from oar_scale.distributed import worker
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.errors import UserError
    from oar_scale.training.callbacks.memory import MemoryUsage
    from oar_scale.training.loop import Loop, RollBack

    def undo(self: MemoryUsage, loop: Loop) -> None:
        make = DeepSpeedEngine.__init__

        def fails(self: DeepSpeedEngine, *args: object) -> None:
            make(self, *args)  # type: ignore[arg-type]
            raise UserError("the first weights are gone")

        DeepSpeedEngine.__init__ = fails  # type: ignore[method-assign,assignment]
        raise RollBack(next_batch=1, started_at=0, times=1)

    MemoryUsage.after_step = undo  # type: ignore[method-assign,assignment]
    try:
        worker.train(job)
    except UserError as error:
        Path(out).write_text(str(error))


def test_a_second_engine_that_cannot_be_made_says_why(prepared: Run, tmp_path: Path) -> None:
    """And not that there is none to destroy."""
    run = copy_run(prepared, str(tmp_path), pretrain={"steps": 3, "checkpoint_every": 9})
    run_workers(not_made_twice, 1, pretraining(run), str(tmp_path / "error"))
    assert (tmp_path / "error").read_text() == "the first weights are gone"


def test_the_kernels_of_deepspeeds_muon_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody calls them, and DeepSpeed imports them at each training's first reduction: with torch._dynamo, seconds of each worker."""
    from deepspeed.runtime import compiler

    from oar_scale.distributed.worker_process import _leave_muon_uncompiled

    monkeypatch.setattr(compiler, "compile", compiler.compile)  # of this process it stays as it is
    _leave_muon_uncompiled()
    muon = importlib.reload(importlib.import_module("deepspeed.runtime.zero.muon.original_muon"))  # or another test's would be seen
    assert not hasattr(muon.zeropower_via_newtonschulz5, "_torchdynamo_orig_callable")
