"""Rotary positions of cells on a grid (2-D RoPE).

Half of a head's channel pairs turn with the row of the cell, the other half with its column:

    angle(cell, pair j) = row(cell) * base^(-2j / (head_dim/2))     j = 0 .. head_dim/4 - 1     first half of the pairs
                          column(cell) * the same                                             second half

Condition rows have no cell: they use index N of the table, the identity (cos 1, sin 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines, float32 [..., head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    def at(self, cells: Tensor) -> Rotation:
        """The rotations of cells (any shape of indices into the table)."""
        return Rotation(self.cos[cells], self.sin[cells])

    def turn(self) -> Tensor:
        """The same as complex numbers of modulus 1, for :func:`rotate_fast`."""
        return torch.complex(self.cos, self.sin)


def cell_rotations(grid: int, head_dim: int, base: float, device: torch.device | None = None) -> Rotation:
    """The table [N + 1, head_dim / 2]; row N is the identity."""
    pairs = head_dim // 4
    frequency_P = base ** (-torch.arange(pairs, dtype=torch.float32, device=device) / pairs)
    line_GP = torch.arange(grid, dtype=torch.float32, device=device)[:, None] * frequency_P
    rows = line_GP[:, None, :].expand(grid, grid, pairs)
    columns = line_GP[None, :, :].expand(grid, grid, pairs)
    angles = torch.cat([rows, columns], dim=-1).reshape(grid * grid, 2 * pairs)
    angles = torch.cat([angles, angles.new_zeros(1, 2 * pairs)])
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate channel pairs (0, 1), (2, 3), ... of ``x`` [..., head_dim]; the result has its dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def rotate_fast(x: Tensor, turn: Tensor) -> Tensor:
    """:func:`rotate` in float32 as one complex multiplication, for inference; ``turn`` is complex64 [..., head_dim / 2]."""
    rotated = x.to(torch.float32, copy=True)
    torch.view_as_complex(rotated.unflatten(-1, (-1, 2))).mul_(turn)
    return rotated
