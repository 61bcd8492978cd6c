"""The Halton sequence in bases 2 (rows) and 3 (columns): wherever one stops, the cells lie evenly over the image.

A cell comes when the first point of the sequence falls into it (Halton 1960; for image tokens: Besnier et al., ICLR 2025).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oar_scale.orders.policies import GridPolicy


def path(grid: int) -> NDArray[np.int64]:
    """Cells [N] by the first point of the sequence that falls into them."""
    # A cell holds a box of 2**-a by 3**-b with 2**a <= 4 grid and 3**b <= 6 grid, and 2**a * 3**b points in a row visit every such box.
    number_P = np.arange(24 * grid * grid)
    cell_P = _cells(number_P, 2, grid) * grid + _cells(number_P, 3, grid)
    cell_N, first_N = np.unique(cell_P, return_index=True)
    order_N: NDArray[np.int64] = cell_N[np.argsort(first_N)]
    return order_N


def _cells(number_P: NDArray[np.int64], base: int, grid: int) -> NDArray[np.int64]:
    """The row or column that each radical inverse falls into: the digits of a number, mirrored at the point. In whole numbers, exact."""
    mirrored_P, rest_P, scale = np.zeros_like(number_P), number_P, 1
    while rest_P.any():
        rest_P, digit_P = np.divmod(rest_P, base)
        mirrored_P, scale = mirrored_P * base + digit_P, scale * base
    return mirrored_P * grid // scale


POLICY = GridPolicy(__name__, path)
