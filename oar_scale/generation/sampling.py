"""Sampling images: the model chooses the next cell and its code.

    repeat until no cell is empty
        one candidate row per empty cell           p(code | caption, placed codes, cell) for all of them, in one pass
        cell  = best over cells of max over codes log p          most confident cell   (+ order_temperature * Gumbel)
        code ~ p( . | cell)                                      temperature, top-k

The cell is chosen by the largest probability of its distribution, before a code is drawn: choosing by the probability of
drawn codes would favour cells that happened to draw their likely code. In the first steps this tends to pick background.
What is best among cells, and when two are equal, is as in extraction (``orders.selection``); the noise is the generator's, image by image.
With a given order there is one candidate per step, the next cell of the order, and everything else is the same. Fewer steps than
cells ask for several cells of the order in one pass, as RandAR does. A late order (``orders.policies``) is given for the first cells;
when those are placed, all others are scored once, which gives their order.

Under guidance (``orders.selection``) every image goes through the model with its caption and without, in one batch, and cells
are compared by the guided distribution, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oar_scale.config.schema import SampleConfig
from oar_scale.model import AnyOrderModel, Decoder, Prefix
from oar_scale.orders.policies import LateOrder
from oar_scale.orders.scores import score_logits, score_rows
from oar_scale.orders.selection import mix_branches, pick_best
from oar_scale.orders.step_sizes import cells_per_step


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
    guidance_start: float | None = None
    """Scale for an empty image, from which it changes linearly with the cells placed, towards ``guidance``; None: constant."""
    steps: int | None = None
    """Passes through the model, later ones placing more cells at once (:func:`cells_per_step`): for a given order only.
    None: one pass for each cell."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} must be above 0; top_k=1 makes the choice greedy")
        for name in ("guidance", "top_k", "order_temperature", "guidance_start"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1; None places one cell a step")

    @property
    def guided(self) -> bool:
        """Whether the model is also evaluated without the condition (classifier-free guidance)."""
        return self.guidance != 1 or self.guidance_start not in (None, 1)

    def scale(self, placed: int, cells: int) -> float:
        """Guidance scale once ``placed`` of the cells have their codes."""
        start = self.guidance if self.guidance_start is None else self.guidance_start
        return start + (self.guidance - start) * placed / cells

    @classmethod
    def from_recipe(cls, sample: SampleConfig) -> SampleSettings:
        """The settings of a recipe's ``sample`` section."""
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
    """Sampled images: codes, and the order in which their cells were placed."""

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
    order_BN: Tensor | LateOrder | None = None,
    known: Known | None = None,
) -> Generated:
    """Draw one image for each condition, all images one cell a step.

    Args:
        condition_BTD: what ``model.condition`` returned. Under guidance the model sees a batch of 2B.
        generator: source of all noise. It may live on another device than the model; the CPU's gives every device the
            same noise.
        order_BN: a permutation of the cells for each image, to be followed; None: the model chooses. Known cells are
            passed over; beside them a late order has no first cells of its own.
        known: cells whose codes are given.

    Raises:
        ValueError: the model is in training mode; an order that is no permutation of the cells; known cells that repeat
            or lie outside the grid, or codes outside the vocabulary.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes its answers: call model.eval() first")
    if settings.steps is not None and order_BN is None:
        raise ValueError("steps places several cells at once along a given order; the model's own choice of cells goes one by one")
    batch, device = len(condition_BTD), condition_BTD.device
    if known is None:
        nothing = torch.empty(batch, 0, dtype=torch.long, device=device)
        known = Known(nothing, nothing)
    empty_BR = _empty_cells(model, batch, order_BN if isinstance(order_BN, Tensor) else None, known, device)
    null_BTD = model.null_condition(batch).to(condition_BTD)
    decoder = Decoder(model)
    prefix = decoder.begin(torch.cat([condition_BTD, null_BTD]) if settings.guided else condition_BTD)
    state = _SamplingState(decoder, prefix, settings, generator, known)
    if order_BN is None:
        while empty_BR.shape[1] > 0:
            cell_B = state.place_most_confident(empty_BR)
            empty_BR = empty_BR[empty_BR != cell_B[:, None]].view(batch, -1)
        return state.result()
    if isinstance(order_BN, LateOrder):
        empty_BR = state.place_first(order_BN, empty_BR)
    for cells_BM in empty_BR.split(cells_per_step(model.spec.cells, settings.steps, state.count), dim=1):
        state.place_next(cells_BM)
    return state.result()


class _SamplingState:
    """Images that are being sampled: the cells placed so far, and the model's cache of them."""

    def __init__(self, decoder: Decoder, prefix: Prefix, settings: SampleSettings, generator: torch.Generator, known: Known) -> None:
        batch, count = known.cells_BK.shape
        device = known.cells_BK.device
        model = decoder.model
        self.decoder, self.model, self.settings, self.generator = decoder, model, settings, generator
        self.prefix = decoder.prefill(prefix, self._branches(known.cells_BK), self._branches(known.codes_BK))
        self.image_B = torch.arange(batch, device=device)
        self.codes_BN = torch.zeros(batch, model.spec.cells, dtype=torch.long, device=device).scatter(1, known.cells_BK, known.codes_BK)
        self.placed, self.scores, self.count = [known.cells_BK], [torch.zeros(known.cells_BK.shape, device=device)], count

    def place_most_confident(self, empty_BR: Tensor) -> Tensor:
        """Place the most confident of R empty cells; returns it."""
        candidates = self.decoder.candidate_rows(self.prefix, self._branches(empty_BR))
        rows_BRD, head = self._guide(candidates.rows_BRD), self.model.output
        confidence_BR = score_rows(head.weight, rows_BRD.flatten(0, 1), "max_prob", empty_BR.flatten()).view_as(empty_BR)
        wanted_BR = confidence_BR + self.settings.order_temperature * _gumbel(confidence_BR, self.generator)
        first_R = torch.arange(empty_BR.shape[1], device=empty_BR.device).flip(0)  # of equals the first in raster order
        winner_B = pick_best(wanted_BR, first_R.expand_as(empty_BR))
        # Scores need no logits of all cells at once; the winner's alone are computed to draw its code.
        logits_BV = head(rows_BRD[self.image_B, winner_B]).float()
        cell_B, code_B = empty_BR[self.image_B, winner_B], _draw(logits_BV, self.settings, self.generator)
        self.prefix = self.decoder.commit(self.prefix, candidates, self._branches(winner_B), self._branches(code_B))
        self._keep(cell_B[:, None], code_B[:, None], confidence_BR[self.image_B, winner_B, None])
        return cell_B

    def place_first(self, order: LateOrder, empty_BR: Tensor) -> Tensor:
        """Place the first cells, where none are known; returns the others in the order that is then known."""
        if self.count == 0:
            for cell_B in order.first_BK.unbind(1):
                self.place_next(cell_B[:, None])
            there_BN = torch.zeros_like(self.codes_BN, dtype=torch.bool).scatter(1, order.first_BK, True)
            empty_BR = empty_BR[~there_BN.gather(1, empty_BR)].view(len(empty_BR), -1)
        rows_GRD = self.decoder.candidate_rows(self.prefix, self._branches(empty_BR)).rows_BRD
        return order.rest(rows_GRD[: len(empty_BR)], empty_BR)

    def place_next(self, cells_BM: Tensor) -> None:
        """Place the next M cells of the order in one pass."""
        if cells_BM.shape[1] == 1:  # its candidate row may stay in the cache; parallel decoding computes rows twice
            candidates = self.decoder.candidate_rows(self.prefix, self._branches(cells_BM))
            logits_BMV = self._guide(candidates.logits_BRV)
            code_B = _draw(logits_BMV[:, 0], self.settings, self.generator)
            first = self._branches(torch.zeros_like(code_B))
            self.prefix = self.decoder.commit(self.prefix, candidates, first, self._branches(code_B))
            codes_BM = code_B[:, None]
        else:
            logits_BMV = self._guide(self.decoder.parallel_logits(self.prefix, self._branches(cells_BM)))
            codes_BM = _draw(logits_BMV.flatten(0, 1), self.settings, self.generator).view_as(cells_BM)
            self.prefix = self.decoder.place_parallel(self.prefix, self._branches(cells_BM), self._branches(codes_BM))
        scores_R = score_logits("max_prob", logits_BMV.flatten(0, 1), cells_BM.flatten())
        self._keep(cells_BM, codes_BM, scores_R.view_as(cells_BM))

    def result(self) -> Generated:
        return Generated(self.codes_BN, torch.cat(self.placed, dim=1), torch.cat(self.scores, dim=1))

    def _keep(self, cells_BM: Tensor, codes_BM: Tensor, scores_BM: Tensor) -> None:
        self.codes_BN.scatter_(1, cells_BM, codes_BM)
        self.placed.append(cells_BM)
        self.scores.append(scores_BM)
        self.count += cells_BM.shape[1]

    def _branches(self, rows: Tensor) -> Tensor:
        """Rows of the conditional images, and again for the unconditional ones."""
        return torch.cat([rows, rows]) if self.settings.guided else rows

    def _guide(self, rows_GRD: Tensor) -> Tensor:
        """Apply classifier-free guidance to rows for the output head, or to logits."""
        if not self.settings.guided:
            return rows_GRD
        return mix_branches(rows_GRD, self.settings.scale(self.count, self.model.spec.cells))


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
