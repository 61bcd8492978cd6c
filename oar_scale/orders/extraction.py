"""Greedy order extraction: in which order would the model rather have placed this image?

At step t the cells S_t are still empty. One candidate row per empty cell asks the model what lies there; a candidate sees
the text, the cells placed before, and itself:

    c_t = argmax over c in S_t of  score(c | text, c_1 .. c_t-1)            (OAR, arXiv 2504.17069)

The winner's row is, unchanged, the next row of the cache: N (N + 1) / 2 candidate rows for an image of N cells and
nothing is computed twice. :func:`brute_force_orders` asks the same question with a fresh forward pass per candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.schema import ExtractConfig, Score
from oar_scale.model import AnyOrderModel
from oar_scale.orders.picking import guide, guided_batch, pick_best, tie_ranks, without
from oar_scale.orders.scores import SCORES


@dataclass(frozen=True)
class ExtractionSettings:
    """What an order depends on besides the model and the image."""

    score: Score = "gt_logprob"
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is the conditional model alone, at half the cost."""
    tie_seed: int = 0

    @classmethod
    def from_recipe(cls, config: ExtractConfig) -> ExtractionSettings:
        return cls(config.score, config.guidance, config.tie_seed)

    @property
    def id(self) -> str:
        """Names these settings in the order tables."""
        return fingerprint({"method": "exact", "score": self.score, "guidance": self.guidance, "tie_seed": self.tie_seed})


@dataclass(frozen=True)
class Orders:
    """One order for each of B images."""

    order_BN: Tensor
    """Permutations of the cells, int64, first placed first."""
    score_BN: Tensor
    """float32; the score that the cell of the same column had when it was placed."""


@torch.no_grad()
def extract_orders(
    model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, settings: ExtractionSettings, images_B: NDArray[np.int64] | None = None
) -> Orders:
    """Find the confidence order of each image, exactly.

    Args:
        codes_BN: codes in raster order.
        condition_BTD: what ``model.condition`` returned; its dtype and the model's decide the precision.
        images_B: a number for each image that fixes how its ties are broken; default 0 .. B - 1.

    Raises:
        ValueError: codes that are not N of the model's vocabulary for each image, or a model whose scores are not numbers.
    """
    _check_codes(model, codes_BN)
    batch, cells = codes_BN.shape
    score_of = SCORES[settings.score]
    ties_BN = _ties(settings, images_B, batch, cells).to(codes_BN.device)
    order_BN, score_BN = torch.empty_like(codes_BN), torch.empty(batch, cells, device=codes_BN.device)

    prefix = model.begin(_branches(model, condition_BTD, settings))
    empty_BR = torch.arange(cells, device=codes_BN.device).repeat(batch, 1)
    for step in range(cells):
        candidates = model.candidate_rows(prefix, guided_batch(empty_BR, settings.guidance))
        score_BR = score_of(guide(candidates.logits_BRV, settings.guidance), codes_BN.gather(1, empty_BR))
        winner_B = pick_best(score_BR, empty_BR, ties_BN)
        chosen_B1 = empty_BR.gather(1, winner_B[:, None])
        order_BN[:, step], score_BN[:, step] = chosen_B1[:, 0], score_BR.gather(1, winner_B[:, None])[:, 0]
        placed_B = codes_BN.gather(1, chosen_B1)[:, 0]
        prefix = model.commit(prefix, candidates, guided_batch(winner_B, settings.guidance), guided_batch(placed_B, settings.guidance))
        empty_BR = without(empty_BR, winner_B)
    return _checked(order_BN, score_BN)


