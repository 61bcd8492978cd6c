"""The training image that looks most like a sample: is it new, or remembered?

    distance = root of the mean squared difference of two pictures' pixels, both scaled to SIDE x SIDE, in levels of 0 .. 255

The other pictures go by once, some at a time, and the nearest so far is kept of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oar_scale.evaluation.neighbours import squared_distances
from oar_scale.results.examples import NearestPicture, Picture

SIDE = 16
"""Small enough that a shift by a pixel or another shade of detail counts little beside what is shown."""
AT_ONCE = 256


def nearest_pictures(pictures: Sequence[Picture], others: Iterable[Picture]) -> list[NearestPicture]:
    """The nearest of the other pictures, for each picture; of equal ones the first.

    Args:
        others: at least one. In memory are at most twice :data:`AT_ONCE` of them, and one for each of ``pictures``.

    Raises:
        ValueError: there are no others.
    """
    small_SP = np.stack([_small(picture) for picture in pictures])
    least_S, found = np.full(len(pictures), np.inf), list[Picture | None]([None] * len(pictures))
    rest = iter(others)
    while some := list(islice(rest, AT_ONCE)):
        distance_SO = squared_distances(small_SP, np.stack([_small(other) for other in some]))
        for row, at in enumerate(distance_SO.argmin(1).tolist()):
            if distance_SO[row, at] < least_S[row]:
                least_S[row], found[row] = distance_SO[row, at], some[at]
    rms_S = np.sqrt(least_S / small_SP.shape[1]).tolist()
    nearest = [NearestPicture(picture, rms) for picture, rms in zip(found, rms_S, strict=True) if picture is not None]
    if len(nearest) < len(pictures):
        raise ValueError("there are no pictures to compare with")
    return nearest


def _small(picture: Picture) -> NDArray[np.float64]:
    """Its pixels when scaled, [SIDE * SIDE * 3]."""
    scaled = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(scaled, dtype=np.float64).ravel()
