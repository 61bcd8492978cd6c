"""From the tasks' raw results to the tables of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.evaluation.distances import frechet, kid
from oar_scale.evaluation.eval_tasks import BruteForce, Likelihoods
from oar_scale.evaluation.likelihood import nll_estimate, paired_difference
from oar_scale.orders.analysis import kendall_distance, placing_times
from oar_scale.registry import BASELINES, ModelName
from oar_scale.results.estimates import (
    CaptionDependence,
    DistanceRow,
    NllDifference,
    NllEntry,
    NllTable,
    OrderName,
    PretrainEffect,
)

Features = NDArray[np.float32]
PerImage = dict[ModelName, dict[str, torch.Tensor]]
"""Nats per code [S] for each model and order (or ``shuffled captions``)."""
ORDERS: tuple[OrderName, ...] = ("random", "raster", "own confidence")


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
        for order in ("own confidence", "random")
        for other in BASELINES
        if other in nll
    ]
    return NllTable(len(nll["ordered"]["random"]), tuple(entries), tuple(differences))


def pretrain_effect(nll: PerImage) -> PretrainEffect:
    """Likelihood under random orders before and after the pretraining, and the paired difference."""
    before, after = nll["base"]["random"], nll["any_order"]["random"]
    return PretrainEffect(len(after), nll_estimate(before), nll_estimate(after), paired_difference(after, before))


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


def distance_rows(sets: Mapping[str, Features], heldout: Features, seed: int) -> tuple[DistanceRow, ...]:
    """Distances of each set of features to those of as many held-out images."""
    rows = []
    for name, features in sets.items():
        spread = kid(features, heldout, seed=seed)
        rows.append(DistanceRow(name, len(features), spread.mean, spread.std, frechet(features, heldout)))
    return tuple(rows)


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
