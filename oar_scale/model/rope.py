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


def cell_rotations(grid: int, head_dim: int, base: float, device: torch.device | None = None, *, zero_condition: bool = False) -> Rotation:
    """The table [N + 1, head_dim / 2]; row N is the identity, or all zeros (see ``ModelSpec.condition_rotation``)."""
    cells = _plane(torch.arange(grid, dtype=torch.float32, device=device), head_dim, base)
    no_cell = cells.cos.new_zeros(1, head_dim // 2)
    return Rotation(torch.cat([cells.cos, no_cell if zero_condition else no_cell + 1]), torch.cat([cells.sin, no_cell]))


def offset_rotations(grid: int, head_dim: int, base: float, device: torch.device | None = None) -> Rotation:
    """Rotations of the (2G - 1)^2 offsets from one cell to another, down and right from -(G - 1) to G - 1; see :func:`offset_index`."""
    return _plane(torch.arange(1 - grid, grid, dtype=torch.float32, device=device), head_dim, base)


def offset_index(grid: int, start: Tensor, end: Tensor) -> Tensor:
    """Index into :func:`offset_rotations` of the way from cells ``start`` to cells ``end``."""
    down, right = end // grid - start // grid, end % grid - start % grid
    return (down + grid - 1) * (2 * grid - 1) + right + grid - 1


def _plane(line_S: Tensor, head_dim: int, base: float) -> Rotation:
    """Rotations [S * S, head_dim / 2] of all pairs of a row and a column coordinate, row by row."""
    side, pairs = len(line_S), head_dim // 4
    frequency_P = base ** (-torch.arange(pairs, dtype=torch.float32, device=line_S.device) / pairs)
    angle_SP = line_S[:, None] * frequency_P
    rows = angle_SP[:, None, :].expand(side, side, pairs)
    columns = angle_SP[None, :, :].expand(side, side, pairs)
    angles = torch.cat([rows, columns], dim=-1).reshape(side * side, 2 * pairs)
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate channel pairs (0, 1), (2, 3), ... of ``x`` [..., head_dim]; the result has its dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def rotate_vector(vector_1D: Tensor, rotation: Rotation, heads: int) -> Tensor:
    """One learned vector, seen as heads, turned by each of R rotations: [R, D]."""
    per_head = Rotation(rotation.cos[:, None], rotation.sin[:, None])
    return rotate(vector_1D.view(1, heads, -1).expand(len(rotation.cos), -1, -1), per_head).flatten(1)


def rotate_fast(x: Tensor, turn: Tensor) -> Tensor:
    """:func:`rotate` in float32 as one complex multiplication, for inference; ``turn`` is complex64 [..., head_dim / 2]."""
    rotated = x.to(torch.float32, copy=True)
    torch.view_as_complex(rotated.unflatten(-1, (-1, 2))).mul_(turn)
    return rotated
