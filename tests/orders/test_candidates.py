"""The cheaper ways against their definitions, written out image by image over full forward passes; and where they are exact."""

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
from oar_scale.data.hashing import hash_words
from oar_scale.model import AnyOrderModel
from oar_scale.orders.extraction import ExtractionSettings, Orders, brute_force_orders, extract_orders
from oar_scale.orders.selection import CounterRNG
from oar_scale.orders.step_sizes import step_sizes

GRID = 4
CELLS = GRID * GRID


def distance(a: int, b: int) -> int:
    return max(abs(a // GRID - b // GRID), abs(a % GRID - b % GRID))


def by_chance(how: ExtractionSettings, image: int, step: int, cell: int) -> float:
    return (int(hash_words("beyond the frontier", how.tie_seed, image, 0, step, cell) >> np.uint64(11)) + 0.5) * 2.0**-53


def cells_asked(how: ExtractionSettings, image: int, step: int, size: int, order: list[int], last: list[int], known: set[int]) -> list[int]:
    empty = [cell for cell in range(CELLS) if cell not in order]
    if how.rescore_radius is not None:
        return [c for c in empty if c not in known or any(distance(c, placed) <= how.rescore_radius for placed in last)]
    if how.frontier_random is None or step == 0:
        return empty
    near = [c for c in empty if any(distance(c, placed) <= 1 for placed in order)]
    others = sorted((c for c in empty if c not in near), key=lambda c: -by_chance(how, image, step, c))
    return near + others[: max(how.frontier_random, size - len(near))]


def best_cells(how: ExtractionSettings, scores: dict[int, float], ties: Tensor, size: int) -> list[int]:
    chosen = list[int]()
    while len(chosen) < size:
        left = {c: score for c, score in scores.items() if c not in chosen}
        if how.repulsion_radius:
            left = {c: s for c, s in left.items() if all(distance(c, other) > how.repulsion_radius for other in chosen)} or left
        best = max(left.values())
        chosen.append(max((c for c, score in left.items() if score >= best - 1e-6 * abs(best)), key=lambda c: int(ties[c])))
    return chosen


def by_definition(model: AnyOrderModel, codes_1N: Tensor, rows_1TD: Tensor, how: ExtractionSettings, image: int) -> tuple[list[int], int]:
    """The order of one image and how often the model was asked, in plain loops."""
    ties = CounterRNG.of(how.tie_seed, np.array([image]), 0, CELLS, codes_1N.device).ties()[0]
    order, last, known, times = list[int](), list[int](), dict[int, float](), 0
    for step, size in enumerate(step_sizes(how, CELLS)):
        asked = cells_asked(how, image, step, size, order, last, set(known))
        for cell in asked:
            logits_V = model(codes_1N, torch.tensor([[*order, cell]]), rows_1TD)[0, -1]
            known[cell] = float(logits_V.log_softmax(0)[codes_1N[0, cell]])
        old = how.rescore_radius is not None
        last = best_cells(how, {c: score for c, score in known.items() if c not in order and (old or c in asked)}, ties, size)
        order, times = order + last, times + len(asked)
    return order, times


WAYS: list[dict[str, Any]] = [
    {"commit_per_step": 3},
    {"commit_per_step": 4, "repulsion_radius": 1},
    {"commit_per_step": 2, "repulsion_radius": 9},
    {"cosine_steps": 5},
    {"cosine_steps": 4, "repulsion_radius": 1},
    {"frontier_random": 0},
    {"frontier_random": 2},
    {"frontier_random": 1, "commit_per_step": 6},
    {"rescore_radius": 1},
    {"rescore_radius": 2, "commit_per_step": 2},
]


@pytest.mark.parametrize("layout", ["instructed", "dual"])
@pytest.mark.parametrize("way", WAYS, ids=["-".join(f"{k}={v}" for k, v in way.items()) for way in WAYS])
@torch.no_grad()
def test_a_cheaper_way_is_what_it_says(layout: str, way: dict[str, Any]) -> None:
    model, how = small_model(grid=GRID, layout=layout), ExtractionSettings(**way)
    codes, rows, images = random_codes(model, 3), model.condition(random_text(model, 3)), np.array([4, 0, 9])
    found = extract_orders(model, codes, rows, how, images)
    asked = []
    for image in range(3):
        part = slice(image, image + 1)
        order, count = by_definition(model, codes[part], rows[part], how, int(images[image]))
        assert found.order_BN[image].tolist() == order
        asked.append(count)
    # Images of a batch that ask about fewer cells ask about some more; and what was placed without its question's row is asked again.
    assert found.rows >= max(asked)
    assert found.rows < extract_orders(model, codes, rows, ExtractionSettings()).rows
    brute = brute_force_orders(model, codes, rows, how, images)
    assert torch.equal(brute.order_BN, found.order_BN)
    torch.testing.assert_close(brute.score_BN, found.score_BN, rtol=1e-4, atol=1e-4)


def same_bits(found: Orders, expected: Orders) -> bool:
    return torch.equal(found.order_BN, expected.order_BN) and torch.equal(found.score_BN, expected.score_BN) and found.rows == expected.rows


@settings(max_examples=25, deadline=None)
@given(
    layout=st.sampled_from(["instructed", "dual"]),
    grid=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
    guidance=st.sampled_from([1.0, 2.0]),
    way=st.sampled_from([{"frontier_random": 16}, {"rescore_radius": 3}, {"commit_per_step": 1}, {"cosine_steps": 10**6}]),
)
@torch.no_grad()
def test_a_way_that_saves_nothing_is_exact_bit_for_bit(
    layout: str, grid: int, batch: int, seed: int, guidance: float, way: dict[str, Any]
) -> None:
    model = small_model(grid=grid, seed=seed, layout=layout)
    codes, rows = random_codes(model, batch, seed), model.condition(random_text(model, batch, seed))
    exact = extract_orders(model, codes, rows, ExtractionSettings(guidance=guidance))
    assert same_bits(extract_orders(model, codes, rows, ExtractionSettings(guidance=guidance, **way)), exact)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.integers(1, 4),
    seed=st.integers(0, 1000),
    way=st.sampled_from(WAYS),
    score=st.sampled_from(["gt_logprob", "margin", "sampled"]),
    temperature=st.sampled_from([0.0, 1.0]),
    first=st.sampled_from(["free", "random", 0]),
)
@torch.no_grad()
def test_every_way_gives_permutations(grid: int, seed: int, way: dict[str, Any], score: Any, temperature: float, first: Any) -> None:
    model = small_model(grid=grid, seed=seed)
    codes, rows = random_codes(model, 2, seed), model.condition(random_text(model, 2, seed))
    how = ExtractionSettings(score=score, order_temperature=temperature, first_cell=first, **way)
    found = extract_orders(model, codes, rows, how)
    assert torch.equal(found.order_BN.sort(1).values, torch.arange(grid * grid).expand(2, -1))
    assert found.score_BN.isfinite().all()


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
        ({"repulsion_radius": 1}, "Set commit_per_step above 1, or cosine_steps"),
        ({"frontier_random": 0, "rescore_radius": 1}, "Leave one of them out"),
        ({"orders_per_image": 2}, "2 orders of an image would be the same"),
        ({"rescore_radius": 0}, "greater than or equal to 1"),
        ({"first_cell": "last"}, "first_cell"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], complaint: str) -> None:
    for make in (ExtractConfig.model_validate, lambda given: ExtractionSettings(**given)):
        with pytest.raises(ValueError, match=complaint):
            make(fields)
