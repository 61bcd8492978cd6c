"""Greedy order extraction: in which order would the model rather have placed this image?

At step t the cells S_t are still empty. One candidate row per empty cell asks the model what lies there; a candidate sees
the text, the cells placed before, and itself:

    c_t = argmax over c in S_t of  score(c | text, c_1 .. c_t-1)            (OAR, arXiv 2504.17069)

The winner's row is, unchanged, the next row of the cache (in layouts decoupled and grouped its code's row is): N (N + 1) / 2 candidate
rows for an image of N cells and nothing is computed twice. :func:`brute_force_orders` asks the same question with a fresh forward pass
per candidate.

Two settings make it cheaper and no longer exact by placing several cells a step (``step_sizes.py``). Random numbers come from
``selection.CounterRNG``, scores from ``scores.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oar_scale.config.schema import DRAWING_SCORES
from oar_scale.model import AnyOrderModel, Decoder, Prefix
from oar_scale.model.cache import padded_candidates, static_pays
from oar_scale.model.steps import Outputs, Steps
from oar_scale.orders.look_ahead import entropies, information_gain, least_certain
from oar_scale.orders.scores import score_logits, score_rows
from oar_scale.orders.selection import CounterRNG, Images, check_numbers, empty_cells, guide, pick_several
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.orders.step_sizes import step_sizes

BRUTE_FORCE_SEQUENCES = 64
"""Of one pass of :func:`brute_force_orders`, with and without the caption counted."""


@dataclass(frozen=True)
class Orders:
    """One order for each of B images."""

    order_BN: Tensor
    """Permutations of the cells, int64, first placed first."""
    score_BN: Tensor
    """float32; the score that the cell of the same column had when it was placed."""
    rows: int = 0
    """Cost: rows that went through the trunk for each image, repeated ones included."""


@torch.no_grad()
def extract_orders(
    model: AnyOrderModel,
    codes_BN: Tensor,
    condition_BTD: Tensor,
    settings: ExtractionSettings,
    images_B: Images | None = None,
    draw: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Orders:
    """Find the confidence order of each image; exactly, unless the settings say otherwise.

    Args:
        codes_BN: codes in raster order.
        condition_BTD: what ``model.condition`` returned; its dtype and the model's decide the precision.
        images_B: a number for each image, from which its random numbers are derived; default 0 .. B - 1.
        draw: which one of the orders of an image, from 0, where ``settings.orders_per_image`` asks for several.
        on_step: called after each step, that is when the next cells of all images are placed.

    Raises:
        ValueError: codes that are not N of the model's vocabulary for each image, or a model in training mode.
        ArithmeticError: the model's scores are not numbers.
    """
    rng = _checked_rng(model, codes_BN, settings, images_B, draw)
    return _place_all(model, codes_BN, settings, rng, _CachedScorer(model, codes_BN, condition_BTD, settings, rng), on_step)


@torch.no_grad()
def brute_force_orders(
    model: AnyOrderModel,
    codes_BN: Tensor,
    condition_BTD: Tensor,
    settings: ExtractionSettings,
    images_B: Images | None = None,
    draw: int = 0,
) -> Orders:
    """The orders of :func:`extract_orders` by a forward pass over a sequence of its own for every candidate: slow, and free of any cache.

    Same arguments, same errors; ValueError for score ``info_gain``, which would take a pass for each hypothesis and cell.
    """
    rng = _checked_rng(model, codes_BN, settings, images_B, draw)
    return _place_all(model, codes_BN, settings, rng, _BruteForceScorer(model, codes_BN, condition_BTD, settings, rng))


@torch.no_grad()
def scores_along(
    model: AnyOrderModel,
    codes_BN: Tensor,
    condition_BTD: Tensor,
    settings: ExtractionSettings,
    order_BN: Tensor,
    images_B: Images | None = None,
    draw: int = 0,
) -> Tensor:
    """The score of each cell of an order given the cells before it, float32 [B, N], in one forward pass.

    With ``gt_logprob`` the sum of a row is the log-likelihood of the image in this order.
    """
    rng = _checked_rng(model, codes_BN, settings, images_B, draw)
    if settings.score == "info_gain":  # it asks about all other cells, too: step by step
        return _gains_along(_CachedScorer(model, codes_BN, condition_BTD, settings, rng), order_BN)
    rows_GND = model.rows(_both(codes_BN, settings.guidance), _both(order_BN, settings.guidance), _branches(model, condition_BTD, settings))
    uniform_BN = None
    if settings.score in DRAWING_SCORES:
        # Each cell uses the number of the step at which this order places it, as an extraction would at that step.
        step_BN = order_BN.argsort(1)
        uniform_BN = rng.uniform("drawn code", step_BN).gather(1, order_BN)
    return _score_rows(model, rows_GND, settings, codes_BN.gather(1, order_BN), uniform_BN)


@torch.no_grad()
def regret(
    model: AnyOrderModel,
    codes_BN: Tensor,
    condition_BTD: Tensor,
    settings: ExtractionSettings,
    order_BN: Tensor,
    images_B: Images | None = None,
) -> Tensor:
    """How much better the best empty cell was than the one an order places next, in units of the score: float32 [B, N].

    By brute force along the given orders. Zero everywhere is what greedy means, and a tolerance of a few roundings
    here is a fairer test of an extraction than equality of orders, which a near-tie may flip.
    """
    rng = _checked_rng(model, codes_BN, settings, images_B, 0)
    scorer = _BruteForceScorer(model, codes_BN, condition_BTD, settings, rng)
    columns = []
    for step in range(order_BN.shape[1]):
        score_BR = scorer.scores(order_BN[:, step:], step)
        columns.append(score_BR.amax(1) - score_BR[:, 0])
        scorer.place(order_BN[:, step : step + 1])
    return torch.stack(columns, dim=1)


def _gains_along(scorer: _CachedScorer, order_BN: Tensor) -> Tensor:
    """The gain of each cell of an order, given those before it, float32 [B, N]."""
    columns, cells, first_B1 = list[Tensor](), order_BN.shape[1], torch.zeros_like(order_BN[:, :1])
    for step in range(cells):
        columns.append(scorer.gains(order_BN[:, step:], step, first_B1)[:, 0])
        if step + 1 < cells:
            scorer.place(order_BN[:, step : step + 1])
    return torch.stack(columns, dim=1)


class _CandidateScorer:
    """Scores empty cells of B images, given the cells that were placed so far."""

    @property
    def static(self) -> bool:
        """More cells may be asked about than are empty."""
        return False

    def scores(self, cells_BR: Tensor, step: int | Tensor) -> Tensor:
        """Score R cells of each image: float32 [B, R]."""
        raise NotImplementedError

    def place(self, cells_Bk: Tensor) -> None:
        """Place these cells one after the other; the first of each image was among those scored last."""
        raise NotImplementedError

    def prepare(self, step: int, count: int, left: int) -> tuple[int | Tensor, int]:
        """The arguments of :meth:`run` for a step, and for the ``count`` of the cells left that it is to ask about."""
        return step, count

    def rows_ahead(self, asked: int) -> int:
        """Rows of hypotheses that scoring so many cells of an image takes."""
        return 0

    def run(self, step: Callable[..., Outputs], *arguments: Tensor | int) -> Outputs:
        """Do a step, which calls the methods above; it is the same function for all steps."""
        return step(*arguments)


class _Choice:
    """The step of an extraction: score cells, choose the best ones, place them."""

    def __init__(self, settings: ExtractionSettings, rng: CounterRNG, scorer: _CandidateScorer) -> None:
        self.settings, self.rng, self.ties_BN, self.scorer = settings, rng, rng.ties(), scorer

    def __call__(self, among_BN: Tensor, step: int | Tensor, asked: int, size: int, last: int) -> Outputs:
        """Choose ``size`` cells; returns them and their scores, [B, size] both.

        Args:
            asked: number of the cells to choose among; on static buffers at least that.
            last: whether it is the last step, after which nothing is placed: nobody asks about anything.
        """
        cells_BR = empty_cells(among_BN, asked)
        score_BN = torch.full(among_BN.shape, -torch.inf, device=among_BN.device).scatter_(1, cells_BR, self.scorer.scores(cells_BR, step))
        if self.scorer.static:
            score_BN = score_BN.masked_fill(~among_BN, -torch.inf)
        # Noise belongs to a cell, not to a candidate: it is drawn for all N of them, and -inf stays -inf.
        noise = self.settings.order_temperature
        wanted_BN = score_BN + noise * self.rng.gumbel(step) if noise else score_BN
        chosen_Bk = pick_several(wanted_BN, self.ties_BN, size)
        if not last:
            self.scorer.place(chosen_Bk)
        return chosen_Bk, score_BN.gather(1, chosen_Bk)


def _place_all(
    model: AnyOrderModel,
    codes_BN: Tensor,
    settings: ExtractionSettings,
    rng: CounterRNG,
    scorer: _CandidateScorer,
    on_step: Callable[[], None] = lambda: None,
) -> Orders:
    cells, choice = codes_BN.shape[1], _Choice(settings, rng, scorer)
    empty_BN = torch.ones_like(codes_BN, dtype=torch.bool)
    order, scores, placed, rows = list[Tensor](), list[Tensor](), 0, 0
    for step, size in enumerate(step_sizes(settings, cells)):
        among_BN, count = empty_BN, cells - placed
        if step == 0 and settings.first_cell != "free":
            among_BN, count = torch.zeros_like(empty_BN).scatter(1, _first_cells(settings, rng, codes_BN), True), 1
        number, asked = scorer.prepare(step, count, cells - placed)
        chosen_Bk, score_Bk = scorer.run(choice, among_BN, number, asked, size, placed + size == cells)
        order.append(chosen_Bk)
        scores.append(score_Bk)
        placed, rows = placed + size, rows + asked + scorer.rows_ahead(asked)
        if placed < cells:
            empty_BN = empty_BN.scatter(1, chosen_Bk, False)
            rows += size - 1  # all but the first of a step go through the trunk again, see _CachedScorer.place
        on_step()
    score_BN = torch.cat(scores, dim=1)
    check_numbers(score_BN)
    return Orders(torch.cat(order, dim=1), score_BN, rows)


def _first_cells(settings: ExtractionSettings, rng: CounterRNG, codes_BN: Tensor) -> Tensor:
    """The first cell [B, 1] of each image where the settings name one, or ask for a random one."""
    if settings.first_cell == "random":
        return rng.uniform("first cell", 0).argmax(1, keepdim=True)
    return torch.full((len(codes_BN), 1), int(settings.first_cell), device=codes_BN.device)


class _CachedScorer(_CandidateScorer):
    """Scores all candidates in one pass over the KV cache of what is placed; on static buffers when they pay (``model.cache``)."""

    def __init__(
        self, model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, settings: ExtractionSettings, rng: CounterRNG
    ) -> None:
        self.model, self.codes_BN, self.settings, self.rng = model, codes_BN, settings, rng
        self.decoder = Decoder(model)
        self.prefix = self.decoder.begin(_branches(model, condition_BTD, settings))
        self.steps = Steps()

    @property
    def static(self) -> bool:
        return self.prefix.static

    def prepare(self, step: int, count: int, left: int) -> tuple[int | Tensor, int]:
        if self.settings.score != "info_gain" and static_pays(left * len(self.prefix.last.cells_BK), self.prefix.cache.device):
            self.prefix = self.prefix.on_static_buffers()
        asked = padded_candidates(count, self.codes_BN.shape[1]) if self.static else count
        return self.prefix.varying(step), asked

    def rows_ahead(self, asked: int) -> int:
        if self.settings.score != "info_gain" or asked == 1:
            return 0
        codes = self.settings.info_gain_samples or self.model.spec.vocab_size
        # Each hypothesis writes what a code takes, and asks about all other cells.
        return min(self.settings.info_gain_candidates or asked, asked) * codes * (asked - 1 + self.model.layout.stride)

    def run(self, step: Callable[..., Outputs], *arguments: Tensor | int) -> Outputs:
        self.step = step
        self.prefix, outputs = self.steps(self._step_of, self.prefix, *arguments)
        return outputs

    def _step_of(self, prefix: Prefix, *arguments: Tensor | int) -> tuple[Prefix, Outputs]:
        """The step as a function of the prefix."""
        self.prefix = prefix
        outputs = self.step(*arguments)
        return self.prefix, outputs

    def scores(self, cells_BR: Tensor, step: int | Tensor) -> Tensor:
        if self.settings.score == "info_gain":
            return self.gains(cells_BR, step)
        self.candidates = self.decoder.candidate_rows(self.prefix, _both(cells_BR, self.settings.guidance))
        uniform_BR = _uniform(self.settings, self.rng, cells_BR, step)
        return _score_rows(self.model, self.candidates.rows_BRD, self.settings, self.codes_BN.gather(1, cells_BR), uniform_BR)

    def gains(self, cells_BR: Tensor, step: int | Tensor, asked_BC: Tensor | None = None) -> Tensor:
        """The gains of R cells [B, R], which are all that are empty; -inf where the settings, or ``asked_BC``, leave a cell out."""
        self.candidates = self.decoder.candidate_rows(self.prefix, cells_BR)
        entropy_BR, uniform_BR = entropies(self.decoder, self.candidates.rows_BRD), _uniform(self.settings, self.rng, cells_BR, step)
        assert uniform_BR is not None, "it draws codes"
        if asked_BC is None:
            asked_BC = least_certain(entropy_BR, self.settings.info_gain_candidates)
        samples = self.settings.info_gain_samples
        return information_gain(self.decoder, self.prefix, self.candidates, entropy_BR, asked_BC, samples, uniform_BR)

    def place(self, cells_Bk: Tensor) -> None:
        scale, codes_Bk = self.settings.guidance, self.codes_BN.gather(1, cells_Bk)
        # The best cell's candidate row saw exactly what is placed now, so where layouts keep such rows it is the cache's next one as it is.
        first_G = _both(cells_Bk[:, 0], scale)
        winner_G = (self.candidates.cells_BR == first_G[:, None]).int().argmax(1)
        self.prefix = self.decoder.commit(self.prefix, self.candidates, winner_G, _both(codes_Bk[:, 0], scale))
        # The rows of the others did not see the cells placed in the same step before them, so they are computed again.
        cells_Bk, codes_Bk = cells_Bk[:, 1:], codes_Bk[:, 1:]
        self.prefix = self.decoder.prefill(self.prefix, _both(cells_Bk, scale), _both(codes_Bk, scale))


class _BruteForceScorer(_CandidateScorer):
    """Scores each candidate by a sequence of its own, from the first cell placed to the candidate, which comes last."""

    def __init__(
        self, model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, settings: ExtractionSettings, rng: CounterRNG
    ) -> None:
        if settings.score == "info_gain":
            raise ValueError("score info_gain by brute force would take a pass for each hypothesis and cell: compare another score")
        self.model, self.codes_BN, self.settings, self.rng = model, codes_BN, settings, rng
        self.branches_GTD = _branches(model, condition_BTD, settings)
        self.placed_BK = codes_BN[:, :0]

    def scores(self, cells_BR: Tensor, step: int | Tensor) -> Tensor:
        scale, parts = self.settings.guidance, []
        uniform_BR = _uniform(self.settings, self.rng, cells_BR, step)
        together = max(1, BRUTE_FORCE_SEQUENCES // len(self.branches_GTD))
        for first in range(0, cells_BR.shape[1], together):
            part = slice(first, first + together)
            cells_Br = cells_BR[:, part]
            codes_SN, placed_SK, branches_STD = (
                each.repeat_interleave(cells_Br.shape[1], dim=0) for each in (self.codes_BN, self.placed_BK, self.branches_GTD)
            )
            order_SL = torch.cat([placed_SK, cells_Br.reshape(-1, 1)], dim=1)
            rows_SLD = self.model.rows(_both(codes_SN, scale), _both(order_SL, scale), branches_STD)
            guided_SV = _guided(self.model.output(rows_SLD[:, -1]).float(), scale)
            uniform_S = None if uniform_BR is None else uniform_BR[:, part].flatten()
            score_S = score_logits(self.settings.score, guided_SV, self.codes_BN.gather(1, cells_Br).flatten(), uniform_S)
            parts.append(score_S.view_as(cells_Br))
        return torch.cat(parts, dim=1)

    def place(self, cells_Bk: Tensor) -> None:
        self.placed_BK = torch.cat([self.placed_BK, cells_Bk], dim=1)


def _score_rows(
    model: AnyOrderModel, rows_GRD: Tensor, settings: ExtractionSettings, targets_BR: Tensor, uniform_BR: Tensor | None
) -> Tensor:
    """Scores [B, R] of the trunk's rows, under guidance with both branches [2B, R, D]: they are mixed before the output head."""
    rows_BRD = _guided(rows_GRD, settings.guidance)
    uniform_R = None if uniform_BR is None else uniform_BR.flatten()
    return score_rows(model.output.weight, rows_BRD.flatten(0, 1), settings.score, targets_BR.flatten(), uniform_R).view_as(targets_BR)


