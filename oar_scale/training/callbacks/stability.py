"""Batches without a finite gradient, and losses that jump.

A step whose gradient is not finite moves nothing (``optimizer.py``): here it is counted and its samples are named, and too many of them
end the stage. A spike is a loss that lies far above the median of the last ones, in their median absolute deviations: the guard says so, or
goes back to the last good checkpoint and leaves out the batches since.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

import torch.distributed as dist

from oar_scale.errors import UserError
from oar_scale.training.callbacks import Callback
from oar_scale.training.loop import Loop, RollBack

WINDOW, FEWEST = 100, 20
"""Losses that a new one is compared with, and how many there must be."""
NORMAL = 1.4826
"""A normal distribution's standard deviation in median absolute deviations."""
FLOOR = 0.005
"""Of the median: losses that hardly differ make no spike of a ripple."""
ROLL_BACKS = 3
"""Times in a row that the same step is gone back to; then its spikes are only named."""


class Stability(Callback):
    """Looks at every step; what it decides, all ranks decide."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._non_finite = 0

    def after_step(self, loop: Loop) -> None:
        if loop.done.left_out or not math.isfinite(loop.loss):
            self._name_batch(loop)
            return
        expected, deviation = self._expected()
        if loop.job.training.spike_guard != "off" and loop.loss > expected + loop.job.training.spike_sigmas * deviation:
            self._spike(loop, expected)
        self._losses.append(loop.loss)

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "non_finite": self._non_finite}

    def load_state(self, state: dict[str, Any]) -> None:
        self._losses.extend(state["losses"])
        self._non_finite = state["non_finite"]

    def _expected(self) -> tuple[float, float]:
        if len(self._losses) < FEWEST:
            return math.inf, 0.0
        middle = median(self._losses)
        deviation = NORMAL * median(abs(loss - middle) for loss in self._losses)
        return middle, max(deviation, FLOOR * abs(middle))

    def _spike(self, loop: Loop, expected: float) -> None:
        back = loop.job.training.spike_guard == "rollback" and loop.roll_backs < ROLL_BACKS
        if loop.log:
            loop.log.emit("spike", step=loop.step, loss=loop.loss, expected=expected, action="rollback" if back else "warn")
        if back:
            raise RollBack(next_batch=loop.step + loop.left_out_batches, times=loop.roll_backs + 1)

    def _name_batch(self, loop: Loop) -> None:
        self._non_finite += 1
        named: list[Any] = [None] * loop.process.world
        dist.all_gather_object(named, (loop.done.loss, loop.batch.uid_b.tolist()), group=loop.process.control)
        # The ranks whose own loss is not finite; where all are finite the gradient alone overflowed, and any sample may be the cause.
        culprits = [uids for loss, uids in named if not math.isfinite(loss)] or [uids for _, uids in named]
        uids = [uid for part in culprits for uid in part]
        if loop.log:
            loop.log.emit("non_finite", step=loop.step, loss=loop.loss, grad_norm=loop.done.grad_norm, uids=uids)
        if self._non_finite > loop.job.training.max_non_finite:
            raise UserError(
                f"step {loop.step}: {self._non_finite} batches had a loss or gradient that is not finite, more than "
                f"{loop.job.section}.max_non_finite = {loop.job.training.max_non_finite}; the last one had the samples {uids[:20]}.\n"
                "Lower the learning rate, or look at these samples; the last checkpoint is from before."
            )