@torch.no_grad()
def brute_force_orders(
    model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, settings: ExtractionSettings, images_B: NDArray[np.int64] | None = None
) -> Orders:
    """The same orders by a fresh forward pass for every empty cell at every step: slow, and free of any cache."""
    _check_codes(model, codes_BN)
    batch, cells = codes_BN.shape
    ties_BN = _ties(settings, images_B, batch, cells).to(codes_BN.device)
    empty_BR = torch.arange(cells, device=codes_BN.device).repeat(batch, 1)
    order_BN, score_BN = codes_BN.new_empty(batch, 0), codes_BN.new_empty(batch, 0, dtype=torch.float32)
    for _ in range(cells):
        score_BR = _fresh_scores(model, codes_BN, condition_BTD, settings, order_BN, empty_BR)
        winner_B1 = pick_best(score_BR, empty_BR, ties_BN)[:, None]
        order_BN = torch.cat([order_BN, empty_BR.gather(1, winner_B1)], dim=1)
        score_BN = torch.cat([score_BN, score_BR.gather(1, winner_B1)], dim=1)
        empty_BR = without(empty_BR, winner_B1[:, 0])
    return _checked(order_BN, score_BN)


@torch.no_grad()
def regret(model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, settings: ExtractionSettings, order_BN: Tensor) -> Tensor:
    """How much better the best empty cell was than the one an order places next, in units of the score: float32 [B, N].

    By brute force along the given orders. Zero everywhere is what greedy means, and a tolerance of a few roundings
    here is a fairer test of an extraction than equality of orders, which a near-tie may flip.
    """
    columns = []
    for step in range(order_BN.shape[1]):
        score_BR = _fresh_scores(model, codes_BN, condition_BTD, settings, order_BN[:, :step], order_BN[:, step:])
        columns.append(score_BR.amax(1) - score_BR[:, 0])
    return torch.stack(columns, dim=1)


def _fresh_scores(
    model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, settings: ExtractionSettings, placed_BK: Tensor, empty_BR: Tensor
) -> Tensor:
    """Scores [B, R] of the empty cells after the placed ones, each cell the last one of its own forward pass."""
    columns = []
    branches_GTD, branch_codes_GN = _branches(model, condition_BTD, settings), guided_batch(codes_BN, settings.guidance)
    for r in range(empty_BR.shape[1]):
        order_BL = torch.cat([placed_BK, empty_BR[:, r : r + 1]], dim=1)
        logits_GLV = model(branch_codes_GN, guided_batch(order_BL, settings.guidance), branches_GTD)
        guided_B1V = guide(logits_GLV[:, -1:].float(), settings.guidance)
        columns.append(SCORES[settings.score](guided_B1V, codes_BN.gather(1, empty_BR[:, r : r + 1])))
    return torch.cat(columns, dim=1)


def _branches(model: AnyOrderModel, condition_BTD: Tensor, settings: ExtractionSettings) -> Tensor:
    """The conditional rows, followed by the null rows where guidance needs them."""
    if settings.guidance == 1:
        return condition_BTD
    return torch.cat([condition_BTD, model.null_condition(len(condition_BTD)).to(condition_BTD.dtype)])


def _ties(settings: ExtractionSettings, images_B: NDArray[np.int64] | None, batch: int, cells: int) -> Tensor:
    return tie_ranks(settings.tie_seed, np.arange(batch) if images_B is None else images_B, cells)


def _check_codes(model: AnyOrderModel, codes_BN: Tensor) -> None:
    cells, vocabulary = model.spec.cells, model.spec.vocab_size
    if codes_BN.ndim != 2 or codes_BN.shape[1] != cells:
        raise ValueError(f"codes of shape {tuple(codes_BN.shape)}, expected [B, {cells}]: the model's grid has {cells} cells")
    if codes_BN.numel() and not (int(codes_BN.min()) >= 0 and int(codes_BN.max()) < vocabulary):
        raise ValueError(f"codes from {int(codes_BN.min())} to {int(codes_BN.max())}, the model's vocabulary is 0 .. {vocabulary - 1}")


def _checked(order_BN: Tensor, score_BN: Tensor) -> Orders:
    if score_BN.isnan().any():
        raise ValueError("the model's scores are not numbers (NaN): its weights are damaged, or its precision is too low for them")
    return Orders(order_BN, score_BN)
