"""Several cells a step, against the definition written out image by image over full forward passes; and where that is exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_codes, random_text, small_model
from torch import Tensor

from oar_scale.config.schema import ExtractConfig
from oar_scale.model import AnyOrderModel
from oar_scale.orders.extraction import Orders, brute_force_orders, extract_orders
from oar_scale.orders.selection import CounterRNG
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.orders.step_sizes import step_sizes

GRID = 4
CELLS = GRID * GRID


def best_cells(scores: dict[int, float], ties: Tensor, size: int) -> list[int]:
    chosen = list[int]()
    while len(chosen) < size:
        left = {c: score for c, score in scores.items() if c not in chosen}
        best = max(left.values())
        chosen.append(max((c for c, score in left.items() if score >= best - 1e-6 * abs(best)), key=lambda c: int(ties[c])))
    return chosen


def by_definition(model: AnyOrderModel, codes_1N: Tensor, rows_1TD: Tensor, how: ExtractionSettings, image: int) -> tuple[list[int], int]:
    """The order of one image and how often the model was called, in plain loops."""
    ties = CounterRNG.of(how.tie_seed, np.array([image]), 0, CELLS, codes_1N.device).ties()[0]
    order, times = list[int](), 0
    for size in step_sizes(how, CELLS):
        scores = dict[int, float]()
        for cell in (cell for cell in range(CELLS) if cell not in order):
            logits_V = model(codes_1N, torch.tensor([[*order, cell]]), rows_1TD)[0, -1]
            scores[cell] = float(logits_V.log_softmax(0)[codes_1N[0, cell]])
        order, times = order + best_cells(scores, ties, size), times + len(scores)
    return order, times


@pytest.mark.parametrize("first_cell", ["random", 5])
@torch.no_grad()
def test_a_given_first_cell_is_a_step_of_its_own_before_all_others_at_once(first_cell: Any) -> None:
    model, how = small_model(grid=GRID), ExtractionSettings(cosine_steps=1, first_cell=first_cell)
    orders = extract_orders(model, random_codes(model, 3), model.condition(random_text(model, 3)), how)
    assert torch.equal(orders.order_BN.sort(1).values, torch.arange(CELLS).expand(3, -1)) and bool(orders.score_BN.isfinite().all())
    assert first_cell == "random" or bool((orders.order_BN[:, 0] == first_cell).all())


METHODS: list[dict[str, Any]] = [{"commit_per_step": 3}, {"commit_per_step": 6}, {"cosine_steps": 5}, {"cosine_steps": 4}]


@pytest.mark.parametrize("layout", ["instructed", "dual", "decoupled", "grouped"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(f"{k}={v}" for k, v in method.items()))
@torch.no_grad()
def test_several_cells_a_step_are_the_best_by_definition(layout: str, method: dict[str, Any]) -> None:
    model, how = small_model(grid=GRID, layout=layout), ExtractionSettings(score="gt_logprob", **method)
    codes, rows, images = random_codes(model, 3), model.condition(random_text(model, 3)), np.array([4, 0, 9])
    orders = extract_orders(model, codes, rows, how, images)
    calls = []
    for image in range(3):
        part = slice(image, image + 1)
        order, count = by_definition(model, codes[part], rows[part], how, int(images[image]))
        assert orders.order_BN[image].tolist() == order
        calls.append(count)
    # All but the first cell of a step go through the trunk once more.
    assert orders.rows >= max(calls)
    assert orders.rows < extract_orders(model, codes, rows, ExtractionSettings()).rows
    brute = brute_force_orders(model, codes, rows, how, images)
    assert torch.equal(brute.order_BN, orders.order_BN)
    torch.testing.assert_close(brute.score_BN, orders.score_BN, rtol=1e-4, atol=1e-4)


def same_bits(result: Orders, expected: Orders) -> bool:
    return (
        torch.equal(result.order_BN, expected.order_BN) and torch.equal(result.score_BN, expected.score_BN) and result.rows == expected.rows
    )


@settings(max_examples=25, deadline=None)
@given(
    layout=st.sampled_from(["instructed", "dual", "decoupled", "grouped"]),
    grid=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
    guidance=st.sampled_from([1.0, 2.0]),
    method=st.sampled_from([{"commit_per_step": 1}, {"cosine_steps": 10**6}]),
)
@torch.no_grad()
def test_a_method_that_saves_nothing_is_exact_bit_for_bit(
    layout: str, grid: int, batch: int, seed: int, guidance: float, method: dict[str, Any]
) -> None:
    model = small_model(grid=grid, seed=seed, layout=layout)
    codes, rows = random_codes(model, batch, seed), model.condition(random_text(model, batch, seed))
    exact = extract_orders(model, codes, rows, ExtractionSettings(guidance=guidance))
    assert same_bits(extract_orders(model, codes, rows, ExtractionSettings(guidance=guidance, **method)), exact)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.integers(1, 4),
    seed=st.integers(0, 1000),
    method=st.sampled_from(METHODS),
    score=st.sampled_from(["gt_logprob", "margin", "sampled"]),
    temperature=st.sampled_from([0.0, 1.0]),
    first=st.sampled_from(["free", "random", 0]),
)
@torch.no_grad()
def test_every_method_gives_permutations(grid: int, seed: int, method: dict[str, Any], score: Any, temperature: float, first: Any) -> None:
    model = small_model(grid=grid, seed=seed)
    codes, rows = random_codes(model, 2, seed), model.condition(random_text(model, 2, seed))
    how = ExtractionSettings(score=score, order_temperature=temperature, first_cell=first, **method)
    orders = extract_orders(model, codes, rows, how)
    assert torch.equal(orders.order_BN.sort(1).values, torch.arange(grid * grid).expand(2, -1))
    assert orders.score_BN.isfinite().all()


@given(
    cells=st.integers(1, 600),
    how=st.sampled_from([{}, {"commit_per_step": 7}, {"cosine_steps": 9}, {"first_cell": "random", "commit_per_step": 5}]),
)
def test_the_steps_place_every_cell(cells: int, how: dict[str, Any]) -> None:
    sizes = step_sizes(ExtractionSettings(**how), cells)
    assert sum(sizes) == cells
    assert min(sizes) >= 1
    if "first_cell" in how or "cosine_steps" in how:
        assert sizes[0] == 1


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"cosine_steps": 4, "commit_per_step": 2}, "Leave out commit_per_step"),
        ({"orders_per_image": 2}, "2 orders of an image would be the same"),
        ({"cosine_steps": 0}, "greater than or equal to 1"),
        ({"first_cell": "last"}, "first_cell"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], complaint: str) -> None:
    for make in (ExtractConfig.model_validate, lambda given: ExtractionSettings(**given)):
        with pytest.raises(ValueError, match=complaint):
            make(fields)
