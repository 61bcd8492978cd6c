"""Do two extractions agree? The orders of the same images by another seed, score or checkpoint.

A distance between two orders of an image means little alone: two different images of a data set may have similar orders, too.
So it stands beside the distance between the orders of *different* images, one of each extraction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oar_scale.errors import UserError
from oar_scale.orders.analysis.statistics import FloatArray, Orders, kendall_distance, mean_time_map


@dataclass(frozen=True)
class Agreement:
    """Agreement of two orders for each of S images."""

    name: str
    images: int
    distance: float
    """Mean Kendall tau distance between the two orders of an image."""
    other_image_distance: float
    """The same between an image's order and the second order of another image; nan for a single image."""
    same_first: float
    """Share of the images whose first cell is the same."""
    early_overlap: float
    """Share of the first quarter of the cells that are in the other order's first quarter as well; 1/4 by chance."""
    map_correlation: float
    """Correlation of the two mean maps; nan where one is flat."""


def agreement(name: str, first_SN: Orders, second_SN: Orders, grid: int) -> Agreement:
    """Compare two orders [S, N] of each image, in the same sequence of images.

    Raises:
        UserError: orders of another grid.
    """
    if first_SN.shape != second_SN.shape:
        raise UserError(f"{name}: orders of {second_SN.shape[1]} cells, the run's have {first_SN.shape[1]}. They cannot be compared.")
    early = max(first_SN.shape[1] // 4, 1)
    both_SE = (first_SN[:, :early, None] == second_SN[:, None, :early]).any(axis=2)
    return Agreement(
        name=name,
        images=len(first_SN),
        distance=float(kendall_distance(first_SN, second_SN).mean()),
        other_image_distance=float(kendall_distance(first_SN[:-1], second_SN[1:]).mean()) if len(first_SN) > 1 else float("nan"),
        same_first=float((first_SN[:, 0] == second_SN[:, 0]).mean()),
        early_overlap=float(both_SE.mean()),
        map_correlation=_correlation(mean_time_map(first_SN, grid), mean_time_map(second_SN, grid)),
    )


def _correlation(first: FloatArray, second: FloatArray) -> float:
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale else float("nan")
