"""Attention of head widths that GPU kernels do not take as they are. There is no GPU here: the kernel is named, the CPU's one computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
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


def test_channels_of_zeros_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from oar_scale.model import attention

    def on_cpu(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)

    q, k, v = (torch.randn(2, 4, rows, 100, generator=torch.Generator().manual_seed(rows)) for rows in (5, 7, 7))
    expected = attention_with_lse(q, k, v)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", on_cpu)
    out, lse = attention._flash_attention(q, k, v)
    torch.testing.assert_close((out, lse), expected)
