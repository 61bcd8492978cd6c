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
    GroupName,
    ImageGroup,
    NllDifference,
    NllEntry,
    NllTable,
    OrderName,
    PretrainEffect,
)

Features = NDArray[np.float32]
Families = NDArray[np.int64]
"""[S]: the same number for images of one family, which are not independent of each other."""
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


def likelihood_table(nll: PerImage, families_S: Families) -> NllTable:
    """Means, and the ordered model against the others where both were measured."""
    entries = [
        NllEntry(model, order, nll_estimate(row[order], families_S)) for model, row in nll.items() for order in ORDERS if order in row
    ]
    differences = [
        NllDifference("ordered", other, order, paired_difference(nll["ordered"][order], nll[other][order], families_S))
        for order in ("own max_prob", "random", "own gt_logprob")
        for other in BASELINES
        if other in nll
    ]
    return NllTable(len(families_S), tuple(entries), tuple(differences), len(np.unique(families_S)))


def pretrain_effect(nll: PerImage, families_S: Families) -> PretrainEffect:
    """Likelihood under random orders before and after the pretraining, and the paired difference."""
    before, after = nll["base"]["random"], nll["any_order"]["random"]
    difference = paired_difference(after, before, families_S)
    return PretrainEffect(len(after), nll_estimate(before, families_S), nll_estimate(after, families_S), difference)


def calibrations(nll: PerImage, families_S: Families) -> tuple[Calibration, ...]:
    """A row for each model whose own orders were found."""
    return tuple(
        Calibration(
            model,
            len(row["entropy"]),
            gap=paired_difference(row["own max_prob"], row["entropy"], families_S),
            top_probability=nll_estimate(row["top probability"], families_S),
            top_accuracy=nll_estimate(row["top accuracy"], families_S),
        )
        for model, row in nll.items()
        if "entropy" in row
    )


def caption_dependence(nll: PerImage, families_S: Families) -> tuple[CaptionDependence, ...]:
    """A row for each model that was given the captions of other images."""
    return tuple(
        CaptionDependence(
            model,
            len(row["random"]),
            own=nll_estimate(row["random"], families_S),
            shuffled=nll_estimate(row["shuffled captions"], families_S),
            difference=paired_difference(row["shuffled captions"], row["random"], families_S),
        )
        for model, row in nll.items()
        if "shuffled captions" in row
    )


@dataclass(frozen=True)
class ComparedFeatures:
    """The features of the images whose distances are measured."""

    heldout_SF: Features
    families_S: Families
    """Of the held-out images."""
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
        return ComparedFeatures(self.heldout_SF[member_S], self.families_S[member_S], drawn, real, self.label)

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
        ordered_SF, others = self.drawn["ordered"], [other for other in BASELINES if other in self.drawn]
        found = [kid_difference(ordered_SF, self.drawn[other], self.heldout_SF, self.families_S) for other in others]
        return tuple(
            DistanceDifference("ordered", other, len(ordered_SF), difference, self.label)
            for other, difference in zip(others, found, strict=True)
        )


def image_group(name: GroupName, nll: PerImage, families_S: Families, compared: ComparedFeatures, seed: int) -> ImageGroup:
    """The figures over some of the held-out images; distances only where there are enough."""
    return ImageGroup(
        name,
        nll=likelihood_table(nll, families_S),
        pretrain=pretrain_effect(nll, families_S),
        calibration=calibrations(nll, families_S),
        captions=caption_dependence(nll, families_S),
        distances=compared.rows(seed) if compared.enough else (),
        distance_differences=compared.differences() if compared.enough else (),
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
