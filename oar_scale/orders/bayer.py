"""The order in which ordered dithering blackens pixels (Bayer 1973): coarse to fine, each lattice filled evenly.

0 8 2 a      A grid that is no power of two takes the next larger one's order without the cells that lie outside.
c 4 e 6
3 b 1 9
f 7 d 5
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bayer_order(grid: int) -> NDArray[np.int64]:
    """Cells [N] by their value in the Bayer matrix of the next power of two."""
    time = np.zeros((1, 1), dtype=np.int64)
    while len(time) < grid:
        time = np.block([[4 * time, 4 * time + 2], [4 * time + 3, 4 * time + 1]])
    return np.argsort(time[:grid, :grid], axis=None)
