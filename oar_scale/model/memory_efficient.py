"""The cheap parts of a block with less kept for the backward pass, and fewer passes over memory on a CPU.

Matrix products are dear and everything between them is cheap, so what lies between them is computed again rather than kept:

    rms_norm       keeps x and one scale a row     not x * scale, and not the squares
    gated_linear   keeps gate and up               not silu(gate), and not silu(gate) * up
    gelu_linear    keeps x                         not gelu(x)
    add_dropped    keeps one byte a number         not the noise in float32

Each is, to the rounding, the composition its docstring states. torch.compile finds the same savings by itself and is given the
composition. Parameters are saved as they are, never a view of one: ZeRO-3 takes their memory away between forward and backward.
What each is worth, in time and memory: ``tools/benchmarks/model.py --parts``, docs/results/model-cpu.md.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from oar_scale.model.autograd import FunctionContext


def worthwhile(x: Tensor) -> bool:
    """Whether PyTorch has no fused kernel: for norms and dropout it has them on GPUs, and a compiler makes its own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, in float32; the result has the dtype of ``x`` [..., D]."""
    out: Tensor = _RMSNormFunction.apply(x, weight_D, eps)
    return out


def gated_linear(gate: Tensor, up: Tensor, weight_DF: Tensor) -> Tensor:
    """``(silu(gate) * up) W^T`` [..., D] of gate and up [..., F]."""
    if torch.compiler.is_compiling():
        return F.linear(F.silu(gate) * up, weight_DF)
    out: Tensor = _GatedLinearFunction.apply(gate, up, weight_DF)
    return out


def gelu_linear(x: Tensor, weight_DF: Tensor, bias_D: Tensor) -> Tensor:
    """``gelu(x) W^T + b`` [..., D] of x [..., F]."""
    if torch.compiler.is_compiling():
        return F.linear(F.gelu(x), weight_DF, bias_D)
    out: Tensor = _GELULinearFunction.apply(x, weight_DF, bias_D)
    return out


def add_dropped(x: Tensor, y: Tensor, p: float) -> Tensor:
    """``x + dropout(y, p)``, with p rounded to a multiple of 2^-16."""
    out: Tensor = _AddDroppedFunction.apply(x, y, p)
    return out


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionContext, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        # rsqrt(mean(x^2) + eps), with no tensor of squares.
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)  # one scale a row, and x, which the caller keeps anyway
        scaled: Tensor = (x32 * scale).mul_(weight_D)
        return scaled.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionContext, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        x32_RD, d_RD, scale_R1 = x.float().reshape(-1, x.shape[-1]), d_out.float().reshape(-1, x.shape[-1]), scale.view(-1, 1)
        # With n = x * s, s = 1 / sqrt(mean(x^2) + eps):   d_w = sum over rows of d * n,   d_x = s (d w - n mean(d w n))
        weight32_D = weight_D.float()
        products_RD = d_RD * x32_RD
        d_weight_D = products_RD.t() @ scale_R1[:, 0]
        along_R1 = (products_RD @ weight32_D)[:, None] * scale_R1.square() / x.shape[-1]
        d_x_RD = torch.mul(d_RD, weight32_D, out=products_RD).addcmul_(x32_RD, along_R1, value=-1).mul_(scale_R1)
        return d_x_RD.to(x.dtype).view_as(x), d_weight_D.to(weight_D.dtype), None


class _GatedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionContext, gate: Tensor, up: Tensor, weight_DF: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight_DF)
        return F.linear(F.silu(gate).mul_(up), weight_DF)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionContext, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight_DF = ctx.saved_tensors
        # Two tensors of the hidden width at a time, each used twice: on a CPU, fresh memory costs more than silu again.
        hidden = F.silu(gate).mul_(up)
        d_weight_DF = d_out.reshape(-1, d_out.shape[-1]).t() @ hidden.view(-1, hidden.shape[-1])
        d_hidden = d_out @ weight_DF
        d_up = torch.ops.aten.silu(gate, out=hidden).mul_(d_hidden)
        d_gate = torch.ops.aten.silu_backward(d_hidden.mul_(up), gate, grad_input=d_hidden)
        return d_gate, d_up, d_weight_DF


class _GELULinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionContext, x: Tensor, weight_DF: Tensor, bias_D: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_DF)
        return F.linear(F.gelu(x), weight_DF, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionContext, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight_DF = ctx.saved_tensors
        hidden = F.gelu(x)
        d_out_RD = d_out.reshape(-1, d_out.shape[-1])
        d_weight_DF, d_bias_D = d_out_RD.t() @ hidden.view(-1, hidden.shape[-1]), d_out_RD.sum(0)
        # One tensor of the hidden width, used three times.
        torch.mm(d_out_RD, weight_DF, out=hidden.view(-1, hidden.shape[-1]))
        return torch.ops.aten.gelu_backward(hidden, x, grad_input=hidden), d_weight_DF, d_bias_D


class _ScaledContext(FunctionContext, Protocol):
    scale: float
    """1 / (1 - p)."""


class _AddDroppedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ScaledContext, x: Tensor, y: Tensor, p: float) -> Tensor:
        # A number is dropped where its 16 random bits, read as a signed integer, lie below the threshold.
        threshold = min(round(p * 2**16), 2**16 - 1)
        # 16 random bits a number, four numbers a draw, where bernoulli_ draws a float for each.
        draws = torch.empty(-(-y.numel() // 4), dtype=torch.int64, device=y.device).random_(-(2**63), None)
        # As bytes: products with bool are slower.
        kept = (draws.view(torch.int16)[: y.numel()] >= threshold - 2**15).view(torch.int8).view(y.shape)
        ctx.scale = 2**16 / (2**16 - threshold)
        ctx.save_for_backward(kept)
        dropped = y * kept
        return torch.add(x, dropped, alpha=ctx.scale, out=dropped)

    @staticmethod
    @once_differentiable
    def backward(ctx: _ScaledContext, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        (kept,) = ctx.saved_tensors
        return d_out, (d_out * kept).mul_(ctx.scale), None
