"""The orders of a flexibility report that are the same for all models."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oar_scale.data.hashing import permutations
from oar_scale.errors import UserError
from oar_scale.evaluation.flexibility.likelihood import Orders
from oar_scale.evaluation.likelihood import random_orders
from oar_scale.orders.order_files import run_files
from oar_scale.orders.policies import grid_policies
from oar_scale.orders.policies.mean import mean_order
from oar_scale.run.artifacts import read_tokens, read_train_orders
from oar_scale.studies.flexibility_models import HeldoutImages

PATHS = ("raster", "halton", "spiral")
"""Policies with one order for all images."""
TITLES = {
    "random": "random",
    "random seen": "random, of the pretraining",
    **{name: name for name in PATHS},
    "mean": "mean of the orders extracted by {score}",
    "extracted": "extracted by {score}, of training images",
}
"""``score``: of the extraction of the run whose images are measured; an arm with another one is not at home in these orders."""
DRAWN = ("random", *PATHS, "mean")
"""Those that samples are drawn in."""


def fixed_orders(images: HeldoutImages) -> tuple[dict[str, Orders], tuple[str, ...]]:
    """Orders [S, N] by name, and what was left out and why.

    ``random`` is of a seed that nobody trained with; ``random seen`` are those in which the run's pretraining has seen its first samples,
    if it was one in random orders; ``extracted`` are the stored ones of its first training images, given to these images.
    """
    run, (count, cells) = images.run, images.measured.codes_SN.shape
    grid = images.measured.grid
    orders: dict[str, NDArray[np.integer]] = {"random": random_orders(count, cells, run.recipe.seed).numpy()}
    orders |= {name: np.tile(policy.path(grid), (count, 1)) for name, policy in grid_policies().items() if name in PATHS}
    pretrain, notes = run.recipe.pretrain, list[str]()
    if pretrain.steps and pretrain.order in (None, "random"):
        orders["random seen"] = permutations("order", cells, run.recipe.seed, 0, np.arange(count))
    else:
        order = f"its order is {pretrain.order}" if pretrain.steps else "pretrain.steps is 0"
        notes.append(f"Random orders of the pretraining were left out: there are none ({order}).")
    try:
        orders["mean"] = np.tile(mean_order(run_files(run.at()), grid), (count, 1))
        extracted_SN = read_train_orders(run, read_tokens(run, "train", count))
        orders["extracted"] = np.resize(extracted_SN, (count, cells)) if len(extracted_SN) < count else extracted_SN[:count]
    except UserError as error:
        notes.append(f"Mean and extracted orders were left out: {error}")
    return {name: orders[name].astype(np.uint16) for name in TITLES if name in orders}, tuple(notes)
