"""The type of the ``ctx`` that torch hands to the forward and the backward pass of an ``autograd.Function``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class FunctionContext(Protocol):
    """The context that the two passes share: the forward pass saves, the backward pass reads."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors given to :meth:`save_for_backward`; in the backward pass only."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass. Once, in the forward pass."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Mark results that have no gradient."""
