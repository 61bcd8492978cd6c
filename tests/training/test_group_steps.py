"""A grouped model is trained on groups of cells where its recipe says so."""

from __future__ import annotations

import pytest
import torch
from golden_training import IMAGES, PROMPTS, golden_batch, golden_model, golden_recipe
from torch import Tensor

from oar_scale.data.stream import Batch
from oar_scale.model import AnyOrderModel
from oar_scale.orders.step_sizes import cells_per_step
from oar_scale.training.plain_engine import PlainEngine

GROUP_STEPS = (16, 5, 2)


def engine(group_steps: tuple[int, ...], micro_batch: int = IMAGES, scale: float = 1.0) -> PlainEngine:
    """Matrices ``scale`` times as large: what cells see of one another then matters more."""
    model, recipe = golden_model("grouped"), golden_recipe("grouped", micro_batch=micro_batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1)
    return PlainEngine(model, PROMPTS, recipe.pretrain.model_copy(update={"group_steps": group_steps}), recipe.parallel)


@torch.no_grad()
def nll(model: AnyOrderModel, batch: Batch, groups: list[int] | None) -> float:
    condition: Tensor = model.condition(batch.encoded_prompts_b, batch.drop_b)
    return float(model.nll(batch.codes_bN, batch.orders(), condition, groups).mean())


def test_each_step_takes_one_of_the_groupings_for_all_its_images() -> None:
    whole, in_parts = engine(GROUP_STEPS, scale=5), engine(GROUP_STEPS, micro_batch=1, scale=5)
    taken = set()
    for step in range(8):
        batch = golden_batch("grouped", step)
        by_steps = {steps: nll(whole.model, batch, cells_per_step(16, steps)) for steps in GROUP_STEPS}
        loss = whole.train_step(batch, 1e-3).loss
        assert in_parts.train_step(batch, 1e-3).loss == pytest.approx(loss, rel=1e-5)
        (steps,) = [steps for steps, expected in by_steps.items() if loss == pytest.approx(expected, rel=1e-5)]
        taken.add(steps)
    assert taken == set(GROUP_STEPS)


def test_else_it_asks_for_one_cell_after_the_other() -> None:
    plain, batch = engine(()), golden_batch("grouped", 0)
    expected = nll(plain.model, batch, None)
    assert plain.train_step(batch, 1e-2).loss == pytest.approx(expected, rel=1e-5)
    losses = [plain.train_step(golden_batch("grouped", step), 1e-2).loss for step in range(1, 20)]
    assert losses[-1] < losses[0] - 0.3
