"""Codes and orders into pictures: uint8 ``[H, W, 3]`` arrays, single or in sheets, and PNG files of them.

Pictures are scaled by whole factors without smoothing: a 32-pixel drawing shows its pixels, an order map its cells.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from oar_scale.results.examples import Picture
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.vq import pixels_to_unit, psnr, unit_to_pixels

WHITE = 255
COLOUR_MAP = "viridis"
UNKNOWN_GREY = 176


@torch.no_grad()
def decode_pictures(vq: ImageTokenizer, codes_SN: Tensor, batch: int = 64) -> list[Picture]:
    """The image of each row of codes, [H, W, 3]."""
    pictures: list[Picture] = []
    for start in range(0, len(codes_SN), batch):
        pictures.extend(unit_to_pixels(vq.decode(codes_SN[start : start + batch].to(vq.device))).cpu().numpy())
    return pictures


def mean_psnr(originals: Sequence[Picture], decoded: Sequence[Picture], batch: int = 64) -> float:
    """Mean PSNR in dB of pictures against others of the same size."""
    parts = []
    for start in range(0, len(originals), batch):
        sides = (torch.from_numpy(np.stack(pictures[start : start + batch])) for pictures in (originals, decoded))
        parts.append(psnr(*(pixels_to_unit(pixels) for pixels in sides)))
    return float(torch.cat(parts).mean())


def step_of_cell(order_SN: Tensor) -> NDArray[np.int64]:
    """When each cell was placed, 0 first: [S, G, G] of orders [S, N]."""
    images, cells = order_SN.shape
    grid = round(cells**0.5)
    return order_SN.cpu().numpy().argsort(axis=1).reshape(images, grid, grid)


def order_map(steps_GG: NDArray[np.integer] | NDArray[np.floating]) -> Picture:
    """A heat map, one pixel a cell, of when each cell of one image was placed: dark first, bright last."""
    return heat_map(steps_GG, 0, steps_GG.size - 1)


def upscale(picture: Picture, factor: int) -> Picture:
    """Every pixel as a square of ``factor x factor``."""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def contact_sheet(rows: Sequence[Sequence[Picture]], gap: int = 2) -> Picture:
    """Pictures of one size in rows and columns, with white gaps of ``gap`` pixels between them; short rows end in white.

    Raises:
        ValueError: no picture at all, or pictures of different sizes.
    """
    shapes = {picture.shape for row in rows for picture in row}
    if len(shapes) != 1:
        raise ValueError(f"a contact sheet needs pictures of one size, got {sorted(shapes) or 'none'}")
    height, width, _ = shapes.pop()
    down, across = height + gap, width + gap
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * down - gap, columns * across - gap, 3), WHITE, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet[r * down : r * down + height, c * across : c * across + width] = picture
    return sheet


def png(picture: Picture) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def heat_map(values: NDArray[np.floating] | NDArray[np.integer], low: float, high: float, colours: str = COLOUR_MAP) -> Picture:
    """One pixel a cell, coloured from ``low`` to ``high``."""
    from matplotlib import colormaps  # half a second, which training workers and actors need not wait for

    share = (np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-12)
    coloured = colormaps[colours](np.clip(share, 0, 1))[..., :3]
    return np.round(coloured * 255).astype(np.uint8)


def known_part(picture: Picture, known: NDArray[np.bool_]) -> Picture:
    """The picture with the cells that were not given ([G, G] False) in grey."""
    height, width = picture.shape[:2]
    rows, columns = np.arange(height) * known.shape[0] // height, np.arange(width) * known.shape[1] // width
    visible = known[rows[:, None], columns[None, :]]
    return np.where(visible[..., None], picture, np.uint8(UNKNOWN_GREY)).astype(np.uint8)
