"""What a training worker runs: the same function under Ray Train, torchrun, and the tests' own launcher.

The environment gives the rank (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), the job everything else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor

from oar_scale.distributed.attempt_metadata import about
from oar_scale.distributed.checkpointing import Checkpointing
from oar_scale.distributed.checkpoints import Restored, restore
from oar_scale.distributed.deepspeed_engine import averaged, make_engine, whole_weights
from oar_scale.distributed.worker_process import Process
from oar_scale.errors import Requeue
from oar_scale.model.flops import training_flops
from oar_scale.model.weights import save_tensors
from oar_scale.observe.events import EventLog
from oar_scale.observe.mirror import open_log
from oar_scale.runtime.retry import patiently
from oar_scale.storage import join
from oar_scale.training.callbacks import Callback
from oar_scale.training.callbacks.heldout import Evaluation
from oar_scale.training.callbacks.memory import Memory
from oar_scale.training.callbacks.profiling import Profiling
from oar_scale.training.callbacks.sample_sheet import Sampling
from oar_scale.training.callbacks.speed import Speed
from oar_scale.training.callbacks.stability import Stability
from oar_scale.training.inputs import Heldout, job_prompts, job_stream
from oar_scale.training.job import TrainingJob
from oar_scale.training.loop import Loop, RollBack
from oar_scale.training.metrics import Metrics


def train(job: TrainingJob, asked: Callable[[], str] | None = None) -> None:
    """Run a stage to its last step, from the newest committed checkpoint if there is one. Collective.

    Args:
        asked: rank 0 calls it in a thread; it returns when the worker is to leave, with the reason. SIGTERM and SIGUSR1 do the same.

    Raises:
        Requeue: asked to leave; everything is saved.
        UserError: what the user can mend.
    """
    with Process(job) as process:
        if asked is not None and process.rank == 0:
            threading.Thread(target=lambda: process.leave(asked()), name="asked to leave", daemon=True).start()
        back: RollBack | None = None
        while True:
            # An attempt is an event file, after a roll-back too: what reads them knows how to leave out the steps that were undone.
            with _log(job) if process.rank == 0 else nullcontext() as log:
                try:
                    return _attempt(job, process, log, back)
                except RollBack as again:
                    back = again


def _log(job: TrainingJob) -> AbstractContextManager[EventLog]:
    return open_log(join(job.local, "events"), job.stage, job.root, job.recipe.observe.mirror_s)


def _attempt(job: TrainingJob, process: Process, log: EventLog | None, back: RollBack | None) -> None:
    started = time.monotonic()
    process.beat("loading the model")
    prompts = job_prompts(job)
    engine = make_engine(job, prompts, process.world)
    try:
        heldout = Heldout(job, prompts, process.rank, process.world, process.device)
        stream = job_stream(job, prompts, process.rank, process.world)
        loop = Loop(job, process, engine, engine.module.model.spec, stream, Metrics(process.control), log)
        kept: dict[str, Callback] = {"stability": Stability(), "evaluation": Evaluation(heldout)}
        checkpointing = Checkpointing(loop, lambda: _state(loop, kept))
        # In this order: a spike is no state to save, and a checkpoint knows the likelihood at its step.
        callbacks = [*kept.values(), Sampling(heldout), Memory(), Speed(loop), checkpointing]
        if job.profile_steps:
            callbacks.append(Profiling(job.profile_steps))
        process.beat("loading the checkpoint")
        _start(loop, restore(engine, job), kept, back)
        for callback in callbacks:
            callback.start(loop)
        try:
            loop.run(callbacks)
        except (Requeue, RollBack):
            _end(callbacks, loop)  # the checkpoint on its way is what comes next goes on from
            raise
        _end(callbacks, loop)
        process.beat("export")
        _export(job, engine, process.rank)
        if log:
            log.emit("end", step=loop.step, seconds=time.monotonic() - started)
    finally:
        engine.destroy()


def _start(loop: Loop, restored: Restored | None, kept: dict[str, Callback], back: RollBack | None) -> None:
    """Take up what the checkpoint holds, and say where the attempt starts and with what."""
    if restored is not None:
        loop.step = restored.step
        loop.left_out_batches = restored.state["left_out_batches"]
        for name, callback in kept.items():
            callback.load_state(restored.state[name])
    if back is not None:
        loop.left_out_batches, loop.roll_backs = back.next_batch - loop.step, back.times
    if loop.log is None:
        return
    for rejected in restored.rejected if restored else ():
        loop.log.emit("rejected_checkpoint", uri=rejected.uri, fault=rejected.fault)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in loop.engine.module.model.parameters())
    facts = about(loop.job, loop.process.world)
    loop.log.emit(
        "start",
        start_step=loop.step,
        parameters=parameters,
        flops_per_image=training_flops(loop.spec),
        cells=loop.spec.cells,
        left_out_batches=loop.left_out_batches,
        **facts,
    )
    if restored is not None:
        loop.log.emit(
            "resumed",
            step=restored.step,
            uri=restored.uri,
            converted=restored.converted,
            world_size=restored.world_size,
            zero_stage=restored.zero_stage,
            seconds=restored.seconds,
        )


def _state(loop: Loop, kept: dict[str, Callback]) -> dict[str, Any]:
    """What a checkpoint keeps besides the engine."""
    states = {name: callback.state() for name, callback in kept.items()}
    return {"left_out_batches": loop.left_out_batches, "metrics": states["evaluation"]["metrics"], **states}


def _end(callbacks: list[Callback], loop: Loop) -> None:
    loop.process.beat("the last checkpoint")
    for callback in callbacks:
        callback.end(loop)


def _export(job: TrainingJob, engine: Any, rank: int) -> None:
    """Write the stage's model: the weights, or their moving average where the recipe keeps one. Collective."""
    tensors: dict[str, Tensor] = {}
    with averaged(engine) if job.training.ema_decay is not None else nullcontext():
        for name, tensor in whole_weights(engine):
            if rank == 0:
                tensors[name] = tensor.to("cpu", copy=True)
    if rank == 0:
        half, spec = job.recipe.parallel.precision == "bf16", engine.module.model.spec
        patiently(lambda: save_tensors(job.result, spec, tensors, half=half), job.recipe.storage.patience_s)
    dist.barrier()
