"""One step of placing cells by confidence: guide the rows, take the best cells, break ties at random.

Extraction and generation by confidence are the same loop; only the code that is placed differs:

    candidates = decoder.candidate_rows(prefix, cells)
    scores     = score_rows(head, guide(candidates.rows), ...)
    winner     = pick(scores (+ temperature x Gumbel noise), ...)
    prefix     = decoder.commit(prefix, candidates, winner, codes)       the image's own code, or a sampled one
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.data.hashing import device_permutations, device_uniform

_TIE = 1e-6
"""Relative; 8 roundings of float32."""


@dataclass(frozen=True)
class CounterRNG:
    """All random numbers that the orders of B images depend on, from a counter-based generator.

    Each number is a function of (seed, image, draw, step, cell) alone, so it is the same in any batch, process and restart.
    """

    seed: int
    image_B1: Tensor
    """int64: a number for each image."""
    draw: int
    """Number of the order, where several are wanted of an image."""
    cells: int

    @classmethod
    def of(cls, seed: int, images_B: NDArray[np.int64], draw: int, cells: int, device: torch.device) -> CounterRNG:
        """The numbers of these images, by their order ``draw`` and N ``cells``, on a device."""
        return cls(seed, torch.from_numpy(images_B.astype(np.int64)).to(device)[:, None], draw, cells)

    def ties(self) -> Tensor:
        """A rank of every cell of every image, int64 [B, N], the same at every step and in every draw: the highest of equals wins."""
        return device_permutations("tie", self.cells, self.seed, self.image_B1[:, 0])

    def uniform(self, purpose: str, step: int | Tensor) -> Tensor:
        """Numbers in (0, 1) for each cell at a step, float64 [B, N]; or at a step of each cell's own."""
        cell_N = torch.arange(self.cells, device=self.image_B1.device)
        return device_uniform(purpose, self.seed, self.image_B1, self.draw, step, cell_N)

    def gumbel(self, step: int) -> Tensor:
        """Standard Gumbel noise for each cell at a step, float32 [B, N]."""
        return -(-self.uniform("cell noise", step).log()).log().float()


def pick_best(score_BN: Tensor, ties_BN: Tensor) -> Tensor:
    """Each image's best cell [B]; cells that may not be picked have the score -inf.

    Scores within a few roundings of the best (1e-6 of it) are ties: the last bits of a score depend on where in a batch it was computed.
    Where a decoupled model cannot tell the cells of an empty image apart, their scores are the same to the last bit in any precision.
    """
    best_B1 = score_BN.amax(1, keepdim=True)
    tied_BN = score_BN >= best_B1 - _TIE * best_B1.abs()
    return ties_BN.masked_fill(~tied_BN, -1).argmax(1)


def pick_several(score_BN: Tensor, ties_BN: Tensor, count: int) -> Tensor:
    """The ``count`` best cells of each image [B, count], best first; the other arguments are those of :func:`pick_best`."""
    picked = []
    for _ in range(count):  # one by one, and not by topk, which breaks ties by position and not by rank
        cell_B = pick_best(score_BN, ties_BN)
        picked.append(cell_B)
        score_BN = score_BN.scatter(1, cell_B[:, None], -torch.inf)
    return torch.stack(picked, dim=1)


def guide(rows_GRD: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: null + scale x (conditional - null).

    Of normalised rows or of logits, which are the same mixture: the output head is linear.

    Args:
        rows_GRD: the rows of B conditional images, followed (unless ``scale`` is 1) by those of the same images under the null condition.

    Returns:
        The guided rows [B, R, D].
    """
    return rows_GRD if scale == 1 else mix_branches(rows_GRD, scale)


def mix_branches(rows_GRD: Tensor, scale: float) -> Tensor:
    """:func:`guide` where the null branch is there whatever the scale."""
    conditional_BRD, null_BRD = rows_GRD.chunk(2)
    return torch.lerp(null_BRD, conditional_BRD, scale)


def guided_batch(tensor_B: Tensor, scale: float) -> Tensor:
    """Repeat along the batch what both branches of :func:`guide` share (codes, cells, winners)."""
    return tensor_B if scale == 1 else torch.cat([tensor_B, tensor_B])
