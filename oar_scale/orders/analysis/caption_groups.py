"""Maps of the images that share a caption word or a class.

A word's mean map differs from that of all images for two reasons: the word, and that it has few images. The second one is
known: with placing times of variance v at a cell, the mean of n of all S images is off by (1 / n - 1 / S) v, squared. What is left,

    deviation(word)**2 = mean over cells of  (mean of the word - mean of all)**2 - (1 / n - 1 / S) v            at least 0

is what caption words are ranked by, in the time map's unit (0 first, 1 last).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from oar_scale.orders.analysis.statistics import FloatArray, Orders, placing_times

SHORTEST_WORD = 3
"""Letters; shorter ones (a, of, in) name nothing."""


@dataclass(frozen=True)
class Group:
    """The images that share a word or a class."""

    name: str
    images: int
    time_map: FloatArray
    """Mean placing time of each cell [grid, grid], 0 first, 1 last."""
    deviation: float
    """From the map of all images, over the cells; what chance gives a group of this size is taken off."""


def caption_words(caption: str) -> list[str]:
    """The different words of a caption, lower case, as they come."""
    return list(dict.fromkeys(word for word in re.findall(r"\w+", caption.lower()) if len(word) >= SHORTEST_WORD))


def groups(order_SN: Orders, grid: int, names_of: Sequence[Sequence[Hashable]], at_least: int) -> list[Group]:
    """Every name that so many images have, but not all of them; the most frequent first.

    Args:
        names_of: the words or the class of each image.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, names in enumerate(names_of):
        for name in names:
            rows.setdefault(name, []).append(row)
    time_SN = placing_times(order_SN) / max(grid * grid - 1, 1)
    large = [_group(str(name), time_SN[having], time_SN, grid) for name, having in rows.items() if at_least <= len(having) < len(order_SN)]
    return sorted(large, key=lambda group: (-group.images, group.name))


def _group(name: str, time_GN: FloatArray, time_SN: FloatArray, grid: int) -> Group:
    own_N = time_GN.mean(axis=0)
    chance_N = (1 / len(time_GN) - 1 / len(time_SN)) * time_SN.var(axis=0)
    squared = float(((own_N - time_SN.mean(axis=0)) ** 2 - chance_N).mean())
    return Group(name, len(time_GN), own_N.reshape(grid, grid), max(squared, 0.0) ** 0.5)


def most_deviating(groups: Sequence[Group], count: int) -> list[Group]:
    """The groups whose images are ordered most differently from the others."""
    return sorted(groups, key=lambda group: (-group.deviation, group.name))[:count]
