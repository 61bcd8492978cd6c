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
        self._latest: dict[str, float] = {}

    def start(self, loop: Loop) -> None:
        """Measure the first weights."""
        if loop.step == 0:
            self._evaluate(loop)

    def after_step(self, loop: Loop) -> None:
        """Measure every ``evaluate_every`` steps."""
        if loop.every(loop.job.training.evaluate_every):
            self._evaluate(loop)

    def state(self) -> JsonObject:
        """The newest likelihoods, by which the best checkpoints are chosen."""
        return {"metrics": self._latest}

    def load_state(self, state: JsonObject) -> None:
        """Restore the newest likelihoods."""
        self._latest = state["metrics"]

    def _evaluate(self, loop: Loop) -> None:
        started = time.monotonic()
        loop.process.heartbeat(f"evaluation after step {loop.step}")
        nll = {name: self._heldout.nll(loop.engine.model, name) for name in self._heldout.orders}
        if loop.job.training.ema_decay is not None:
            with loop.engine.averaged():
                nll["nll_ema"] = self._heldout.nll(loop.engine.model)
        self._latest = nll
        if loop.events:
            loop.events.emit("heldout", step=loop.step, seconds=time.monotonic() - started, **nll)
