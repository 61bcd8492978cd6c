"""Batches without a finite gradient, and losses that jump.

A step whose gradient is not finite moves nothing (``optimizer.py``): here it is counted and its samples are named, and too many of them
end the stage. A spike is a loss far above the median of the last ones, measured in their median absolute deviations: the guard reports it,
or rolls back to the last good checkpoint and skips the batches since.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.training.loop import Callback, Loop, RollBack

WINDOW, FEWEST = 100, 20
"""Losses that a new one is compared with, and how many there must be."""
NORMAL = 1.4826
"""A normal distribution's standard deviation in median absolute deviations."""
FLOOR = 0.005
"""Smallest deviation, as a share of the median: where losses hardly differ, a ripple is no spike."""
ROLL_BACKS = 3
"""Roll-backs in a row to the same step; after them its spikes are only reported."""


class Stability(Callback):
    """Judges every step. All ranks see the same loss and gradient norm, so all decide the same."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._non_finite = 0

    def after_step(self, loop: Loop) -> None:
        """Report a skipped batch or a spike. Raises RollBack where the guard is to, and UserError after too many skipped batches."""
        if loop.result.skipped or not math.isfinite(loop.loss):
            self._report_batch(loop)
            return
        expected, deviation = self._expected()
        if loop.job.training.spike_guard != "off" and loop.loss > expected + loop.job.training.spike_sigmas * deviation:
            self._spike(loop, expected)
        self._losses.append(loop.loss)

    def state(self) -> JsonObject:
        """The last losses, and the number of skipped batches."""
        return {"losses": list(self._losses), "non_finite": self._non_finite}

    def load_state(self, state: JsonObject) -> None:
        """Restore what :meth:`state` returned."""
        self._losses.extend(state["losses"])
        self._non_finite = state["non_finite"]

    def _expected(self) -> tuple[float, float]:
        """Median of the last losses, and their robust standard deviation."""
        if len(self._losses) < FEWEST:
            return math.inf, 0.0
        middle = median(self._losses)
        deviation = NORMAL * median(abs(loss - middle) for loss in self._losses)
        return middle, max(deviation, FLOOR * abs(middle))

    def _spike(self, loop: Loop, expected: float) -> None:
        back = loop.job.training.spike_guard == "rollback" and loop.roll_backs < ROLL_BACKS
        if loop.events:
            loop.events.emit("spike", step=loop.step, loss=loop.loss, expected=expected, action="rollback" if back else "warn")
        if back:
            raise RollBack(next_batch=loop.step + loop.batch_offset, started_at=loop.started_at, times=loop.roll_backs + 1)

    def _report_batch(self, loop: Loop) -> None:
        self._non_finite += 1
        batches = loop.process.gather((loop.result.loss, loop.batch.uid_b.tolist()))
        # The ranks whose own loss is not finite; where all are finite the gradient alone overflowed, and any sample may be the cause.
        culprits = [uids for loss, uids in batches if not math.isfinite(loss)] or [uids for _, uids in batches]
        uids = [uid for part in culprits for uid in part]
        if loop.events:
            loop.events.emit("non_finite", step=loop.step, loss=loop.loss, grad_norm=loop.result.grad_norm, uids=uids)
        if self._non_finite > loop.job.training.max_non_finite:
            raise UserError(
                f"step {loop.step}: {self._non_finite} batches had a loss or gradient that is not finite, more than "
                f"{loop.job.section}.max_non_finite = {loop.job.training.max_non_finite}; the last one had the samples {uids[:20]}.\n"
                f"Look at these samples; lower the learning rate (-o {loop.job.section}.lr=...), or raise the limit "
                f"(-o {loop.job.section}.max_non_finite=...), and run the same command again: it resumes from the last checkpoint."
            )
