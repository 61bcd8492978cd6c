"""The training loop, and what the callbacks see of it.

    weights -> engine -> newest checkpoint -> [ batch -> step -> callbacks ] ... -> whole model

A step's batch is a function of its number (``data/stream.py``), so going on after a checkpoint is starting at its step. After a
roll-back the numbers of batches run ahead of those of steps: ``left_out_batches`` says by how much.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from oar_scale.data.hashing import hash_words
from oar_scale.data.stream import Batch, TokenStream
from oar_scale.distributed.deepspeed_engine import StepDone, train_step
from oar_scale.distributed.worker_process import Process
from oar_scale.errors import Requeue
from oar_scale.model import ModelSpec
from oar_scale.observe.events import EventLog
from oar_scale.training.job import TrainingJob
from oar_scale.training.learning_rate import learning_rate
from oar_scale.training.metrics import Metrics


class RollBack(Exception):
    """The last steps are to be taken back: from the newest checkpoint, go on with batch ``next_batch``. Raised by all ranks at once."""

    def __init__(self, next_batch: int, times: int) -> None:
        super().__init__(f"back to the last checkpoint, then on with batch {next_batch}")
        self.next_batch, self.times = next_batch, times


@dataclass
class Loop:
    """An attempt at a stage: where it is, and what the last step did."""

    job: TrainingJob
    process: Process
    engine: Any
    spec: ModelSpec
    stream: TokenStream
    metrics: Metrics
    log: EventLog | None
    """The event log, at rank 0."""
    step: int = 0
    """Steps done, those left out among them."""
    left_out_batches: int = 0
    roll_backs: int = 0
    """How often in a row the steps that come were gone back to."""
    batch: Batch = field(init=False)
    done: StepDone = field(init=False)
    loss: float = 0.0
    """Of the last step, over all ranks."""
    lr: float = 0.0
    waited_s: float = 0.0
    busy_s: float = 0.0
    leaving: str | None = None
    """Why all ranks leave after this step."""

    def run(self, callbacks: list[Any]) -> None:
        """Train to the last step.

        Raises:
            Requeue: asked to leave; the checkpoint of the last step is under way, see ``Callback.end``.
            RollBack: the newest steps are to be taken back.
        """
        steps, ahead = self.job.training.steps, self.left_out_batches
        batches = self.stream.batches(self.step + ahead, steps + ahead)
        try:
            while self.step < steps:
                self._one_step(batches)
                for callback in callbacks:
                    callback.after_step(self)
                if self.leaving is not None:
                    if self.log:
                        self.log.emit("stopping", step=self.step, reason=self.leaving)
                    raise Requeue(self.leaving)
        finally:
            batches.close()  # type: ignore[attr-defined]

    def _one_step(self, batches: Any) -> None:
        self.process.beat(f"step {self.step + 1}")
        started = time.monotonic()
        with record_function("oar::data wait"):
            self.batch = next(batches)
        loaded = time.monotonic()
        self.lr = learning_rate(self.job.training, self.step)
        # Dropout is all that draws from the generator; seeded by step, it too is the same after a restart.
        torch.manual_seed(int(hash_words("dropout", self.job.recipe.seed, self.batch.step, self.process.rank)) >> 1)
        self.done = train_step(self.engine, self.batch, self.lr, self.job.recipe.parallel.micro_batch, self.process.device)
        self.step += 1
        self._agree()
        self.waited_s, self.busy_s = loaded - started, time.monotonic() - loaded

    def _agree(self) -> None:
        """The few numbers that all ranks must see alike at each step: the loss, and whether anyone was asked to leave."""
        asked = self.process.leaving
        numbers = torch.tensor([self.done.loss / self.process.world, float(asked is not None)], dtype=torch.float64)
        dist.all_reduce(numbers, group=self.process.control)
        self.loss = float(numbers[0])
        if numbers[1]:
            reasons: list[Any] = [None] * self.process.world
            dist.all_gather_object(reasons, asked, group=self.process.control)
            self.leaving = next(reason for reason in reasons if reason)

    def every(self, steps: int) -> bool:
        """Whether the last step is a multiple of ``steps``, or the last of all."""
        return self.step % steps == 0 or self.step == self.job.training.steps

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is due."""
        return self.every(self.job.training.checkpoint_every) or self.leaving is not None

    @property
    def closes_window(self) -> bool:
        """Whether the numbers since the last ``train`` event are put together now."""
        return self.saves or self.every(self.job.training.log_every)
