"""One step of placing cells by confidence: guide the rows, take the best cells, break ties at random.

Extraction and generation by confidence are the same loop; only the code that is placed differs:

    candidates = decoder.candidate_rows(prefix, cells)
    scores     = score_rows(head, guide(candidates.rows), ...)
    winner     = pick(scores (+ temperature x Gumbel noise), ...)
    prefix     = decoder.commit(prefix, candidates, winner, codes)       the image's own code, or a sampled one
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.data.hashing import device_gumbel, device_hash, device_permutations, device_uniform, signed_bits

Images = NDArray[np.int64]
"""A number for each image of a batch."""
_TIE = 1e-6
"""Relative; 8 roundings of float32."""


@dataclass(frozen=True)
class CounterRNG:
    """All random numbers that the orders and the codes of B images depend on, from a counter-based generator.

    Each number is a function of (seed, image, draw, step or code, cell) alone, so it is the same in any batch, process and restart.
    """

    seed: int | Tensor
    """One of all images, or int64 [B, 1]."""
    image_B1: Tensor
    """int64: a number for each image."""
    draw: int
    """Number of the order, where several are wanted of an image."""
    cells: int
    code_B1: Tensor
    """The hash that all noise of an image's codes begins with."""

    @classmethod
    def of(cls, seed: int, images_B: Images, draw: int, cells: int, device: torch.device) -> CounterRNG:
        """The numbers of these images, by their order ``draw`` and N ``cells``, on a device."""
        image_B1 = torch.from_numpy(images_B.astype(np.int64)).to(device)[:, None]
        return cls(seed, image_B1, draw, cells, device_hash("code noise", seed, image_B1, draw))

    @classmethod
    def none(cls, images: int, cells: int, device: torch.device) -> CounterRNG:
        """Room for the numbers of images with seeds of their own; see :meth:`put`."""
        seed_B1, image_B1, code_B1 = torch.zeros(3, images, 1, dtype=torch.long, device=device)
        return cls(seed_B1, image_B1, 0, cells, code_B1)

    def put(self, place: int, seed: int, image: int) -> None:
        """Take in an image, in place."""
        assert isinstance(self.seed, Tensor)
        one = CounterRNG.of(seed, np.array([image]), self.draw, self.cells, self.image_B1.device)
        self.seed[place], self.image_B1[place], self.code_B1[place] = signed_bits(seed), one.image_B1[0], one.code_B1[0]

    def part(self, images: slice | Tensor) -> CounterRNG:
        """Those of some of the images."""
        seed = self.seed[images] if isinstance(self.seed, Tensor) else self.seed
        return replace(self, seed=seed, image_B1=self.image_B1[images], code_B1=self.code_B1[images])

    def ties(self) -> Tensor:
        """A rank of every cell of every image, int64 [B, N], the same at every step and in every draw: the highest of equals wins."""
        seed = self.seed[:, 0] if isinstance(self.seed, Tensor) else self.seed
        return device_permutations("tie", self.cells, seed, self.image_B1[:, 0])

    def uniform(self, purpose: str, step: int | Tensor) -> Tensor:
        """Numbers in (0, 1) for each cell at a step, float64 [B, N]; or at a step of each cell's own."""
        cell_N = torch.arange(self.cells, device=self.image_B1.device)
        return device_uniform(purpose, self.seed, self.image_B1, self.draw, step, cell_N)

    def gumbel(self, step: int | Tensor) -> Tensor:
        """Standard Gumbel noise for each cell at a step, float32 [B, N]."""
        return -(-self.uniform("cell noise", step).log()).log().float()

    def code_gumbel(self, cells_BM: Tensor, codes: int) -> Tensor:
        """Standard Gumbel noise for each code of some cells, float32 [B, M, V].

        A cell's noise is the same at every step: whenever and however often it is drawn, equal logits give the same code.
        """
        code_V = torch.arange(codes, device=cells_BM.device)
        return device_gumbel(self.code_B1[:, :, None], cells_BM[:, :, None], code_V)


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


def empty_cells(empty_BN: Tensor, count: int) -> Tensor:
    """The empty cells [B, count] in raster order; every image has ``count`` of them."""
    # A stable sort of "is not empty" moves the empty cells to the front and keeps their order. Their number is known without counting
    # them on the device, which would make every step wait for it.
    return (~empty_BN).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def check_numbers(score_BN: Tensor) -> None:
    """Raises ArithmeticError for scores that are NaN."""
    if score_BN.isnan().any():
        raise no_numbers()


def no_numbers() -> ArithmeticError:
    """The error of scores that are NaN."""
    # The images cannot cause this: the model may be damaged, or the device that computed it.
    return ArithmeticError(
        "the model's scores are not numbers (NaN): its weights are damaged, its precision is too low, or the device is broken"
    )


def guide(conditional: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: null + scale x (conditional - null).

    Of normalised rows or of logits, which are the same mixture: the output head is linear.

    Args:
        conditional, null: about the same cells of the same images [B, ..., D], with the caption and without.
        scale: one for all, or a tensor with one for each row [B, ...], in float32: the same numbers give the same rows.
    """
    if not isinstance(scale, Tensor):
        return torch.lerp(null, conditional, scale)
    # A number is multiplied in float32 in any dtype of the rows; a tensor would have to be rounded to theirs: 3.3 is 3.297 in bfloat16.
    return torch.lerp(null.float(), conditional.float(), scale[..., None].float()).to(null.dtype)
