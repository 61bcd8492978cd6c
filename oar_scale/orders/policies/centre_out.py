"""By distance from the middle of the grid, nearest first; cells of one distance clockwise, from the top."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oar_scale.orders.policies import GridPolicy


def path(grid: int) -> NDArray[np.int64]:
    """Cells [N] by their distance from the middle."""
    row_N, column_N = np.divmod(np.arange(grid * grid), grid)
    up_N, right_N = grid - 1 - 2 * row_N, 2 * column_N - (grid - 1)  # twice the distance: whole numbers, so that ties are ties
    clockwise_N = np.arctan2(right_N, up_N) % (2 * np.pi)
    return np.lexsort((clockwise_N, up_N**2 + right_N**2)).astype(np.int64)


POLICY = GridPolicy(__name__, path)
