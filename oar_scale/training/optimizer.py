"""AdamW as a run of weeks needs it: a step whose gradient is not finite is skipped, and a moving average of the weights is one
more moment, so that DeepSpeed shards, saves and loads it like the others.

    average  <-  d average + (1 - d) weight,     d = min(ema_decay, (1 + t) / (10 + t)),  t steps done
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

AVERAGE = "ema"
"""The average's name in the optimizer's state, beside ``exp_avg`` and ``exp_avg_sq``."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups: the matrices of linear layers decay, vectors and embeddings do not."""
    decaying = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decaying], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decaying], "weight_decay": 0.0},
    ]


class EmaAdamW(torch.optim.AdamW):
    """Fused AdamW with a moving average of the weights; the parameters may be the flat partitions that ZeRO makes of a model's.

    Args:
        groups: as :func:`parameter_groups` makes them.
        ema_decay: of the moving average; None keeps none.
        clip_norm: clip gradients to this norm, and skip steps where it is not finite; None leaves both to the caller (ZeRO does them).

    Attributes:
        grad_norm: of the last step, before clipping; None without ``clip_norm``.
        skipped: the last step's gradient was not finite, so that it moved nothing.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        ema_decay: float | None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.ema_decay, self.clip_norm = ema_decay, clip_norm
        self.grad_norm: float | None = None
        self.skipped = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Raises nothing: a gradient that is not finite leaves weights and state as they are, and sets ``skipped``."""
        if self.clip_norm is not None:
            self.grad_norm = float(torch.nn.utils.clip_grad_norm_(list(self._parameters()), self.clip_norm))
            self.skipped = not math.isfinite(self.grad_norm)
            if self.skipped:
                return
        self.make_state()
        super().step()
        if self.ema_decay is not None:
            self._average(self.ema_decay)

    def make_state(self) -> None:
        """Make the moments of parameters that have none yet: as AdamW does, but before the first step, when the average is the weights."""
        for parameter in self._parameters():
            if not self.state[parameter]:
                state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
                state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                if self.ema_decay is not None:
                    state[AVERAGE] = parameter.detach().clone()
                self.state[parameter] = state

    def _average(self, ema_decay: float) -> None:
        states = [(parameter, self.state[parameter]) for parameter in self._parameters()]
        if states:
            done = states[0][1]["step"].double()  # stays on its device: to read it the host would wait for the step
            follow = 1 - ((1 + done) / (10 + done)).clamp(max=ema_decay)
            parameters = [parameter for parameter, _ in states]
            torch._foreach_lerp_([state[AVERAGE] for _, state in states], parameters, [follow.to(parameters[0].dtype)] * len(states))

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from (parameter for parameter in group["params"] if parameter.grad is not None)
