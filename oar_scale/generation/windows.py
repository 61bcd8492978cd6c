"""Which windows of a picture larger than the model's square are drawn, and in which order.

    known | to be drawn                     a window begins half a side before what it draws, and what it draws ends an eighth of a side
    ....+---------+                         before its own end, unless nothing more is to be drawn there: models end their pictures at the
    ....|....#### |###                      border. The next one begins three eighths of a side farther, and so knows half of what it
    ....+---------+                         sees, too.

What is marked falls into parts that lie apart. A part that is small against the square gets one window, with the part in its middle; a
larger one gets windows from half a side before it to half a side behind it. Of all windows that one has the next turn which has the
fewest pixels left to be drawn, and so the best known surroundings; of equals the one nearest to the middle of its part. All of this
depends on the marks alone, and on no pixel.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
from numpy.typing import NDArray

from oar_scale.errors import UserError
from oar_scale.generation.canvas import Box

MAX_WINDOWS = 4096
"""Of one picture. As many windows of 32 x 32 pixels cover half a megapixel."""
_MARGIN, _ALONE = 1 / 8, 3 / 4
"""Shares of the square's side: what is not taken of a window where more is to be drawn, and the largest part that has one window."""


def plan_windows(drawn_HW: NDArray[np.bool_], size: int, where: str) -> list[tuple[Box, NDArray[np.bool_]]]:
    """The windows in the order in which they are drawn, and the pixels that each draws; every marked one once.

    Args:
        drawn_HW: the pixels that are marked.
        size: side of a window. A side of the picture that is shorter has windows as short.
        where: names the picture in errors.

    Raises:
        UserError: there would be more than :data:`MAX_WINDOWS`.
    """
    height, width = drawn_HW.shape
    away: dict[Box, float] = {}  # of each window: how far from the middle of its part it is
    for left, top, right, bottom in _parts(drawn_HW, max(1, size // 4), where):
        for y in _starts(top, bottom, height, size):
            for x in _starts(left, right, width, size):
                box = x, y, min(x + size, width), min(y + size, height)
                if drawn_HW[y : box[3], x : box[2]].any():
                    away[box] = math.hypot(x + box[2] - left - right, y + box[3] - top - bottom)
    if len(away) > MAX_WINDOWS:
        raise too_many_windows(len(away), size, where)
    return _by_turns(drawn_HW.copy(), away, int(_MARGIN * size))


def _by_turns(open_HW: NDArray[np.bool_], away: dict[Box, float], margin: int) -> list[tuple[Box, NDArray[np.bool_]]]:
    """The windows that draw something, those with the best known surroundings first."""
    count = {(x, y, right, bottom): int(open_HW[y:bottom, x:right].sum()) for x, y, right, bottom in away}
    turns = [(open_pixels, away[box], box) for box, open_pixels in count.items()]
    heapq.heapify(turns)
    chosen = []
    while turns:
        open_pixels, _, box = heapq.heappop(turns)
        if open_pixels != count[box] or not open_pixels:
            continue  # said before another window was drawn, or nothing is left
        left, top, right, bottom = box
        drawn_HW = open_HW[top:bottom, left:right] & _taken(open_HW, box, margin)
        if not drawn_HW.any():
            continue  # it has another turn when one of its neighbours has drawn
        chosen.append((box, drawn_HW))
        open_HW[top:bottom, left:right] &= ~drawn_HW
        for other in count:
            if _overlap(other, box):
                count[other] = int(open_HW[other[1] : other[3], other[0] : other[2]].sum())
                heapq.heappush(turns, (count[other], away[other], other))
    return chosen


def _taken(open_HW: NDArray[np.bool_], box: Box, margin: int) -> NDArray[np.bool_]:
    """The pixels of a window that are taken from its drawing: not its margins to sides beyond which more is to be drawn."""
    (left, top, right, bottom), (height, width) = box, open_HW.shape
    taken_HW = np.ones((bottom - top, right - left), dtype=np.bool_)
    taken_HW[:, : margin * bool(left and open_HW[top:bottom, left - 1].any())] = False
    taken_HW[: margin * bool(top and open_HW[top - 1, left:right].any())] = False
    taken_HW[:, right - left - margin * bool(right < width and open_HW[top:bottom, right].any()) :] = False
    taken_HW[bottom - top - margin * bool(bottom < height and open_HW[bottom, left:right].any()) :] = False
    return taken_HW


def _starts(first: int, end: int, side: int, size: int) -> list[int]:
    """Where windows begin along one axis of a picture, of which ``first`` to ``end`` is a part."""
    length = end - first
    if length <= _ALONE * size:
        starts = np.array([(first + end - size) // 2])
    else:
        starts = np.linspace(first - size // 2, end - size // 2, math.ceil(length / ((1 / 2 - _MARGIN) * size)) + 1).round().astype(int)
    return sorted(set(starts.clip(0, max(0, side - size)).tolist()))


def _parts(drawn_HW: NDArray[np.bool_], block: int, where: str) -> list[Box]:
    """The box around each part of what is marked; parts have a block of pixels [block, block] between them that is not marked."""
    rows_hW = np.logical_or.reduceat(drawn_HW, np.arange(0, drawn_HW.shape[0], block), axis=0)
    blocks_hw = np.logical_or.reduceat(rows_hW, np.arange(0, drawn_HW.shape[1], block), axis=1)
    if (count := int(blocks_hw.sum())) > 16 * MAX_WINDOWS:  # as many blocks as there are in windows that do not overlap
        raise too_many_windows(count // 16, 4 * block, where)
    left_over = set(zip(*(each.tolist() for each in blocks_hw.nonzero()), strict=True))
    boxes = []
    for start in sorted(left_over):
        if start not in left_over:
            continue
        part, new = [], [start]
        left_over.remove(start)
        while new:
            y, x = new.pop()
            part.append((y, x))
            around = {(y + down, x + across) for down in (-1, 0, 1) for across in (-1, 0, 1)} & left_over
            left_over -= around
            new.extend(around)
        (top, left), (bottom, right) = np.min(part, axis=0) * block, (np.max(part, axis=0) + 1) * block
        ys, xs = drawn_HW[top:bottom, left:right].nonzero()
        boxes.append((int(left + xs.min()), int(top + ys.min()), int(left + xs.max()) + 1, int(top + ys.max()) + 1))
    return boxes


def _overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def too_many_windows(count: int, size: int, where: str) -> UserError:
    """The error of a picture that would take so many windows."""
    return UserError(
        f"{where}: what is marked would take at least {count} windows of {size} x {size} pixels, and {MAX_WINDOWS} are drawn at most. "
        "Scale the picture down, mark less, or draw it without windows."
    )
