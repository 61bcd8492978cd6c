"""Coarse to fine: 4**k cells are a regular lattice of 2**k x 2**k, twice as many a checkerboard of it, then comes the next finer one.

0 8 2 a      The order in which ordered dithering blackens pixels (Bayer 1973), so each lattice is filled evenly, too.
c 4 e 6      A grid that is no power of two takes the next larger one's order without the cells that lie outside.
3 b 1 9
f 7 d 5
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oar_scale.orders.policies import GridPolicy


def path(grid: int) -> NDArray[np.int64]:
    """Cells [N] by their value in the Bayer matrix of the next power of two."""
    time = np.zeros((1, 1), dtype=np.int64)
    while len(time) < grid:
        time = np.block([[4 * time, 4 * time + 2], [4 * time + 3, 4 * time + 1]])
    return np.argsort(time[:grid, :grid], axis=None)


POLICY = GridPolicy(__name__, path)
