"""Row by row from the top, each from left to right."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oar_scale.orders.policies import GridPolicy


def path(grid: int) -> NDArray[np.int64]:
    """Cells [N] in raster order."""
    return np.arange(grid * grid)


POLICY = GridPolicy(__name__, path)
