"""The training loop, and what the callbacks see of it.

    weights -> engine -> newest checkpoint -> [ batch -> step -> callbacks ] ... -> whole model

A step's batch is a function of its number (``data/stream.py``), so resuming from a checkpoint is starting at its step. After a
roll-back the numbers of batches run ahead of those of steps by ``batch_offset``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch.profiler import record_function

from oar_scale.data.stream import Batch, TokenStream
from oar_scale.errors import Requeue
from oar_scale.json_object import JsonObject
from oar_scale.training.engine import Engine, StepResult, micro_batch_count, micro_batch_seeds
from oar_scale.training.job import TrainingJob
from oar_scale.training.learning_rate import learning_rate
from oar_scale.training.metrics import Metrics
from oar_scale.training.prefetch import on_device
from oar_scale.training.process import EventSink, TrainingProcess


class RollBack(Exception):
    """Undo the last steps: restart from the newest checkpoint, with batch ``next_batch``. Raised by all ranks at once."""

    def __init__(self, next_batch: int, started_at: int, times: int) -> None:
        """
        Args:
            next_batch: the number of the batch after the last one that was taken.
            started_at: the step that the attempt started from.
            times: roll-backs in a row to that step, this one included.
        """
        super().__init__(f"back to the last checkpoint, then on with batch {next_batch}")
        self.next_batch, self.started_at, self.times = next_batch, started_at, times

    def times_back_to(self, step: int) -> int:
        """Roll-backs in a row to this step: where a checkpoint was made since the attempt started, this is the first one."""
        return self.times if step == self.started_at else 1


class Callback:
    """Does nothing at any time; the real ones override what they need."""

    def start(self, loop: Loop) -> None:
        """Called before the first step of an attempt, after the checkpoint was loaded."""

    def after_step(self, loop: Loop) -> None:
        """Called after each step: ``loop.step`` steps are done, and ``loop.result`` is what the last one did."""

    def end(self, loop: Loop) -> None:
        """Called after the last step of a stage, or of an attempt that is stopped or rolled back."""

    def state(self) -> JsonObject:
        """Return what a checkpoint keeps of it, as JSON."""
        return {}

    def load_state(self, state: JsonObject) -> None:
        """Restore what :meth:`state` returned."""


@dataclass
class Loop:
    """An attempt at a stage: where it is, and what the last step did."""

    job: TrainingJob
    process: TrainingProcess
    engine: Engine
    stream: TokenStream
    events: EventSink | None = None
    """Where events go, at rank 0; None at other ranks."""
    callbacks: Sequence[Callback] = ()
    """Called after each step, in this order."""
    step: int = 0
    """Steps done, skipped ones among them."""
    batch_offset: int = 0
    """Batches that roll-backs have left out: step s trains on batch s + ``batch_offset``."""
    roll_backs: int = 0
    """Roll-backs in a row to the step that this attempt starts from."""
    started_at: int = field(init=False, default=0)
    """The step that this attempt started from."""
    batch: Batch = field(init=False)
    result: StepResult = field(init=False)
    """Of the last step, on this rank."""
    loss: float = 0.0
    """Of the last step, over all ranks."""
    lr: float = 0.0
    waited_s: float = 0.0
    """Seconds that the last step waited for its batch."""
    busy_s: float = 0.0
    """Seconds of the last step after that."""
    stop_reason: str | None = None
    """Why all ranks stop after this step."""

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.process)

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Requeue: a rank was asked to stop; the checkpoint of the last step is saved.
            RollBack: the newest steps are to be undone.
        """
        self.started_at = self.step
        for callback in self.callbacks:
            callback.start(self)
        steps = self.job.training.steps
        try:
            first, end = self.step + self.batch_offset, steps + self.batch_offset
            with closing(self.stream.batches(first, end)) as made, closing(on_device(made, self.process.device)) as batches:
                while self.step < steps:
                    self.process.heartbeat(f"step {self.step + 1}")
                    started = time.monotonic()
                    with record_function("oar::data wait"):
                        self.batch = next(batches)
                    loaded = time.monotonic()
                    self.lr = learning_rate(self.job.training, self.step)
                    self.result = self.engine.train_step(self.batch, self.lr, self._dropout_seeds())
                    self.step += 1
                    self._agree()
                    self.waited_s, self.busy_s = loaded - started, time.monotonic() - loaded
                    for callback in self.callbacks:
                        callback.after_step(self)
                    if self.stop_reason is not None:
                        if self.events:
                            self.events.emit("stopping", step=self.step, reason=self.stop_reason)
                        raise Requeue(self.stop_reason)
        except (Requeue, RollBack):
            self._end()  # what comes next resumes from the checkpoint that is being saved
            raise
        self._end()

    def _dropout_seeds(self) -> list[int]:
        """Dropout is all that draws from torch's generator; seeded by micro-batch, it is the same after a restart, whatever the ranks."""
        recipe = self.job.recipe
        count = micro_batch_count(self.batch, recipe.parallel.micro_batch)
        return micro_batch_seeds(recipe.seed, self.batch.step, self.process.rank, self.process.world, count)

    def _agree(self) -> None:
        """The few numbers that all ranks must see alike at each step: the loss, and whether any was asked to stop."""
        own_reason = self.process.stop_reason
        numbers = torch.tensor([self.result.loss / self.process.world, float(own_reason is not None)], dtype=torch.float64)
        self.process.all_reduce(numbers)
        self.loss = float(numbers[0])
        if numbers[1]:
            self.stop_reason = next(reason for reason in self.process.gather(own_reason) if reason)

    def _end(self) -> None:
        self.process.heartbeat("the last checkpoint")
        for callback in self.callbacks:
            callback.end(self)

    def every(self, steps: int) -> bool:
        """Whether the last step is a multiple of ``steps``, or the last of all."""
        return self.step % steps == 0 or self.step == self.job.training.steps

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is due."""
        return self.every(self.job.training.checkpoint_every) or self.stop_reason is not None

    @property
    def closes_window(self) -> bool:
        """Whether the numbers since the last ``train`` event are combined now."""
        return self.saves or self.every(self.job.training.log_every)
