"""How many cells each step places, in extraction and in drawing; without torch, so that a plan can count them, too."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oar_scale.config.schema import ExtractConfig
    from oar_scale.orders.extraction import ExtractionSettings


def step_sizes(settings: ExtractionSettings | ExtractConfig, cells: int) -> list[int]:
    """How many cells each step places. A first cell that is given is placed on its own."""
    if settings.cosine_steps is not None:
        return cells_per_step(cells, settings.cosine_steps)
    sizes = [1] if settings.first_cell != "free" else []
    while (left := cells - sum(sizes)) > 0:
        sizes.append(min(settings.commit_per_step, left))
    return sizes


def cells_per_step(cells: int, steps: int | None, known: int = 0) -> list[int]:
    """How many cells each pass places: after pass s of S, floor((1 - cos(pi/2 * s/S)) * N + 1) of N are there (RandAR, sec. 3.3).

    At least one a pass; the first pass places one. ``known`` cells count as placed before the first.
    """
    sizes: list[int] = []
    placed, step = known, 1
    while placed < cells:
        target = cells if steps is None else int((1 - math.cos(math.pi / 2 * step / steps)) * cells + 1)
        size = 1 if steps is None or not sizes else max(1, min(target, cells) - placed)
        sizes.append(size)
        placed, step = placed + size, step + 1
    return sizes
