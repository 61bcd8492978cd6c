"""Checkpoints as a callback: saved at their step, committed in the background, reported when that is done."""

from __future__ import annotations

from collections.abc import Callable

from oar_scale.distributed.checkpoints import SaveOutcome, Saver
from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
from oar_scale.json_object import JsonObject
from oar_scale.training.job import TrainingJob
from oar_scale.training.loop import Callback, Loop
from oar_scale.training.process import TrainingProcess


class CheckpointCallback(Callback):
    """Saves every ``checkpoint_every`` steps, at the end, and when the worker is asked to stop. Collective.

    Args:
        collect: what a checkpoint keeps besides the engine.
    """

    def __init__(self, job: TrainingJob, process: TrainingProcess, engine: DeepSpeedEngine, collect: Callable[[Loop], JsonObject]) -> None:
        self._saver, self._engine, self._collect = Saver(job, process.heartbeat), engine, collect

    def after_step(self, loop: Loop) -> None:
        """Save where it is due; report what became of the saves before."""
        if loop.saves:
            loop.process.heartbeat(f"checkpoint of step {loop.step}")
            self._saver.save(self._engine.deepspeed, loop.step, self._collect(loop))
        self._report(loop, self._saver.outcomes())

    def end(self, loop: Loop) -> None:
        """Wait for the last save: ``grace_s`` when asked to stop, since the process may be killed after it."""
        timeout_s = loop.job.recipe.parallel.grace_s if loop.stop_reason else loop.job.recipe.parallel.hang_timeout_s / 2
        self._report(loop, self._saver.finish(timeout_s))

    def _report(self, loop: Loop, outcomes: list[SaveOutcome]) -> None:
        for outcome in outcomes:
            if loop.events is None:
                continue
            if outcome.fault is None:
                loop.events.emit(
                    "checkpoint",
                    step=outcome.step,
                    seconds=outcome.seconds,
                    wait_s=outcome.wait_s,
                    upload_s=outcome.upload_s,
                    bytes=outcome.bytes,
                    uri=outcome.uri,
                )
            else:
                loop.events.emit("checkpoint_failed", step=outcome.step, fault=outcome.fault)
