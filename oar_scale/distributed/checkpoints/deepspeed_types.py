"""What checkpoints use of DeepSpeed's engine, which has no types of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from oar_scale.json_object import JsonObject
from oar_scale.training.engine import Objective

StateDict = dict[str, Any]
"""What ``torch.save`` writes for DeepSpeed: tensors and plain values, nested; which keys there are depends on the ZeRO stage."""


class ShardedEngine(Protocol):
    """The methods and attributes of ``deepspeed.DeepSpeedEngine`` that are used here."""

    module: Objective
    optimizer: Any
    """DeepSpeed's optimizer of the engine's ZeRO stage; under ZeRO 0 the one that it was given."""
    checkpoint_engine: object
    """The object that writes and reads the files of a checkpoint."""
    _copy_recovery_script: Callable[[str], None]

    def __call__(self, *inputs: Tensor | int) -> tuple[Tensor, Tensor]:
        """The results of the module."""

    def train(self) -> object:
        """Put the module into training mode."""

    def backward(self, loss: Tensor) -> object:
        """Compute the gradients of a micro-batch. Collective."""

    def step(self) -> None:
        """Take an optimizer step where this was the last micro-batch of the global batch. Collective."""

    def get_global_grad_norm(self) -> float | Tensor:
        """Norm of the gradient of the last step, before clipping; under ZeRO 1 and 2 still on its device."""

    def destroy(self) -> None:
        """Give back buffers and hooks."""

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""

    def load_universal_checkpoint(self) -> bool:
        """Whether the engine is set up to read DeepSpeed's universal format."""

    def save_checkpoint(self, save_dir: str, tag: str, client_state: JsonObject, save_latest: bool) -> object:
        """Write a checkpoint to ``save_dir/tag``. Collective."""

    def load_checkpoint(self, load_dir: str, tag: str) -> object:
        """Read a checkpoint of as many ranks and the same ZeRO stage. Collective."""