def _uniform(settings: ExtractionSettings, rng: CounterRNG, cells_BR: Tensor, step: int | Tensor) -> Tensor | None:
    """The number in (0, 1) that a drawing score draws each cell's code with; None for the other scores."""
    return rng.uniform("drawn code", step).gather(1, cells_BR) if settings.score in DRAWING_SCORES else None


def _branches(model: AnyOrderModel, condition_BTD: Tensor, settings: ExtractionSettings) -> Tensor:
    """The conditional rows, followed by the null rows where guidance needs them."""
    if settings.guidance == 1:
        return condition_BTD
    return torch.cat([condition_BTD, model.null_condition(len(condition_BTD)).to(condition_BTD.dtype)])


def _both(tensor_B: Tensor, scale: float) -> Tensor:
    """What both branches share (codes, cells, winners), for the batch of :func:`_branches`."""
    return tensor_B if scale == 1 else torch.cat([tensor_B, tensor_B])


def _guided(rows_GRD: Tensor, scale: float) -> Tensor:
    """The guided rows or logits [B, ...] of that batch."""
    if scale == 1:
        return rows_GRD
    conditional_BRD, null_BRD = rows_GRD.chunk(2)
    return guide(conditional_BRD, null_BRD, scale)


def _checked_rng(model: AnyOrderModel, codes_BN: Tensor, settings: ExtractionSettings, images_B: Images | None, draw: int) -> CounterRNG:
    """The random numbers of an extraction. Raises ValueError for a model, codes or settings that do not fit one another."""
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes its answers: call model.eval() first")
    cells, vocabulary = model.spec.cells, model.spec.vocab_size
    if codes_BN.ndim != 2 or codes_BN.shape[1] != cells:
        raise ValueError(f"codes of shape {tuple(codes_BN.shape)}, expected [B, {cells}]: the model's grid has {cells} cells")
    if codes_BN.numel() and not (int(codes_BN.min()) >= 0 and int(codes_BN.max()) < vocabulary):
        raise ValueError(f"codes from {int(codes_BN.min())} to {int(codes_BN.max())}, the model's vocabulary is 0 .. {vocabulary - 1}")
    if isinstance(settings.first_cell, int) and settings.first_cell >= cells:
        raise ValueError(f"first_cell {settings.first_cell}: the model's cells are 0 .. {cells - 1}")
    return CounterRNG.of(settings.tie_seed, np.arange(len(codes_BN)) if images_B is None else images_B, draw, cells, codes_BN.device)
