"""The optimizer with what DeepSpeed's engine asks of one that it wraps."""

from __future__ import annotations

from oar_scale.training.optimizer import EmaAdamW


class DeepSpeedAdamW(EmaAdamW):
    """Moves nothing until it is ``armed``: ZeRO-3 takes a step while it is set up, which must only make the optimizer's state."""

    armed = False

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step, or before ``armed`` make the state of one."""
        if self.armed:
            super().step()
        else:
            self.make_state()

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped. Without ZeRO, DeepSpeed's engine asks for it after each step."""
        return self.skipped

    @property
    def _global_grad_norm(self) -> float | None:
        """The norm's name in DeepSpeed's optimizers, where its engine looks for it."""
        return self.grad_norm
