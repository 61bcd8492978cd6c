"""Picking cells: ties, guidance, and several cells at once."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oar_scale.data.hashing import permutations
from oar_scale.orders.selection import CounterRNG, guide, pick_best, pick_several


def rng(seed: int, images: int, cells: int, draw: int = 0) -> CounterRNG:
    return CounterRNG.of(seed, np.arange(images), draw, cells, torch.device("cpu"))


def test_the_best_of_equals_is_uniform() -> None:
    first = pick_best(torch.zeros(9000, 9), rng(0, 9000, 9).ties()).bincount(minlength=9)
    assert first.min() > 850
    assert first.max() < 1150


def test_ties_are_broken_as_they_always_were() -> None:
    for seed in (0, 3, -1):
        assert np.array_equal(rng(seed, 4, 9).ties().numpy(), permutations("tie", 9, seed, np.arange(4)))
    assert torch.equal(rng(0, 4, 9, draw=2).ties(), rng(0, 4, 9).ties())


@given(seed=st.integers(0, 10_000), count=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_several_cells_are_the_best_ones_in_turn(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(-2, 2, (3, 9), generator=generator).float()
    score[:, torch.randperm(9, generator=generator)[: 9 - count]] = -torch.inf
    ties = rng(seed, 3, 9).ties()
    picked = pick_several(score, ties, count)
    for image in range(3):
        left, expected = {cell for cell in range(9) if score[image, cell] > -torch.inf}, list[int]()
        while left:
            best = max(left, key=lambda c: (float(score[image, c]), int(ties[image, c])))
            expected.append(best)
            left.remove(best)
        assert picked[image].tolist() == expected


def test_noise_is_gumbels_and_new_in_every_step_and_draw() -> None:
    """Noise is gumbels and new at every step and in every draw."""
    noise = rng(0, 4000, 9).gumbel(0)
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - np.pi**2 / 6) < 0.05
    for other in (rng(0, 4000, 9).gumbel(1), rng(1, 4000, 9).gumbel(0), rng(0, 4000, 9, draw=1).gumbel(0)):
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.02


def test_numbers_by_a_cells_own_step_are_those_of_the_step() -> None:
    """Numbers of a step of each cells own are those of the step."""
    by_step = torch.stack([rng(0, 2, 4).uniform("drawn code", step) for step in range(3)])
    step = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    assert torch.equal(rng(0, 2, 4).uniform("drawn code", step), by_step.gather(0, step[None])[0])


def test_guidance_extrapolates_from_null_to_conditional() -> None:
    """With one scale for all or one for each row; of rows, and so of their logits."""
    conditional, null, head = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(5, 7)
    torch.testing.assert_close(guide(conditional, null, 3.0), null + 3 * (conditional - null))
    torch.testing.assert_close(guide(conditional, null, 3.0) @ head, guide(conditional @ head, null @ head, 3.0))
    scale_BR = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.5, 4.0]])
    each = guide(conditional, null, scale_BR)
    for image, row in itertools.product(range(2), range(3)):
        one = guide(conditional[image, row], null[image, row], float(scale_BR[image, row]))
        torch.testing.assert_close(each[image, row], one)
