"""What a training worker runs: the same function under Ray Train, torchrun, and the tests' own launcher.

The environment gives the rank (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), the job everything else.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist

from oar_scale.data.sample_plan import Cut
from oar_scale.distributed.attempt_metadata import attempt_metadata
from oar_scale.distributed.checkpoint_callback import CheckpointCallback
from oar_scale.distributed.checkpoints import Restored, restore
from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
from oar_scale.distributed.worker_process import WorkerProcess
from oar_scale.errors import Requeue
from oar_scale.json_object import JsonObject
from oar_scale.model.flops import useful_flops
from oar_scale.model.weights import save_tensors
from oar_scale.observe.events import EventLog
from oar_scale.observe.mirror import open_log
from oar_scale.storage import join
from oar_scale.storage.patience import patient
from oar_scale.tokenizers.prompts import PromptEncoder
from oar_scale.training.callbacks.heldout import HeldoutLikelihood
from oar_scale.training.callbacks.memory import MemoryUsage
from oar_scale.training.callbacks.profiling import Profiling
from oar_scale.training.callbacks.sample_sheet import SampleSheet
from oar_scale.training.callbacks.speed import Speed
from oar_scale.training.callbacks.stability import Stability
from oar_scale.training.heldout_images import HeldoutImages
from oar_scale.training.inputs import STREAM_VERSION, job_prompts, job_stream, recipe_cut
from oar_scale.training.job import TrainingJob
from oar_scale.training.loop import Callback, Loop, RollBack


def train(job: TrainingJob, wait_for_stop: Callable[[], str] | None = None) -> None:
    """Run a stage to its last step, from the newest committed checkpoint if there is one. Collective.

    Args:
        wait_for_stop: rank 0 calls it in a thread; it blocks until the workers are to stop, and returns the reason. SIGTERM and
            SIGUSR1 stop them as well.

    Raises:
        Requeue: asked to stop; everything is saved.
        UserError: what the user can fix.
    """
    with WorkerProcess(job) as process:
        if wait_for_stop is not None and process.rank == 0:
            threading.Thread(target=_forward_stop, args=(wait_for_stop, process), name="stop request", daemon=True).start()
        process.heartbeat("loading the model")
        rolled_back = None
        engine: DeepSpeedEngine | None
        with patient(job.recipe.storage.patience_s):
            prompts = job_prompts(job)
            engine = DeepSpeedEngine(job, prompts, process)
        try:
            while True:
                process.heartbeat("loading the checkpoint")
                # After a roll-back into the same engine: there may be no memory for a second one beside it.
                restored = restore(engine.deepspeed, job)
                if rolled_back is not None and restored is None:
                    engine.destroy()
                    engine = None
                    gc.collect()  # DeepSpeed's engine is part of reference cycles
                    with patient(job.recipe.storage.patience_s):
                        engine = DeepSpeedEngine(job, prompts, process)
                rolled_back = _attempt(job, process, engine, prompts, restored, rolled_back)
                if rolled_back is None:
                    return
        except Requeue:
            # Together: Ray Train kills the other workers once one has left, and rank 0 still commits what all have uploaded.
            process.gather(None)
            raise
        finally:
            if engine is not None:  # making another one may have failed
                engine.destroy()


def _attempt(
    job: TrainingJob,
    process: WorkerProcess,
    engine: DeepSpeedEngine,
    prompts: PromptEncoder,
    restored: Restored | None,
    rolled_back: RollBack | None,
) -> RollBack | None:
    """Train to the last step and export the model. Returns the roll-back that ended it before, if one did. Collective."""
    started = time.monotonic()
    # Each attempt has an event file, after a roll-back too: readers leave out the steps that were undone.
    with _event_log(job) if process.rank == 0 else nullcontext() as log:
        version = restored.state.get("stream_version", 0) if restored is not None else STREAM_VERSION
        cuts = _stream_cuts(job, restored)
        with patient(job.recipe.storage.patience_s):
            heldout = HeldoutImages(job, prompts, process)
            stream = job_stream(job, prompts, process.rank, process.world, version, cuts)
        stateful: dict[str, Callback] = {"stability": Stability(), "evaluation": HeldoutLikelihood(heldout)}
        checkpoints = CheckpointCallback(job, process, engine, lambda loop: _state(loop, stateful, version, cuts))
        # In this order: a step that is rolled back is not saved, and a checkpoint has the likelihood of its step.
        callbacks = [*stateful.values(), SampleSheet(heldout), MemoryUsage(), Speed(), checkpoints]
        if job.profile_steps:
            callbacks.append(Profiling(job.profile_steps))
        loop = Loop(job, process, engine, stream, log, callbacks)
        _resume(loop, restored, stateful, rolled_back)
        try:
            loop.run()
        except RollBack as error:
            return error.with_traceback(None)  # whose frames would keep all that this attempt has made
        process.heartbeat("export")
        _export(job, engine, process.rank)
        if log:
            log.emit("end", step=loop.step, seconds=time.monotonic() - started)
    return None


def _forward_stop(wait_for_stop: Callable[[], str], process: WorkerProcess) -> None:
    process.request_stop(wait_for_stop())


def _event_log(job: TrainingJob) -> AbstractContextManager[EventLog]:
    return open_log(join(job.local, "events"), job.stage, job.root, job.recipe.observe.mirror_s)


def _resume(loop: Loop, restored: Restored | None, stateful: dict[str, Callback], rolled_back: RollBack | None) -> None:
    """Continue from what the checkpoint holds, and record where the attempt starts and with what settings."""
    if restored is not None:
        loop.step = restored.step
        loop.batch_offset = restored.state["left_out_batches"]
        states = restored.state
        if restored.changed.keys() - loop.job.limits:  # what was not finite under other settings is no sign of what these do
            states = {**states, "stability": {**states["stability"], "non_finite": 0}}
        for name, callback in stateful.items():
            if name in states:  # not where the checkpoint is older than the callback
                callback.load_state(states[name])
    if rolled_back is not None:
        loop.batch_offset, loop.roll_backs = rolled_back.next_batch - loop.step, rolled_back.times_back_to(loop.step)
    if loop.events is None:
        return
    for rejected in restored.rejected if restored else ():
        loop.events.emit("rejected_checkpoint", uri=rejected.uri, fault=rejected.fault)
    loop.events.emit(
        "start",
        start_step=loop.step,
        parameters=loop.engine.parameters,
        flops_per_image=useful_flops(loop.engine.spec),
        cells=loop.engine.spec.cells,
        left_out_batches=loop.batch_offset,
        **attempt_metadata(loop.job, loop.process.world, loop.process.device),
    )
    if restored is not None:
        loop.events.emit(
            "resumed",
            step=restored.step,
            uri=restored.uri,
            converted=restored.converted,
            world_size=restored.world_size,
            zero_stage=restored.zero_stage,
            seconds=restored.seconds,
        )
        if restored.changed:
            changes = {name: {"was": was, "is": now} for name, (was, now) in restored.changed.items()}
            loop.events.emit("settings_changed", step=restored.step, changes=changes)


def _stream_cuts(job: TrainingJob, restored: Restored | None) -> tuple[Cut, ...]:
    """How the run's samples have been cut into streams, up to now; where the recipe says otherwise, that goes from the checkpoint on."""
    if restored is None:
        return (recipe_cut(job),)
    before = tuple(Cut(*each) for each in restored.state.get("streams", [[0, *restored.streams]]))
    now = recipe_cut(job, restored.step + restored.state["left_out_batches"])
    return before if before[-1][1:] == now[1:] else (*before, now)


def _state(loop: Loop, stateful: dict[str, Callback], stream_version: int, cuts: tuple[Cut, ...]) -> JsonObject:
    """The state that a checkpoint keeps besides the engine: a stored format, whose keys stay."""
    states = {name: callback.state() for name, callback in stateful.items()}
    metrics = states["evaluation"]["metrics"]
    streams = {"stream_version": stream_version, "streams": [list(cut) for cut in cuts]}
    return {"left_out_batches": loop.batch_offset, "metrics": metrics, **streams, **states}


def _export(job: TrainingJob, engine: DeepSpeedEngine, rank: int) -> None:
    """Write the stage's model: the weights, or their moving average where the recipe keeps one. Collective."""
    half = job.recipe.parallel.precision == "bf16"
    with engine.averaged() if job.training.ema_decay is not None else nullcontext():
        weights = engine.whole_weights()
        if rank == 0:
            with patient(job.recipe.storage.patience_s):
                save_tensors(job.result, engine.spec, weights, half=half, scratch=job.scratch)
        for _ in weights:  # each is gathered from all ranks
            pass
    dist.barrier()
