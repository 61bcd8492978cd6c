"""Modules without values: nothing is drawn for them, and they have the names and shapes of those that have some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import small_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oar_scale.model import AnyOrderModel
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer
from oar_scale.tokenizers.without_values import without_values

MODULES: dict[str, Callable[[], nn.Module]] = {
    "model": lambda: AnyOrderModel(small_model().spec),
    "tokenizer": lambda: VQTokenizer(VQSpec(image_size=32, codebook_size=16)),
    "torch's own": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.Conv2d(3, 4, 3), nn.Embedding(3, 4), nn.MultiheadAttention(4, 2), nn.LayerNorm(3)
    ),
}


class Operations(TorchDispatchMode):
    """The names of all operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", MODULES)
def test_nothing_is_computed_for_modules_without_values(kind: str) -> None:
    with Operations() as drawn:
        full = MODULES[kind]()
    with Operations() as done, without_values():
        empty = MODULES[kind]()
    assert drawn.names & {"normal_", "uniform_"} and done.names <= {"empty", "zero_", "fill_"}  # which need nothing that is slow to import
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in full.state_dict().items()
    }
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}


def test_values_are_drawn_as_before_afterwards() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(3, 4).weight
    torch.manual_seed(0)
    with without_values():
        nn.Linear(3, 4)
    assert torch.equal(nn.Linear(3, 4).weight, expected)
