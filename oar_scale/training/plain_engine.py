"""One process without DeepSpeed: the engine that reads like a PyTorch tutorial, and that tests compare the others with.

In bf16 the model computes with rounded copies; the weights that the optimizer moves are float32, as under ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import record_function

from oar_scale.config.schema import ParallelConfig, TrainingConfig
from oar_scale.data.stream import Batch
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.acceleration import accelerate
from oar_scale.tokenizers.prompts import PromptEncoder
from oar_scale.training.engine import Objective, StepResult, micro_batch_count, micro_batches
from oar_scale.training.optimizer import AVERAGE, EmaAdamW, parameter_groups


class PlainEngine:
    """Implements :class:`~oar_scale.training.engine.Engine` in one process.

    Args:
        model: trained in place, moved to ``device``.
        parallel: ``micro_batch``, ``precision``, ``activation_checkpointing`` and ``compile`` are used; the rest is about workers.
    """

    def __init__(
        self,
        model: AnyOrderModel,
        prompts: PromptEncoder,
        training: TrainingConfig,
        parallel: ParallelConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device, self._micro_batch = torch.device(device), parallel.micro_batch
        self._objective = Objective(model, prompts, training.group_steps).to(self.device)
        self.model: AnyOrderModel = self._objective.model
        accelerate(self.model, parallel)
        groups = parameter_groups(self._objective, training.weight_decay)
        self._working: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        """What the model computes with. ``_weights`` are what the optimizer moves: the same in fp32, float32 copies in bf16."""
        self._weights = self._working
        if parallel.precision == "bf16":
            for group in groups:
                group["params"] = [parameter.detach().clone() for parameter in group["params"]]
            self._weights = [weight for group in groups for weight in group["params"]]
            self._objective.to(torch.bfloat16)
        self._optimizer = EmaAdamW(groups, lr=training.lr, betas=training.betas, ema_decay=training.ema_decay, clip_norm=training.clip_norm)

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes."""
        return self.model.spec

    @property
    def parameters(self) -> int:
        """The model's number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def train_step(self, batch: Batch, lr: float, seeds: Sequence[int] = ()) -> StepResult:
        """Take one optimizer step; see :meth:`Engine.train_step`."""
        self._objective.train()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        losses, quarters = [], []
        count = micro_batch_count(batch, self._micro_batch)
        for inputs in micro_batches(batch, self._micro_batch, self.device, seeds):
            with record_function("oar::forward"):
                loss, quarters_4 = self._objective(*inputs)
            with record_function("oar::backward, reduction"):
                (loss / count).backward()
                self._collect_gradients()
            losses.append(loss.detach().float())
            quarters.append(quarters_4.float())
        with record_function("oar::optimizer"):
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._refresh()
        assert self._optimizer.grad_norm is not None
        return StepResult.of(losses, quarters, self._optimizer.grad_norm)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the weights' moving average in their place; see :meth:`Engine.averaged`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's parameters by name."""
        yield from ((name, parameter.detach()) for name, parameter in self.model.named_parameters())

    def plain_model(self) -> AnyOrderModel:
        """Return the model itself, in eval mode."""
        return self.model.eval()

    def destroy(self) -> None:
        """Do nothing: nothing is held outside this object."""

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        """Add, in bf16, the micro-batch's gradients up in float32, where the optimizer looks for them."""
        if self._weights is self._working:
            return
        for weight, working in zip(self._weights, self._working, strict=True):
            if working.grad is not None:
                weight.grad = working.grad.float() if weight.grad is None else weight.grad.add_(working.grad)
                working.grad = None

    @torch.no_grad()
    def _refresh(self) -> None:
        """Round, in bf16, the weights to those the model computes with."""
        if self._weights is not self._working:
            torch._foreach_copy_(self._working, self._weights)

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange weights and average. Before the first step there is no average yet: it is the weights."""
        for weight in self._weights:
            state = self._optimizer.state[weight]
            if AVERAGE in state:
                kept = weight.detach().clone()
                weight.copy_(state[AVERAGE])
                state[AVERAGE].copy_(kept)
        self._refresh()
