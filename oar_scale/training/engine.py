"""The engine: model and optimizer as the training loop uses them, whatever shards them.

    result = engine.train_step(batch, lr)              one optimizer step over this rank's share of the global batch
    with engine.averaged(): ...                        the weights' moving average in place of the weights
    for name, tensor in engine.whole_weights(): ...    one parameter at a time, whole, on every rank
    model = engine.plain_model()                       all of them at once

:class:`~oar_scale.training.plain_engine.PlainEngine` does it in one process, ``distributed/deepspeed_engine.py`` with DeepSpeed ZeRO.
Both compute the same loss with the same optimizer: :class:`Objective` and ``training/optimizer.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from oar_scale.data.hashing import derived_seed
from oar_scale.data.stream import Batch
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.orders.step_sizes import cells_per_step
from oar_scale.tokenizers.prompts import PromptEncoder, conditioning_inputs

QUARTERS = 4
"""Parts of the generation order whose losses are reported one by one."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as this rank saw it."""

    loss: float
    """Mean over this rank's samples, in nats per code."""
    quarters: Tensor
    """Mean loss of the first to the last quarter of the generation order [4], on the CPU."""
    grad_norm: float
    """Before clipping, over all ranks and parameters; not finite where the step was skipped."""
    own_s: float = 0.0
    """Seconds of the forward passes, where a rank waits for no other (but under ZeRO-3, which gathers weights); 0: not measured."""

    @property
    def skipped(self) -> bool:
        """Whether the gradient was not finite, so that the step changed nothing."""
        return not math.isfinite(self.grad_norm)

    @classmethod
    def of(
        cls, losses: Sequence[Tensor], quarters: Sequence[Tensor], grad_norm: float | Tensor, watch: Stopwatch | None = None
    ) -> StepResult:
        """Return the result of a step, given the loss and the quarters of each micro-batch, and what has measured its forward passes.

        All numbers come from the device at once: the host waits for it one time a step. (Not less often: the spike guard judges a step
        before the next one, and before its checkpoint.)
        """
        parts = [torch.stack(list(losses)).mean().view(1), torch.stack(list(quarters)).mean(0)]
        if isinstance(grad_norm, Tensor):
            parts.append(grad_norm.detach().to(parts[0].device).view(1))
        loss, *rest = torch.cat([part.double() for part in parts]).tolist()
        norm = rest[QUARTERS] if isinstance(grad_norm, Tensor) else grad_norm
        return cls(loss, torch.tensor(rest[:QUARTERS]), norm, watch.seconds() if watch else 0.0)


class Stopwatch:
    """Adds up the time of blocks of computation: on a GPU by events on its stream, as kernels run later than they are called."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the block."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            started = time.monotonic()
            yield
            self._seconds += time.monotonic() - started

    def seconds(self) -> float:
        """All of it, once the blocks' results have been read."""
        return self._seconds + sum(float(begin.elapsed_time(end)) for begin, end in self._events) / 1000


class Engine(Protocol):
    """Trains a model. Every method is collective: all ranks call it, in the same order."""

    @property
    def model(self) -> AnyOrderModel:
        """The model in training; under ZeRO-3 its parameters are whole only during a forward pass."""

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes."""

    @property
    def parameters(self) -> int:
        """The model's number of parameters, over all ranks."""

    def train_step(self, batch: Batch, lr: float, seeds: Sequence[int] = ()) -> StepResult:
        """Take one optimizer step at learning rate ``lr`` over this rank's share of the global batch, in micro-batches.

        A gradient that is not finite on any rank changes neither weights nor optimizer state, see :attr:`StepResult.skipped`.

        Args:
            seeds: of torch's generator, from which dropout draws, for each micro-batch; none: it goes on from where it is.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Put the weights' moving average in their place while the block lasts; then the weights come back bit for bit."""

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's parameters by name, in the precision it computes with; each is whole until the next one is requested."""

    def plain_model(self) -> AnyOrderModel:
        """Return the model in eval mode: itself, or where it is sharded a whole copy."""

    def destroy(self) -> None:
        """Give back the memory. The engine is not used afterwards."""


class Objective(nn.Module):
    """The training loss as a module: mean negative log-likelihood of a micro-batch, and of each quarter of the order, in nats per code."""

    def __init__(self, model: AnyOrderModel, prompts: PromptEncoder, group_steps: Sequence[int] = ()) -> None:
        """Train ``model`` on prompts of ``prompts``, asking for groups of cells in one of so many steps; none: for one after the other."""
        super().__init__()
        self.model, self.prompts, self.group_steps = model, prompts, group_steps

    def forward(
        self, codes_bN: Tensor, order_bN: Tensor, encoded_prompts_b: Tensor, drop_b: Tensor, chance: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the four quarters' [4]; see :class:`~oar_scale.data.stream.Batch` for the inputs.

        Args:
            chance: a number of the step, which says which of ``group_steps`` it takes.
        """
        condition_bTD = self.model.condition(conditioning_inputs(self.prompts, encoded_prompts_b, self.model.dtype), drop_b)
        steps = self.group_steps[chance % len(self.group_steps)] if self.group_steps else None
        groups = None if steps is None else cells_per_step(codes_bN.shape[1], steps)
        loss, nll_bN = self.model.loss(codes_bN, order_bN, condition_bTD, groups)
        return loss, torch.stack([part.mean() for part in nll_bN.detach().tensor_split(QUARTERS, dim=1)])


def micro_batches(batch: Batch, size: int, device: torch.device, seeds: Sequence[int] = ()) -> Iterator[tuple[Tensor | int, ...]]:
    """Yield the inputs of :class:`Objective` for ``size`` samples at a time, on ``device``, when torch's generator has the seed of each.

    Where the batch is on the device already (``prefetch.py``), nothing is copied.

    Of n micro-batches, number a takes the samples a, a + n, a + 2 n, ... Rank r of W has the slots r, r + W, ... of a step; these are its
    slots r + W a, r + W (a + n), ...: those that are r + W a modulo W n, the number of all ranks' micro-batches. So a step has the same
    micro-batches whatever W is, and drawn with the seeds of :func:`micro_batch_seeds` the same dropout.
    """
    order_bN = batch.orders(device)
    count, chance = micro_batch_count(batch, size), derived_seed("groups", batch.seed, batch.step)
    for number in range(count):
        if seeds:
            torch.manual_seed(seeds[number])
        part = slice(number, None, count)
        yield *(t[part].to(device) for t in (batch.codes_bN, order_bN, batch.encoded_prompts_b, batch.drop_b)), chance


def micro_batch_count(batch: Batch, size: int) -> int:
    """How many micro-batches of ``size`` samples, or fewer, a rank's share of a step makes."""
    return -(-len(batch.codes_bN) // size)


def micro_batch_seeds(seed: int, step: int, rank: int, world: int, count: int) -> list[int]:
    """The seeds of a rank's ``count`` micro-batches of a step: functions of the micro-batch's number among all ranks'."""
    return [derived_seed("dropout", seed, step, rank + world * number) for number in range(count)]
