"""Greedy order extraction: in which order would the model rather have placed this image?

At step t the cells S_t are still empty. One candidate row per empty cell asks the model what lies there; a candidate sees
the text, the cells placed before, and itself:

    c_t = argmax over c in S_t of  score(c | text, c_1 .. c_t-1)            (OAR, arXiv 2504.17069)

The winner's row is, unchanged, the next row of the cache: N (N + 1) / 2 candidate rows for an image of N cells and
nothing is computed twice. :func:`brute_force_orders` asks the same question with a fresh forward pass per candidate.
Cheaper ways, which are no longer exact, are in ``candidates.py``; random numbers come from ``selection.CounterRNG``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.schema import ExtractConfig, FirstCell, Score
from oar_scale.model import AnyOrderModel
from oar_scale.orders.candidates import Asking, pack, within
from oar_scale.orders.scores import score_logits, score_rows
from oar_scale.orders.selection import CounterRNG, guide, guided_batch, pick_several
from oar_scale.orders.step_sizes import step_sizes

Images = NDArray[np.int64]


@dataclass(frozen=True)
class ExtractionSettings:
    """What an order depends on besides the model and the image: see :class:`~oar_scale.config.schema.ExtractConfig`.

    Raises:
        ValueError: settings that contradict each other.
    """

    score: Score = "gt_logprob"
    guidance: float = 1.0
    tie_seed: int = 0
    order_temperature: float = 0.0
    orders_per_image: int = 1
    first_cell: FirstCell = "free"
    commit_per_step: int = 1
    cosine_steps: int | None = None
    repulsion_radius: int = 0
    frontier_random: int | None = None
    rescore_radius: int | None = None

    def __post_init__(self) -> None:
        ExtractConfig.model_validate(dataclasses.asdict(self))

    @classmethod
    def from_recipe(cls, config: ExtractConfig) -> ExtractionSettings:
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @property
    def id(self) -> str:
        """Names these settings in the order tables: fields that came later count where they are not at their defaults."""
        named: dict[str, Any] = {"method": "exact", "score": self.score, "guidance": self.guidance, "tie_seed": self.tie_seed}
        later = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in named}
        return fingerprint(named | {name: value for name, value in later.items() if value != getattr(type(self), name)})


@dataclass(frozen=True)
class Orders:
    """One order for each of B images."""

    order_BN: Tensor
    """Permutations of the cells, int64, first placed first."""
    score_BN: Tensor
    """float32; the score that the cell of the same column had when it was placed."""
    rows: int = 0
    """What it cost: questions that the model was asked about each image, those asked again included."""


@torch.no_grad()
def extract_orders(
    model: AnyOrderModel,
    codes_BN: Tensor,
    condition_BTD: Tensor,
    settings: ExtractionSettings,
    images_B: Images | None = None,
    draw: int = 0,
) -> Orders:
    """Find the confidence order of each image; exactly, unless the settings say otherwise.

    Args:
        codes_BN: codes in raster order.
        condition_BTD: what ``model.condition`` returned; its dtype and the model's decide the precision.
        images_B: a number for each image that fixes what is left to chance; default 0 .. B - 1.
        draw: which one of the orders of an image, from 0: ``settings.orders_per_image`` are wanted.

    Raises:
        ValueError: codes that are not N of the model's vocabulary for each image, a model in training mode, or one whose scores
            are not numbers.
    """
    rng = _checked_rng(model, codes_BN, settings, images_B, draw)
    return _place_all(model, codes_BN, settings, rng, _Cached(model, codes_BN, condition_BTD, settings, rng))


@torch.no_grad()
def brute_force_orders(
    model: AnyOrderModel,
    codes_BN: Tensor,
    condition_BTD: Tensor,
    settings: ExtractionSettings,
    images_B: Images | None = None,
    draw: int = 0,
) -> Orders:
    """The same orders by a fresh forward pass for every cell that is asked about: slow, and free of any cache."""
    rng = _checked_rng(model, codes_BN, settings, images_B, draw)
    return _place_all(model, codes_BN, settings, rng, _Fresh(model, codes_BN, condition_BTD, settings, rng))


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
    rows_GND = model.rows(
        guided_batch(codes_BN, settings.guidance), guided_batch(order_BN, settings.guidance), _branches(model, condition_BTD, settings)
    )
    uniform_BN = None
    if settings.score == "sampled":
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
    asker = _Fresh(model, codes_BN, condition_BTD, settings, _checked_rng(model, codes_BN, settings, images_B, 0))
    columns = []
    for step in range(order_BN.shape[1]):
        score_BR = asker.scores(order_BN[:, step:], step)
        columns.append(score_BR.amax(1) - score_BR[:, 0])
        asker.place(order_BN[:, step : step + 1], asked=True)
    return torch.stack(columns, dim=1)


class _Asker(Protocol):
    """Somebody who knows the scores of empty cells."""

    def scores(self, cells_BR: Tensor, step: int) -> Tensor:
        """Of R cells of each image, float32 [B, R]."""
        ...

    def place(self, cells_Bk: Tensor, *, asked: bool) -> None:
        """Place these cells in turn; ``asked``: the first of them was among those asked about last, in all images."""
        ...


def _place_all(model: AnyOrderModel, codes_BN: Tensor, settings: ExtractionSettings, rng: CounterRNG, asker: _Asker) -> Orders:
    cells, device = codes_BN.shape[1], codes_BN.device
    asking, ties_BN = Asking(settings, rng, model.spec.grid), rng.ties()
    apart_NN = within(model.spec.grid, settings.repulsion_radius, device) if settings.repulsion_radius else None
    empty_BN = torch.ones_like(codes_BN, dtype=torch.bool)
    score_BN = torch.full(codes_BN.shape, -torch.inf, device=device)
    order, scores, placed, rows = list[Tensor](), list[Tensor](), 0, 0
    for step, size in enumerate(step_sizes(settings, cells)):
        asked_BN = asking.cells(step, size, empty_BN, score_BN)
        given = step == 0 and settings.first_cell != "free"
        cells_BR, count = pack(asked_BN, 1 if given else cells - placed if asking.all_empty else None)
        if count:
            score_BN = torch.where(asked_BN, score_BN.scatter(1, cells_BR, asker.scores(cells_BR, step)), score_BN)
        # A score that was not asked for again may be picked only where that is the point of it.
        open_BN = empty_BN if settings.rescore_radius is not None and not given else asked_BN
        wanted_BN = score_BN + settings.order_temperature * rng.gumbel(step) if settings.order_temperature else score_BN
        chosen_Bk = pick_several(wanted_BN.masked_fill(~open_BN, -torch.inf), ties_BN, size, apart_NN)
        order.append(chosen_Bk)
        scores.append(score_BN.gather(1, chosen_Bk))
        placed, rows = placed + size, rows + count
        if placed < cells:
            asked = settings.rescore_radius is None or bool(asked_BN.gather(1, chosen_Bk[:, :1]).all())
            asker.place(chosen_Bk, asked=asked)
            asking.placed(chosen_Bk)
            empty_BN = empty_BN.scatter(1, chosen_Bk, False)
            rows += size - asked
    score_BN = torch.cat(scores, dim=1)
    if score_BN.isnan().any():
        # Not the images' fault: perhaps the model's, perhaps that of the device that computed it.
        raise ArithmeticError(
            "the model's scores are not numbers (NaN): its weights are damaged, its precision is too low, or the device is broken"
        )
    return Orders(torch.cat(order, dim=1), score_BN, rows)


class _Cached:
    """Asks about all cells in one pass over what is cached."""

    def __init__(
        self, model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, settings: ExtractionSettings, rng: CounterRNG
    ) -> None:
        self.model, self.codes_BN, self.settings, self.rng = model, codes_BN, settings, rng
        self.prefix = model.begin(_branches(model, condition_BTD, settings))

    def scores(self, cells_BR: Tensor, step: int) -> Tensor:
        self.candidates = self.model.candidate_rows(self.prefix, guided_batch(cells_BR, self.settings.guidance))
        uniform_BR = _uniform(self.settings, self.rng, cells_BR, step)
        return _score_rows(self.model, self.candidates.rows_BRD, self.settings, self.codes_BN.gather(1, cells_BR), uniform_BR)

    def place(self, cells_Bk: Tensor, *, asked: bool) -> None:
        scale, codes_Bk = self.settings.guidance, self.codes_BN.gather(1, cells_Bk)
        if asked:
            first_G = guided_batch(cells_Bk[:, 0], scale)
            winner_G = (self.candidates.cells_BR == first_G[:, None]).int().argmax(1)
            self.prefix = self.model.commit(self.prefix, self.candidates, winner_G, guided_batch(codes_Bk[:, 0], scale))
            cells_Bk, codes_Bk = cells_Bk[:, 1:], codes_Bk[:, 1:]
        # These did not know of those placed with them, or of what came since they were asked about.
        self.prefix = self.model.prefill(self.prefix, guided_batch(cells_Bk, scale), guided_batch(codes_Bk, scale))


class _Fresh:
    """Asks about each cell by a forward pass of its own, in which it comes last."""

    def __init__(
        self, model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, settings: ExtractionSettings, rng: CounterRNG
    ) -> None:
        self.model, self.codes_BN, self.settings, self.rng = model, codes_BN, settings, rng
        self.branches_GTD = _branches(model, condition_BTD, settings)
        self.placed_BK = codes_BN[:, :0]

    def scores(self, cells_BR: Tensor, step: int) -> Tensor:
        scale, columns = self.settings.guidance, []
        uniform_BR = _uniform(self.settings, self.rng, cells_BR, step)
        for r in range(cells_BR.shape[1]):
            cell_B1 = cells_BR[:, r : r + 1]
            order_BL = torch.cat([self.placed_BK, cell_B1], dim=1)
            logits_GLV = self.model(guided_batch(self.codes_BN, scale), guided_batch(order_BL, scale), self.branches_GTD)
            guided_BV = guide(logits_GLV[:, -1].float(), scale)
            uniform_B = None if uniform_BR is None else uniform_BR[:, r]
            columns.append(score_logits(self.settings.score, guided_BV, self.codes_BN.gather(1, cell_B1)[:, 0], uniform_B))
        return torch.stack(columns, dim=1)

    def place(self, cells_Bk: Tensor, *, asked: bool) -> None:
        self.placed_BK = torch.cat([self.placed_BK, cells_Bk], dim=1)


def _score_rows(
    model: AnyOrderModel, rows_GRD: Tensor, settings: ExtractionSettings, targets_BR: Tensor, uniform_BR: Tensor | None
) -> Tensor:
    rows_BRD = guide(rows_GRD, settings.guidance)
    uniform_R = None if uniform_BR is None else uniform_BR.flatten()
    return score_rows(model.output.weight, rows_BRD.flatten(0, 1), settings.score, targets_BR.flatten(), uniform_R).view_as(targets_BR)


def _uniform(settings: ExtractionSettings, rng: CounterRNG, cells_BR: Tensor, step: int) -> Tensor | None:
    """What the score ``sampled`` draws the codes of these cells with."""
    return rng.uniform("drawn code", step).gather(1, cells_BR) if settings.score == "sampled" else None


def _branches(model: AnyOrderModel, condition_BTD: Tensor, settings: ExtractionSettings) -> Tensor:
    """The conditional rows, followed by the null rows where guidance needs them."""
    if settings.guidance == 1:
        return condition_BTD
    return torch.cat([condition_BTD, model.null_condition(len(condition_BTD)).to(condition_BTD.dtype)])


def _checked_rng(model: AnyOrderModel, codes_BN: Tensor, settings: ExtractionSettings, images_B: Images | None, draw: int) -> CounterRNG:
    """Raises ValueError for what cannot be extracted."""
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
