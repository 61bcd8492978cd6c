"""Held-out likelihood while training: ``heldout`` events, and what checkpoints are judged by."""

from __future__ import annotations

import time

from oar_scale.json_object import JsonObject
from oar_scale.training.heldout_images import HeldoutImages
from oar_scale.training.loop import Callback, Loop


class HeldoutLikelihood(Callback):
    """Measures it at the start, every ``evaluate_every`` steps and at the end. Collective."""

    def __init__(self, heldout: HeldoutImages) -> None:
        self._heldout = heldout
        self._of_step: dict[str, float] = {}

    def start(self, loop: Loop) -> None:
        """Measure the first weights."""
        if loop.step == 0:
            self._of_step = self._evaluate(loop)

    def after_step(self, loop: Loop) -> None:
        """Measure every ``evaluate_every`` steps."""
        self._of_step = self._evaluate(loop) if loop.every(loop.job.training.evaluate_every) else {}

    def state(self) -> JsonObject:
        """The likelihoods of the last step, by which the best checkpoints are chosen; empty where that step was not evaluated."""
        return {"metrics": self._of_step}

    def _evaluate(self, loop: Loop) -> dict[str, float]:
        started = time.monotonic()
        loop.process.heartbeat(f"evaluation after step {loop.step}")
        nll = {name: self._heldout.nll(loop.engine.model, name) for name in self._heldout.orders}
        if loop.job.training.ema_decay is not None:
            with loop.engine.averaged():
                nll["nll_ema"] = self._heldout.nll(loop.engine.model)
        if loop.events:
            loop.events.emit("heldout", step=loop.step, seconds=time.monotonic() - started, **nll)
        return nll
