"""Attention of head widths that GPU kernels do not take as they are. There is no GPU here: the kernel is named, the CPU's one computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_card import OnCard, fake_card, numbers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from oar_scale.model.attention import attention_with_lse

FLASH = torch.ops.aten._scaled_dot_product_flash_attention


class FlashWidths(TorchDispatchMode):
    """Notes how wide the heads are that the GPU's kernel is given."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is FLASH.default:
            self.widths += [tensor.shape[-1] for tensor in args[:3]]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("width", "given"), [(64, 64), (100, 104), (128, 128), (12, 16)])
def test_the_gpus_kernel_gets_heads_of_a_multiple_of_eight(width: int, given: int) -> None:
    with FakeTensorMode(), FlashWidths() as noted:
        q, k, v = (torch.empty(2, 4, rows, width, dtype=torch.bfloat16, device="cuda") for rows in (5, 7, 7))
        out, lse = attention_with_lse(q, k, v)
    assert noted.widths == [given] * 3
    assert out.shape == q.shape and lse.shape == (2, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [4, 12, 64, 100, 256, 260, 320])
def test_a_gpus_attention_is_the_cpus_at_every_width(width: int, dtype: torch.dtype) -> None:
    """Zeros that fill up heads change nothing, and heads too wide for flash attention go through the other kernel."""
    q, k, v = (torch.randn(2, 4, rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype) for rows in (5, 7, 7))
    expected = attention_with_lse(q, k, v)
    with fake_card():
        out, lse = attention_with_lse(OnCard(q), OnCard(k), OnCard(v))
    torch.testing.assert_close((numbers(out), numbers(lse)), expected)
