"""From the middle outwards in a square spiral; every step goes to a cell above, below, left or right.

6 7 8      The spiral that winds inwards from the upper left corner, walked backwards: 8 comes last.
5 0 1
4 3 2
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oar_scale.orders.policies import GridPolicy


def path(grid: int) -> NDArray[np.int64]:
    """Cells [N] along the spiral."""
    left, sides = np.arange(grid * grid).reshape(grid, grid), []
    while left.size:
        sides.append(left[0])
        left = np.rot90(left[1:])  # the next side is on top
    return np.concatenate(sides)[::-1].copy()


POLICY = GridPolicy(__name__, path)
