"""One step of placing cells by confidence: guide the logits, take the best cell, strike it off the list.

Extraction and generation by confidence are the same loop; only the code that is placed differs:

    candidates = model.candidate_rows(prefix, cells)
    winner     = pick_best(scores, cells, ties)
    prefix     = model.commit(prefix, candidates, winner, codes)       the image's own code, or a sampled one
    cells      = without(cells, winner)
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.data.hashing import permutations

_TIE = 1e-6
"""Relative; 8 roundings of float32."""


def tie_ranks(seed: int, images_B: NDArray[np.int64], cells: int) -> Tensor:
    """A fixed random rank of every cell of every image, int64 [B, N]; among equal scores the highest rank wins.

    A function of (seed, image, cell) alone: the same in any batch, process and restart.
    """
    return torch.from_numpy(permutations("tie", cells, seed, images_B))


def pick_best(score_BR: Tensor, cells_BR: Tensor, ties_BN: Tensor) -> Tensor:
    """The index into R of each image's best candidate, however the candidates are listed.

    Scores within a few roundings of the best are ties: the last bits of a score depend on where in a batch it was computed.
    """
    best_B1 = score_BR.amax(1, keepdim=True)
    tied_BR = score_BR >= best_B1 - _TIE * best_B1.abs()
    return ties_BN.gather(1, cells_BR).masked_fill(~tied_BR, -1).argmax(1)


def without(cells_BR: Tensor, winner_B: Tensor) -> Tensor:
    """The other R - 1 candidates; the last one takes the winner's place, so their order changes."""
    kept_BR = cells_BR.scatter(1, winner_B[:, None], cells_BR[:, -1:])
    return kept_BR[:, :-1].contiguous()


def guide(logits_GRV: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: null + scale x (conditional - null).

    Args:
        logits_GRV: the logits of B conditional images, followed (unless ``scale`` is 1) by those of the same images
            under the null condition.

    Returns:
        The guided logits [B, R, V].
    """
    return logits_GRV if scale == 1 else mix_branches(logits_GRV, scale)


def mix_branches(logits_GRV: Tensor, scale: float) -> Tensor:
    """:func:`guide` where the null branch is there whatever the scale."""
    conditional_BRV, null_BRV = logits_GRV.chunk(2)
    return torch.lerp(null_BRV, conditional_BRV, scale)


def guided_batch(tensor_B: Tensor, scale: float) -> Tensor:
    """Repeat along the batch what both branches of :func:`guide` share (codes, cells, winners)."""
    return tensor_B if scale == 1 else torch.cat([tensor_B, tensor_B])
