"""Pieces on likelihood: a model's own orders, and how well it predicts codes along any order.

Own orders are those by ``max_prob`` of one cell a step: each cell is chosen from the codes that were placed before it alone. So along them,
and along those that *another* model chose so, a likelihood is that of a generator: one model says where, one says what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.evaluation.eval_tasks import Ints, Precision, condition_of, here
from oar_scale.evaluation.flexibility.pieces import Arrays, NetworkFile, Piece, in_parts
from oar_scale.evaluation.flexibility.subjects import Arm, ArmModel, MeasuredImages, Source
from oar_scale.evaluation.likelihood import prediction_table
from oar_scale.orders.extraction import extract_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.results.flexibility import Measure, Role

Orders = NDArray[np.uint16]
ArmModelKey = tuple[str, int]
"""Label and seed."""
OWN = "own"
CALIBRATION = (
    Measure("calibration/gap", "NLL less entropy", "nats a code", "zero", "calibration"),
    Measure("calibration/top probability", "probability of the most likely code", "share", "", "calibration"),
    Measure("calibration/top accuracy", "share of the cells where that is the code", "share", "higher", "calibration"),
)
"""Along own orders. A calibrated model has a gap of 0, and as much accuracy as probability."""


@dataclass(frozen=True)
class OwnOrdersPiece:
    """The orders that a model generates in, for images that are there."""

    model: NetworkFile
    codes_SN: Ints
    cond_inputs_S: NDArray[np.generic]
    first: int
    """Number of the first image: it breaks ties."""
    tie_seed: int
    precision: Precision

    @property
    def what(self) -> str:
        return f"{self.model.where}: own orders"

    def run(self) -> Arrays:
        """``order_SN``, uint16."""
        model, codes = self.model.model(self.precision), torch.from_numpy(self.codes_SN).to(here())
        settings = ExtractionSettings(score="max_prob", tie_seed=self.tie_seed)
        images = np.arange(self.first, self.first + len(codes))
        found = extract_orders(model, codes, condition_of(model, torch.from_numpy(self.cond_inputs_S)), settings, images)
        return {"order_SN": found.order_BN.cpu().numpy().astype(np.uint16)}


@dataclass(frozen=True)
class NllPiece:
    """The likelihood of images along given orders, in float32."""

    model: NetworkFile
    codes_SN: Ints
    cond_inputs_S: NDArray[np.generic]
    order_SN: NDArray[np.uint16]

    @property
    def what(self) -> str:
        return f"{self.model.where}: likelihood"

    def run(self) -> Arrays:
        """Those of :func:`~oar_scale.evaluation.likelihood.prediction_table`, [S]; ``gap``: nll - entropy."""
        model, codes, order = self.model.model(), torch.from_numpy(self.codes_SN), torch.from_numpy(self.order_SN.astype(np.int64))
        table = prediction_table(model, codes, torch.from_numpy(self.cond_inputs_S), order, len(codes))
        return {name: each_S.numpy() for name, each_S in table.items()} | {"gap": (table["nll"] - table["entropy"]).numpy()}


def own_order_pieces(arms: Sequence[Arm], images: MeasuredImages, tie_seed: int, precision: Precision) -> dict[ArmModelKey, list[Piece]]:
    """The pieces that find each model's own orders."""
    return {
        (model.label, model.seed): [
            OwnOrdersPiece(model.file, images.codes_SN[part], model.cond_inputs_S[part], part.start, tie_seed, precision)
            for part in images.parts
        ]
        for arm in arms
        for model in arm.models
    }


def own_orders(pieces: Mapping[ArmModelKey, Sequence[Piece]], results: Mapping[str, Arrays]) -> dict[ArmModelKey, Orders]:
    """The orders [S, N] that those pieces found."""
    return {key: in_parts(results, of_model)["order_SN"].astype(np.uint16) for key, of_model in pieces.items()}


def likelihood_measures(arms: Sequence[Arm], titles: Mapping[str, str]) -> tuple[Measure, ...]:
    """The columns of the matrix: fixed orders by their titles, own ones, and those of each arm; then the calibration.

    Own orders are the primary question. In the orders of the other arms nothing is tested: they are as many as there are arms.
    """

    def column(name: str, title: str, role: Role) -> Measure:
        return Measure(f"nll/{name}", title, "nats a code", "lower", "likelihood", role)

    return (
        *(column(name, title, "exploratory") for name, title in titles.items()),
        column(OWN, "its own", "primary"),
        *(column(_of_arm(arm), f"those of {arm.label}", "descriptive") for arm in arms if len(arms) > 1),
        *CALIBRATION,
    )


def likelihood_sources(
    arms: Sequence[Arm], images: MeasuredImages, fixed: Mapping[str, Orders], own: Mapping[ArmModelKey, Orders]
) -> list[Source]:
    """All that is measured along orders: fixed ones [S, N], a model's own, and those of the other arms' models (of the same seed, or the
    last one there is)."""
    sources = []
    for model in (model for arm in arms for model in arm.models):
        orders = {**fixed, OWN: own[model.label, model.seed]}
        if len(arms) > 1:
            others = {_of_arm(arm): own[arm.label, min(model.seed, len(arm.models) - 1)] for arm in arms}
            orders |= others | {_of_arm(arm): orders[OWN] for arm in arms if arm.label == model.label}
        pieces = {name: _nll_pieces(model, images, order_SN) for name, order_SN in orders.items()}
        sources += [Source(f"nll/{name}", model.label, model.seed, of_order, "nll") for name, of_order in pieces.items()]
        sources += [Source(each.name, model.label, model.seed, pieces[OWN], each.name.split("/")[1]) for each in CALIBRATION]
    return sources


def _of_arm(arm: Arm) -> str:
    return f"own of {arm.label}"


def _nll_pieces(model: ArmModel, images: MeasuredImages, order_SN: Orders) -> tuple[NllPiece, ...]:
    parts = images.parts
    return tuple(NllPiece(model.file, images.codes_SN[part], model.cond_inputs_S[part], order_SN[part]) for part in parts)
