"""How many cells each step of extraction or sampling places. Imports no torch, so that the planner can count steps, too.

exact                 one cell a step                                        N (N + 1) / 2 candidate rows in extraction
commit_per_step k     the k best; the second best did not know of the best   about 1 / k of the rows
cosine_steps S        more and more, as RandAR samples                       by the number of steps
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oar_scale.config.schema import ExtractConfig
    from oar_scale.orders.settings import ExtractionSettings


def step_sizes(settings: ExtractionSettings | ExtractConfig, cells: int) -> list[int]:
    """Number of cells that each step of an extraction places; they sum to ``cells``. A given first cell is a step of its own."""
    if settings.cosine_steps is not None:
        first, *others = cells_per_step(cells, settings.cosine_steps)
        return [first, *others] if settings.first_cell == "free" or first == 1 else [1, first - 1, *others]
    sizes = [1] if settings.first_cell != "free" else []
    while (left := cells - sum(sizes)) > 0:
        sizes.append(min(settings.commit_per_step, left))
    return sizes


def cells_per_step(cells: int, steps: int | None, known: int = 0) -> list[int]:
    """Number of cells that each pass places: after pass s of S, floor((1 - cos(pi/2 * s/S)) * N + 1) of N are there (RandAR, sec. 3.3).

    Of several passes the first places one cell, as RandAR's does.

    Args:
        cells: N.
        steps: S; None places one cell a pass, 1 places all cells in one.
        known: cells that were placed before the first pass. The first pass then fills up to the next of these numbers.

    Returns:
        At least one cell for each pass; they sum to ``cells - known``.
    """
    sizes: list[int] = []
    placed, step = 0, 1
    while placed < cells:
        target = cells if steps is None else int((1 - math.cos(math.pi / 2 * step / steps)) * cells + 1)
        one = steps is None or (steps > 1 and not sizes)
        size = 1 if one else max(1, min(target, cells) - placed)
        placed, step = placed + size, step + 1
        sizes.append(size)
    ends = [end for end in accumulate(sizes) if end > known]
    return [end - start for start, end in pairwise([known, *ends])]
