"""AdamW as a run of weeks needs it: a step whose gradient is not finite is left out, and a moving average of the weights is one
more moment, so that DeepSpeed shards, saves and loads it like the others.

    average  <-  d average + (1 - d) weight,     d = min(ema_decay, (1 + t) / (10 + t)),  t steps done
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

AVERAGE = "ema"
"""The average's name in the optimiser's state, beside ``exp_avg`` and ``exp_avg_sq``."""


class SteadyAdamW(torch.optim.AdamW):
    """Fused AdamW; the parameters may be the flat partitions that ZeRO makes of a model's.

    Attributes:
        armed: until then a step makes the state and moves nothing: ZeRO-3 takes such a step while it is set up.
        overflow: the last step was left out.
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
        """``clip_norm`` is for training without ZeRO, which clips by itself."""
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.ema_decay, self.clip_norm = ema_decay, clip_norm
        self.armed, self.overflow = False, False
        self._global_grad_norm: float | None = None  # where DeepSpeed's engine looks for it

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Raises nothing: a gradient that is not finite leaves weights and state as they are, and sets ``overflow``."""
        if not self.armed:
            return self._make_state()
        if self.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(list(self._parameters()), self.clip_norm)
            self._global_grad_norm = float(norm)
            self.overflow = not math.isfinite(self._global_grad_norm)
            if self.overflow:
                return None
        self._make_state()
        super().step()
        if self.ema_decay is not None:
            self._average(self.ema_decay)
        return None

    def _average(self, ema_decay: float) -> None:
        states = [(parameter, self.state[parameter]) for parameter in self._parameters()]
        if states:
            done = float(states[0][1]["step"])
            follow = 1 - min(ema_decay, (1 + done) / (10 + done))
            torch._foreach_lerp_([state[AVERAGE] for _, state in states], [parameter for parameter, _ in states], follow)

    def _make_state(self) -> None:
        """As AdamW does, but before the first step, when the average is still the weights themselves."""
        for parameter in self._parameters():
            if not self.state[parameter]:
                state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
                state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                if self.ema_decay is not None:
                    state[AVERAGE] = parameter.detach().clone()
                self.state[parameter] = state

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from (parameter for parameter in group["params"] if parameter.grad is not None)
