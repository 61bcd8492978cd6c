"""Rotary positions of cells on a grid (2-D RoPE).

Half of a head's channel pairs rotate with the row of the cell, the other half with its column:

    angle(cell, pair j) = row(cell) * base^(-2j / (head_dim/2))     j = 0 .. head_dim/4 - 1     first half of the pairs
                          column(cell) * the same                                             second half

Condition rows have no cell: they use index N of the table, the identity (cos 1, sin 0).

A rotation is kept as the cosine and the sine of each pair, float32 [..., P, 2] with P = head_dim / 2: seen as complex numbers of
modulus 1, they rotate a row of channels, seen as complex numbers too, in one multiplication.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oar_scale.model.autograd import FunctionContext


def cell_rotations(grid: int, head_dim: int, base: float, device: torch.device | None = None, *, zero_condition: bool = False) -> Tensor:
    """The table [N + 1, P, 2]; row N is the identity, or all zeros (see ``ModelSpec.condition_rotation``)."""
    cells = _plane(torch.arange(grid, dtype=torch.float32, device=device), head_dim, base)
    no_cell = cells.new_zeros(1, head_dim // 2, 2)
    if not zero_condition:
        no_cell[..., 0] = 1
    return torch.cat([cells, no_cell])


def offset_rotations(grid: int, head_dim: int, base: float, device: torch.device | None = None) -> Tensor:
    """Rotations [(2G - 1)^2, P, 2] of the offsets between cells, down and right from -(G - 1) to G - 1; see :func:`offset_index`."""
    return _plane(torch.arange(1 - grid, grid, dtype=torch.float32, device=device), head_dim, base)


def offset_index(grid: int, start: Tensor, end: Tensor) -> Tensor:
    """Index into :func:`offset_rotations` of the offsets from cells ``start`` to cells ``end``."""
    down, right = end // grid - start // grid, end % grid - start % grid
    return (down + grid - 1) * (2 * grid - 1) + right + grid - 1


def _plane(line_S: Tensor, head_dim: int, base: float) -> Tensor:
    """Rotations [S * S, P, 2] of all pairs of a row and a column coordinate, row by row."""
    side, pairs = len(line_S), head_dim // 4
    frequency_P = base ** (-torch.arange(pairs, dtype=torch.float32, device=line_S.device) / pairs)
    angle_SP = line_S[:, None] * frequency_P
    rows = angle_SP[:, None, :].expand(side, side, pairs)
    columns = angle_SP[None, :, :].expand(side, side, pairs)
    angles = torch.cat([rows, columns], dim=-1).reshape(side * side, 2 * pairs)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate channel pairs (0, 1), (2, 3), ... of ``x`` [..., head_dim]; the result has its dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def rotate_vector(vector_1D: Tensor, rotation_RP2: Tensor, heads: int) -> Tensor:
    """One learned vector, seen as heads, rotated by each of R rotations: [R, D]."""
    return rotate(vector_1D.view(1, heads, -1).expand(len(rotation_RP2), -1, -1), rotation_RP2[:, None]).flatten(1)


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    """:func:`rotate` of float32 ``x`` in place, as one complex multiplication: for inference."""
    _pairs(x).mul_(torch.view_as_complex(rotation))
    return x


def rotate_heads(qkv_BLHd: Tensor, rotation_BLP2: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split projected rows into queries, keys and values [B, L, heads, head_dim], and rotate queries and keys.

    There are as many keys as values; what is more of the heads are queries: none of a projection to keys and values, and with
    ``kv_heads`` 0 all of them.

    One multiplication, and one back in the backward pass, where :func:`rotate` makes a dozen passes over memory: a quarter of its
    time on a CPU (``tools/benchmarks/model.py --parts``). A compiler fuses those passes by itself.
    """
    if torch.compiler.is_compiling():
        qk, v = qkv_BLHd.split([qkv_BLHd.shape[2] - kv_heads, kv_heads], dim=2)
        q, k = rotate(qk, rotation_BLP2[:, :, None]).split([qk.shape[2] - kv_heads, kv_heads], dim=2)
        return q, k, v
    heads: tuple[Tensor, Tensor, Tensor] = _RotateHeads.apply(qkv_BLHd, rotation_BLP2, kv_heads)
    return heads


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionContext, qkv_BLHd: Tensor, rotation_BLP2: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rotation_BLP2)
        turned, heads = qkv_BLHd.shape[2] - kv_heads, [qkv_BLHd.shape[2] - 2 * kv_heads, kv_heads, kv_heads]
        # Values are copied along with rotated queries and keys: one tensor, and no split of the projection is kept for the backward pass.
        rotated_BLHd = torch.empty_like(qkv_BLHd)
        _rotate_into(rotated_BLHd[:, :, :turned], qkv_BLHd[:, :, :turned], torch.view_as_complex(rotation_BLP2))
        rotated_BLHd[:, :, turned:] = qkv_BLHd[:, :, turned:]
        q, k, v = rotated_BLHd.split(heads, dim=2)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionContext, dq_BLHd: Tensor, dk_BLHd: Tensor, dv_BLHd: Tensor) -> tuple[Tensor, None, None]:
        (rotation_BLP2,) = ctx.saved_tensors
        back_BLP = torch.view_as_complex(rotation_BLP2).conj()  # the gradient of a rotation is the rotation back
        heads = [dq_BLHd.shape[2], dk_BLHd.shape[2], dv_BLHd.shape[2]]
        d_qkv_BLHd = dq_BLHd.new_empty(*dq_BLHd.shape[:2], sum(heads), dq_BLHd.shape[3])
        d_q, d_k, d_v = d_qkv_BLHd.split(heads, dim=2)
        _rotate_into(d_q, dq_BLHd, back_BLP)
        _rotate_into(d_k, dk_BLHd, back_BLP)
        d_v.copy_(dv_BLHd)
        return d_qkv_BLHd, None, None


def _rotate_into(out_BLHd: Tensor, x_BLHd: Tensor, rotation_BLP: Tensor) -> None:
    """Write ``x_BLHd`` rotated by [B, L, P] complex numbers to ``out_BLHd``, through float32 where it has another dtype."""
    if x_BLHd.dtype == torch.float32 and x_BLHd.stride(-1) == 1:  # complex views need channel pairs that lie side by side
        torch.mul(_pairs(x_BLHd), rotation_BLP.unsqueeze(2), out=_pairs(out_BLHd))
    else:
        rotated = x_BLHd.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        _pairs(rotated).mul_(rotation_BLP.unsqueeze(2))
        out_BLHd.copy_(rotated)


def _pairs(x: Tensor) -> Tensor:
    """Channel pairs of float32 ``x`` [..., head_dim] as complex numbers [..., P], the same memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
