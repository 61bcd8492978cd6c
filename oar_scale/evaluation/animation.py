"""Images that appear cell by cell, in their order: what is not placed yet is grey.

Every frame shows the finished picture through the cells that are there: a decoder looks beyond the cell it decodes, so decoding
half an image would show codes that nobody chose.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from oar_scale.evaluation.pictures import contact_sheet, known_part, upscale
from oar_scale.orders.analysis import placing_times
from oar_scale.orders.analysis.statistics import Orders
from oar_scale.results.examples import Picture

FRAMES = 64
"""At most, after the empty one; grids of more cells show several new ones in a frame."""
FRAME_MS, LAST_MS = 80, 2500


def appearing(pictures: Sequence[Picture], order_SN: Orders, columns: int, pixels: int = 96) -> list[Picture]:
    """The frames: a sheet of all pictures each, from all grey to all there.

    Args:
        pixels: side of a picture on the sheet, about; pictures are scaled by a whole factor.
    """
    time_SN, cells = placing_times(order_SN), order_SN.shape[1]
    factor, grid = max(1, pixels // len(pictures[0])), round(cells**0.5)
    large = [upscale(picture, factor) for picture in pictures]
    frames = []
    for placed in np.unique(np.linspace(0, cells, min(cells, FRAMES) + 1).round().astype(int)):
        shown = [known_part(picture, (time_N < placed).reshape(grid, grid)) for picture, time_N in zip(large, time_SN, strict=True)]
        frames.append(contact_sheet([shown[start : start + columns] for start in range(0, len(shown), columns)], gap=6))
    return frames


def animated(frames: Sequence[Picture], file_format: Literal["WEBP", "GIF"]) -> bytes:
    """The frames as one file that plays in a loop and pauses on the last one."""
    images = [Image.fromarray(frame) for frame in frames]
    if file_format == "GIF":  # with one palette for all frames what does not change is not stored again
        palette = Image.fromarray(np.concatenate([frames[0], frames[-1]])).quantize(256)
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    buffer = io.BytesIO()
    options = {"lossless": True} if file_format == "WEBP" else {}
    durations = [FRAME_MS] * (len(images) - 1) + [LAST_MS]
    images[0].save(buffer, format=file_format, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)
    return buffer.getvalue()
