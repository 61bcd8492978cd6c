"""Held-out likelihood while training: ``heldout`` events, and what checkpoints are judged by."""

from __future__ import annotations

import time
from typing import Any

from oar_scale.distributed.deepspeed_engine import averaged
from oar_scale.training.callbacks import Callback
from oar_scale.training.inputs import Heldout
from oar_scale.training.loop import Loop


class Evaluation(Callback):
    """At the start, every ``evaluate_every`` steps and at the end. Collective."""

    def __init__(self, heldout: Heldout) -> None:
        self._heldout = heldout
        self._latest: dict[str, float] = {}

    def start(self, loop: Loop) -> None:
        if loop.step == 0:
            self._evaluate(loop)

    def after_step(self, loop: Loop) -> None:
        if loop.every(loop.job.training.evaluate_every):
            self._evaluate(loop)

    def state(self) -> dict[str, Any]:
        return {"metrics": self._latest}

    def load_state(self, state: dict[str, Any]) -> None:
        self._latest = state["metrics"]

    def _evaluate(self, loop: Loop) -> None:
        started = time.monotonic()
        loop.process.beat(f"evaluation after step {loop.step}")
        model = loop.engine.module.model
        found = {name: self._heldout.nll(model, name) for name in self._heldout.orders}
        if loop.job.training.ema_decay is not None:
            with averaged(loop.engine):
                found["nll_ema"] = self._heldout.nll(model)
        self._latest = found
        if loop.log:
            loop.log.emit("heldout", step=loop.step, seconds=time.monotonic() - started, **found)
