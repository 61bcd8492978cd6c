"""All that ``oar orders`` finds out, as plain values: the page shows them, ``orders.json`` keeps them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from oar_scale.json_object import JsonObject
from oar_scale.orders.analysis.agreement import Agreement
from oar_scale.orders.analysis.caption_groups import Group
from oar_scale.orders.analysis.statistics import FloatArray, OrderStatistics
from oar_scale.results.examples import OrderExample


@dataclass(frozen=True)
class HeadRow:
    """A method of having an order without extracting it, against the exact orders of images it was not fitted to."""

    name: str
    tau: float
    """Kendall tau: 1 the same order, 0 unrelated."""
    tau_rest: float
    """The same of the cells that the method decides about: without those that are placed first whatever the image."""
    rows: int
    """Candidate rows an image; exact extraction takes N (N + 1) / 2."""


@dataclass(frozen=True)
class HeadReport:
    """The quality of an order head."""

    model_id: str
    settings_id: str
    """Of the orders that it learned from."""
    images: int
    """That it was trained on."""
    heldout: int
    """Training images kept out, on which it is measured; variants of one picture are on one side."""
    exact_rows: int
    steps: int
    seconds: float
    first: int
    """Cells that are placed before the order head predicts the rest."""
    rows: tuple[HeadRow, ...]


@dataclass(frozen=True)
class OrderAnalysis:
    """The orders of some images."""

    recipe_name: str
    where: str
    """The folder of tables."""
    model_id: str
    settings_id: str
    score: str
    all_images: int
    grid: int
    statistics: OrderStatistics
    random: OrderStatistics
    """As many random orders, to read the others by."""
    time_map: FloatArray
    choice_entropy: FloatArray
    """Of each step, in nats [N]."""
    random_choice_entropy: FloatArray
    step_score: FloatArray
    """Mean score of the cell placed at each step [N], in the score's unit."""
    distances: Mapping[str, float]
    """Mean Kendall tau distance to each order that is the same for every image."""
    frequent: tuple[Group, ...]
    deviating: tuple[Group, ...]
    agreements: tuple[Agreement, ...] = ()
    examples: tuple[OrderExample, ...] = ()
    head: HeadReport | None = None
    animation: bytes = field(default=b"", repr=False)
    """Animated WebP."""

    @property
    def cells(self) -> int:
        """Cells of an image."""
        return self.grid**2

    def numbers(self) -> JsonObject:
        """Everything but the pictures, ready for JSON; what is not a number is null."""
        shown = {each.name for each in dataclasses.fields(self)} - {"examples", "animation"}
        numbers: JsonObject = {name: _plain(getattr(self, name)) for name in sorted(shown)}
        return numbers


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
