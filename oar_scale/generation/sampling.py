"""Drawing images: the model says where to go on, and with what.

    repeat until no cell is empty
        one candidate row per empty cell           p(code | caption, placed codes, cell) for all of them, in one pass
        cell  = argmax over cells of max over codes log p        most confident cell   (+ order_temperature * Gumbel)
        code ~ p( . | cell)                                      temperature, top-k

The cell is chosen by the largest probability of its distribution, before a code is drawn: choosing by the probability of
drawn codes would favour cells that happened to draw their likely code. In the first steps this tends to pick background.
With a given order there is one candidate per step, the cell whose turn it is, and everything else is the same.

Under guidance (``orders.picking``) every image goes through the model with its caption and without, in one batch, and cells
are compared by the guided distribution, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oar_scale.config.schema import SampleConfig
from oar_scale.model import AnyOrderModel
from oar_scale.orders.picking import guide, guided_batch
from oar_scale.orders.scores import gt_logprob


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How codes and cells are chosen. Defaults live in the recipe (``sample``)."""

    guidance: float
    """Scale of classifier-free guidance: 1 is the conditional model alone, 0 ignores the caption."""
    temperature: float
    """Of the code; above 0. ``top_k`` 1 is the greedy choice."""
    top_k: int
    """Codes to choose from; 0 keeps the whole vocabulary."""
    order_temperature: float
    """Gumbel noise on the log-confidence of the cells; 0 takes the most confident cell."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} must be above 0; top_k=1 makes the choice greedy")
        for name in ("guidance", "top_k", "order_temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")

    @classmethod
    def from_recipe(cls, sample: SampleConfig) -> SampleSettings:
        return cls(
            guidance=sample.guidance,
            temperature=sample.temperature,
            top_k=sample.top_k,
            order_temperature=sample.order_temperature,
        )


class Known(NamedTuple):
    """K cells of each image that are there before the first step, in the order the model is shown them."""

    cells_BK: Tensor
    codes_BK: Tensor


class Generated(NamedTuple):
    codes_BN: Tensor
    """int64, raster order."""
    order_BN: Tensor
    """int64: the cells as they were placed, known ones first."""
    score_BN: Tensor
    """float32 nats: log of the largest guided probability at the cell of that step; 0 for known cells."""


@torch.no_grad()  # not inference mode: the model keeps its table of rotations, and may be trained afterwards
def generate(
    model: AnyOrderModel,
    condition_BTD: Tensor,
    settings: SampleSettings,
    generator: torch.Generator,
    order_BN: Tensor | None = None,
    known: Known | None = None,
) -> Generated:
    """Draw one image for each condition, all images one cell a step.

    Args:
        condition_BTD: what ``model.condition`` returned. Under guidance the model sees a batch of 2B.
        generator: source of all noise. It may live on another device than the model; the CPU's gives every device the
            same noise.
        order_BN: a permutation of the cells for each image, to be followed; None: the model chooses. Known cells are
            passed over.
        known: cells whose codes are given.

    Raises:
        ValueError: the model is in training mode; an order that is no permutation of the cells; known cells that repeat
            or lie outside the grid, or codes outside the vocabulary.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes its answers: call model.eval() first")
    batch, device = len(condition_BTD), condition_BTD.device
    if known is None:
        nothing = torch.empty(batch, 0, dtype=torch.long, device=device)
        known = Known(nothing, nothing)
    empty_BR = _empty_cells(model, batch, order_BN, known, device)
    image_B = torch.arange(batch, device=device)

    def branches(rows: Tensor) -> Tensor:
        return guided_batch(rows, settings.guidance)

    null_BTD = model.null_condition(batch).to(condition_BTD)
    prefix = model.begin(condition_BTD if settings.guidance == 1 else torch.cat([condition_BTD, null_BTD]))
    prefix = model.prefill(prefix, branches(known.cells_BK), branches(known.codes_BK))
    codes_BN = torch.zeros(batch, model.spec.cells, dtype=torch.long, device=device).scatter(1, known.cells_BK, known.codes_BK)
    placed, scores = [known.cells_BK], [torch.zeros(known.cells_BK.shape, device=device)]
    while empty_BR.shape[1] > 0:
        candidates = model.candidate_rows(prefix, branches(empty_BR if order_BN is None else empty_BR[:, :1]))
        logits_BRV = guide(candidates.logits_BRV, settings.guidance)
        confidence_BR = gt_logprob(logits_BRV, logits_BRV.argmax(-1))
        winner_B = (confidence_BR + settings.order_temperature * _gumbel(confidence_BR, generator)).argmax(1)
        cell_B, code_B = empty_BR[image_B, winner_B], _draw(logits_BRV[image_B, winner_B], settings, generator)
        prefix = model.commit(prefix, candidates, branches(winner_B), branches(code_B))
        codes_BN[image_B, cell_B] = code_B
        placed.append(cell_B[:, None])
        scores.append(confidence_BR[image_B, winner_B, None])
        empty_BR = empty_BR[empty_BR != cell_B[:, None]].view(batch, -1)
    return Generated(codes_BN, torch.cat(placed, dim=1), torch.cat(scores, dim=1))


def _draw(logits_BV: Tensor, settings: SampleSettings, generator: torch.Generator) -> Tensor:
    """A code [B] of each image: the Gumbel-max trick over the k most likely ones."""
    kept = logits_BV.topk(min(settings.top_k or logits_BV.shape[1], logits_BV.shape[1]), dim=1)
    choice_B1 = (kept.values / settings.temperature + _gumbel(kept.values, generator)).argmax(1, keepdim=True)
    return kept.indices.gather(1, choice_B1)[:, 0]


def _gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, finite, of the shape and on the device of ``like``."""
    exponential = torch.empty(like.shape, device=generator.device).exponential_(generator=generator)
    return -exponential.clamp_min(torch.finfo(torch.float32).tiny).log().to(like.device)


def _empty_cells(model: AnyOrderModel, batch: int, order_BN: Tensor | None, known: Known, device: torch.device) -> Tensor:
    """The cells [B, N - K] to be placed: in the given order, else in raster order."""
    cells, vocab = model.spec.cells, model.spec.vocab_size
    raster_BN = torch.arange(cells, device=device).expand(batch, -1)
    if order_BN is not None and not (order_BN.shape == raster_BN.shape and torch.equal(order_BN.sort(1).values, raster_BN)):
        raise ValueError(f"order_BN must hold a permutation of 0..{cells - 1} for each of {batch} images, got {list(order_BN.shape)}")
    count = known.cells_BK.shape[-1]
    if known.cells_BK.shape != (batch, count) or known.codes_BK.shape != (batch, count):
        raise ValueError(f"known cells {list(known.cells_BK.shape)} and codes {list(known.codes_BK.shape)} must both be [{batch}, K]")
    if ((known.codes_BK < 0) | (known.codes_BK >= vocab)).any():
        raise ValueError(f"known codes must lie in 0..{vocab - 1}")
    if ((known.cells_BK < 0) | (known.cells_BK >= cells)).any():
        raise ValueError(f"known cells must lie in 0..{cells - 1}")
    known_BN = torch.zeros(batch, cells, dtype=torch.bool, device=device).scatter(1, known.cells_BK, True)
    if (known_BN.sum(1) != count).any():
        raise ValueError("a known cell is named twice")
    sequence_BN = raster_BN if order_BN is None else order_BN
    return sequence_BN[~known_BN.gather(1, sequence_BN)].view(batch, cells - count)
