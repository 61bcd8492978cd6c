"""From the tasks' raw results to the tables of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.evaluation.distances import frechet, kid, kid_difference
from oar_scale.evaluation.eval_tasks import BruteForce, Likelihoods
from oar_scale.evaluation.likelihood import nll_estimate, paired_difference
from oar_scale.orders.analysis import kendall_distance, placing_times
from oar_scale.registry import BASELINES, ModelName, model_label
from oar_scale.results.estimates import (
    Calibration,
    CaptionDependence,
    DistanceDifference,
    DistanceRow,
    NllDifference,
    NllEntry,
    NllTable,
    OrderName,
    PretrainEffect,
    estimate,
)

Features = NDArray[np.float32]
PerImage = dict[ModelName, dict[str, torch.Tensor]]
"""What the likelihood tasks measured, [S] for each model and name: nats per code by order, under ``shuffled captions``, predictions."""
MIN_COMPARED = 8
"""Images in a group whose distances are measured."""
ORDERS: tuple[OrderName, ...] = ("random", "raster", "own max_prob", "own gt_logprob")


def per_image(results: Sequence[Likelihoods]) -> PerImage:
    """The images of all tasks, in their order."""
    table: PerImage = {}
    for model in dict.fromkeys(task.model for task in results):
        tasks = sorted((task for task in results if task.model == model), key=lambda task: task.first)
        table[model] = {name: torch.from_numpy(np.concatenate([task.nll[name] for task in tasks])) for name in tasks[0].nll}
    return table


def likelihood_table(nll: PerImage) -> NllTable:
    """Means, and the ordered model against the others where both were measured."""
    entries = [NllEntry(model, order, nll_estimate(row[order])) for model, row in nll.items() for order in ORDERS if order in row]
    differences = [
        NllDifference("ordered", other, order, paired_difference(nll["ordered"][order], nll[other][order]))
        for order in ("own max_prob", "random", "own gt_logprob")
        for other in BASELINES
        if other in nll
    ]
    return NllTable(len(nll["ordered"]["random"]), tuple(entries), tuple(differences))


def pretrain_effect(nll: PerImage) -> PretrainEffect:
    """Likelihood under random orders before and after the pretraining, and the paired difference."""
    before, after = nll["base"]["random"], nll["any_order"]["random"]
    return PretrainEffect(len(after), nll_estimate(before), nll_estimate(after), paired_difference(after, before))


def calibrations(nll: PerImage) -> tuple[Calibration, ...]:
    """A row for each model whose own orders were found."""
    return tuple(
        Calibration(
            model,
            len(row["entropy"]),
            gap=paired_difference(row["own max_prob"], row["entropy"]),
            top_probability=estimate(row["top probability"].numpy()),
            top_accuracy=estimate(row["top accuracy"].numpy()),
        )
        for model, row in nll.items()
        if "entropy" in row
    )


def caption_dependence(nll: PerImage) -> tuple[CaptionDependence, ...]:
    """A row for each model that was given the captions of other images."""
    return tuple(
        CaptionDependence(
            model,
            len(row["random"]),
            own=nll_estimate(row["random"]),
            shuffled=nll_estimate(row["shuffled captions"]),
            difference=paired_difference(row["shuffled captions"], row["random"]),
        )
        for model, row in nll.items()
        if "shuffled captions" in row
    )


@dataclass(frozen=True)
class ComparedFeatures:
    """The features of the images whose distances are measured."""

    heldout_SF: Features
    drawn: dict[ModelName, Features]
    """Samples of each model for the captions of the held-out images."""
    real: dict[str, Features]
    """What to read the distances by: other real images, and the best that codes can do."""
    label: str = "efflite0"
    """Of the extractor."""

    @property
    def enough(self) -> bool:
        """Whether there are as many as a distance with a standard error needs."""
        return len(self.heldout_SF) >= MIN_COMPARED

    def of(self, member_S: NDArray[np.bool_]) -> ComparedFeatures:
        """Those of some held-out images and their captions, with as many real ones."""
        drawn = {model: features_SF[member_S] for model, features_SF in self.drawn.items()}
        real = {name: features_SF[: int(member_S.sum())] for name, features_SF in self.real.items()}
        return ComparedFeatures(self.heldout_SF[member_S], drawn, real, self.label)

    def rows(self, seed: int) -> tuple[DistanceRow, ...]:
        """The distance of each set to as many held-out images; samples of a model are for the captions of these, row by row."""
        by_label = self.real | {model_label(model): features_SF for model, features_SF in self.drawn.items()}
        rows = []
        for name, features_SF in by_label.items():
            spread = kid(features_SF, self.heldout_SF, paired=name not in self.real, seed=seed)
            distance = frechet(features_SF, self.heldout_SF)
            rows.append(DistanceRow(name, len(features_SF), spread.mean, spread.std, distance, self.label))
        return tuple(rows)

    def differences(self) -> tuple[DistanceDifference, ...]:
        """The ordered model's distance against the others', paired by caption."""
        ordered_SF = self.drawn["ordered"]
        return tuple(
            DistanceDifference(
                "ordered", other, len(ordered_SF), kid_difference(ordered_SF, self.drawn[other], self.heldout_SF), self.label
            )
            for other in BASELINES
            if other in self.drawn
        )


def raster_distance(order_SN: NDArray[np.uint16]) -> float:
    """Mean share of the pairs of cells that raster order would place the other way round."""
    return float(kendall_distance(order_SN, np.arange(order_SN.shape[1])).mean())


def mean_steps(order_SN: NDArray[np.uint16]) -> NDArray[np.float64]:
    """When each cell was placed on average, [G, G], 0 = always first."""
    grid = round(order_SN.shape[1] ** 0.5)
    steps: NDArray[np.float64] = placing_times(order_SN).mean(axis=0).reshape(grid, grid)
    return steps


def brute_force_text(result: BruteForce) -> str:
    """The outcome of the comparison as text."""
    opening = f"Compared with brute force (a fresh forward pass for every candidate, float32) on {result.images} training images:"
    if result.equal == result.images:
        outcome = f"all {result.images} orders are equal."
    else:
        outcome = (
            f"{result.equal} of {result.images} orders are equal; "
            f"where one first differs, the scores of the two choices are {result.gap:.1e} apart."
        )
    return f"{opening} {outcome} The stored orders of these images are {result.stored_distance:.1%} of the pairs of cells away from them."
