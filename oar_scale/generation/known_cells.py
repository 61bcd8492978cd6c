"""Cells whose codes are there before an image is drawn: what may be given, and where they come in its order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.model import AnyOrderModel
from oar_scale.model.layouts import RASTER_ONLY


class Known(NamedTuple):
    """Cells of each image that are there before the first step, in the order the model is shown them."""

    cells_BK: Tensor
    """Up to K of an image; -1 behind the last one of an image that has fewer."""
    codes_BK: Tensor


def sequence(order_BN: Tensor, known: Known, counts_B: NDArray[np.int64]) -> Tensor:
    """All cells [B, N] as they are placed: those that are known, then the others in the given order."""
    cells, device = order_BN.shape[1], order_BN.device
    count_B1 = torch.from_numpy(counts_B).to(device)[:, None]
    place_N = torch.arange(cells, device=device)
    # A column more takes what is not there.
    known_BN = torch.zeros(len(order_BN), cells + 1, dtype=torch.bool, device=device).scatter(1, known.cells_BK % (cells + 1), True)
    rest_BN = order_BN.gather(1, known_BN.gather(1, order_BN).to(torch.uint8).argsort(dim=1, stable=True))
    known_first_BN = F.pad(known.cells_BK, (0, cells - known.cells_BK.shape[1]))
    return torch.where(place_N < count_B1, known_first_BN, rest_BN.gather(1, (place_N - count_B1).clamp_min(0)))


def known_counts(model: AnyOrderModel, batch: int, order_BN: Tensor | None, known: Known) -> NDArray[np.int64]:
    """The number of known cells of each image. Raises ValueError for an order or for known cells that cannot be, or not in this layout."""
    cells, vocab, device = model.spec.cells, model.spec.vocab_size, known.cells_BK.device
    raster_BN = torch.arange(cells, device=device).expand(batch, -1)
    if order_BN is not None and not (order_BN.shape == raster_BN.shape and torch.equal(order_BN.sort(1).values, raster_BN)):
        raise ValueError(f"order_BN must hold a permutation of 0..{cells - 1} for each of {batch} images, got {list(order_BN.shape)}")
    cells_BK, codes_BK = known
    shape = (batch, cells_BK.shape[-1])
    if cells_BK.shape != shape or codes_BK.shape != shape:
        raise ValueError(f"known cells {list(cells_BK.shape)} and codes {list(codes_BK.shape)} must both be [{batch}, K]")
    there_BK = cells_BK != -1
    if (there_BK[:, 1:] & ~there_BK[:, :-1]).any():
        raise ValueError("known cells that are -1 (not there) must come behind all others of their image")
    if (there_BK & ((codes_BK < 0) | (codes_BK >= vocab))).any():
        raise ValueError(f"known codes must lie in 0..{vocab - 1}")
    if (there_BK & ((cells_BK < 0) | (cells_BK >= cells))).any():
        raise ValueError(f"known cells must lie in 0..{cells - 1}")
    named_BN = torch.zeros(batch, cells + 1, dtype=torch.long, device=device).scatter_add(1, cells_BK % (cells + 1), there_BK.long())
    if (named_BN > 1).any():
        raise ValueError("a known cell is named twice")
    if model.spec.layout == "raster":  # asked before anything is drawn: on a GPU the layout's own check would end the process
        place_K = torch.arange(cells_BK.shape[1], device=device)
        if (there_BK & (cells_BK != place_K)).any() or (order_BN is not None and not torch.equal(order_BN, raster_BN)):
            raise ValueError(RASTER_ONLY)
    counts_B: NDArray[np.int64] = there_BK.sum(1).cpu().numpy()
    return counts_B
