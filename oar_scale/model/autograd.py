"""The type of the ``ctx`` that torch hands to the forward and the backward pass of an ``autograd.Function``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class FunctionContext(Protocol):
    """What the two passes share: the forward pass saves, the backward pass reads."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What :meth:`save_for_backward` was given; in the backward pass only."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass. Once, in the forward pass."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Say which results have no gradient."""
