"""Checkpoints on their way: saved at their step, committed in the background, reported when that is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oar_scale.distributed.checkpoints import Outcome, Saver
from oar_scale.training.callbacks import Callback
from oar_scale.training.loop import Loop


class Checkpointing(Callback):
    """Every ``checkpoint_every`` steps, at the end, and when the worker is asked to leave. Collective.

    Args:
        collect: what a checkpoint keeps besides the engine.
    """

    def __init__(self, loop: Loop, collect: Callable[[], dict[str, Any]]) -> None:
        self._saver, self._collect = Saver(loop.job), collect

    def after_step(self, loop: Loop) -> None:
        if loop.saves:
            loop.process.beat(f"checkpoint of step {loop.step}")
            self._saver.save(loop.engine, loop.step, self._collect())
        self._report(loop, self._saver.outcomes())

    def end(self, loop: Loop) -> None:
        patience_s = loop.job.recipe.parallel.grace_s if loop.leaving else loop.job.recipe.parallel.hang_timeout_s / 2
        self._report(loop, self._saver.finish(patience_s))

    def _report(self, loop: Loop, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if loop.log is None:
                continue
            if outcome.fault is None:
                loop.log.emit(
                    "checkpoint",
                    step=outcome.step,
                    seconds=outcome.seconds,
                    wait_s=outcome.wait_s,
                    upload_s=outcome.upload_s,
                    bytes=outcome.bytes,
                    uri=outcome.uri,
                )
            else:
                loop.log.emit("checkpoint_failed", step=outcome.step, fault=outcome.fault)
