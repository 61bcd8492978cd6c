"""Extraction against brute force: the same cells, in the same order, with the same scores."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_codes, random_text, small_model

from oar_scale.config.schema import Score
from oar_scale.model import AnyOrderModel
from oar_scale.orders.extraction import ExtractionSettings, Orders, brute_force_orders, extract_orders, regret
from oar_scale.orders.picking import guide, pick_best, tie_ranks, without
from oar_scale.orders.scores import SCORES, gt_logprob


def assert_same_orders(found: Orders, expected: Orders) -> None:
    assert torch.equal(found.order_BN, expected.order_BN)
    torch.testing.assert_close(found.score_BN, expected.score_BN, rtol=1e-4, atol=1e-4)


def is_permutation(order_BN: torch.Tensor) -> bool:
    return torch.equal(order_BN.sort(1).values, torch.arange(order_BN.shape[1]).expand_as(order_BN))


@settings(max_examples=25, deadline=None)
@given(
    grid=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
    score=st.sampled_from(get_args(Score)),
    guidance=st.sampled_from([1.0, 2.5, 0.0]),
)
@torch.no_grad()
def test_orders_equal_brute_force(grid: int, batch: int, seed: int, score: Score, guidance: float) -> None:
    model = small_model(grid=grid, seed=seed)
    codes, condition = random_codes(model, batch, seed), model.condition(random_text(model, batch, seed))
    how = ExtractionSettings(score, guidance, tie_seed=seed)
    found = extract_orders(model, codes, condition, how)
    assert is_permutation(found.order_BN)
    # Equal orders, or different ones of which neither is worse than rounding: a tie within it may fall either way.
    expected = brute_force_orders(model, codes, condition, how)
    assert regret(model, codes, condition, how, found.order_BN).max() < 1e-4
    same_B = (found.order_BN == expected.order_BN).all(1)
    torch.testing.assert_close(found.score_BN[same_B], expected.score_BN[same_B], rtol=1e-4, atol=1e-4)
    assert same_B.float().mean() > 0.5 or batch == 1


@torch.no_grad()
def test_every_seed_of_a_clear_model_gives_exactly_the_brute_force_orders() -> None:
    for seed in range(5):
        model = small_model(seed=seed)
        codes, condition = random_codes(model, 3, seed), model.condition(random_text(model, 3, seed))
        how = ExtractionSettings()
        assert_same_orders(extract_orders(model, codes, condition, how), brute_force_orders(model, codes, condition, how))


@torch.no_grad()
def test_orders_differ_between_images_captions_and_guidance() -> None:
    model = small_model(grid=4)
    codes, condition = random_codes(model, 2), model.condition(random_text(model, 2))
    plain = extract_orders(model, codes, condition, ExtractionSettings()).order_BN
    assert not torch.equal(plain[0], plain[1])
    other_caption = extract_orders(model, codes, condition.flip(0), ExtractionSettings()).order_BN
    assert not torch.equal(plain, other_caption)
    guided = extract_orders(model, codes, condition, ExtractionSettings(guidance=4.0)).order_BN
    assert not torch.equal(plain, guided)


@torch.no_grad()
def test_scale_0_is_the_model_without_caption() -> None:
    model = small_model()
    codes, condition = random_codes(model, 2), model.condition(random_text(model, 2))
    unguided = extract_orders(model, codes, model.null_condition(2), ExtractionSettings())
    assert_same_orders(extract_orders(model, codes, condition, ExtractionSettings(guidance=0.0)), unguided)


def indifferent_model() -> AnyOrderModel:
    """Every code equally likely everywhere, so that all scores tie."""
    model = small_model()
    with torch.no_grad():
        model.output.weight.zero_()
    return model


@torch.no_grad()
def test_ties_are_broken_by_seed_and_image_and_not_by_the_batch() -> None:
    model = indifferent_model()
    codes, condition = random_codes(model, 4), model.null_condition(4)
    images = np.array([5, 6, 7, 2**31])
    together = extract_orders(model, codes, condition, ExtractionSettings(), images).order_BN
    assert is_permutation(together)
    assert len(together.unique(dim=0)) == 4
    for image in range(4):
        part = slice(image, image + 1)
        alone = extract_orders(model, codes[part], condition[part], ExtractionSettings(), images[part]).order_BN
        assert torch.equal(alone[0], together[image])
    other_seed = extract_orders(model, codes, condition, ExtractionSettings(tie_seed=1), images).order_BN
    assert not torch.equal(other_seed, together)


def test_the_first_cell_is_uniform_among_ties() -> None:
    first = tie_ranks(0, np.arange(9000), 9).argmax(1).bincount(minlength=9)
    assert first.min() > 850
    assert first.max() < 1150


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_best_cell_does_not_depend_on_how_the_candidates_are_listed(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 3, (4, 9), generator=generator).float()
    cells = torch.arange(9).repeat(4, 1)
    ties = tie_ranks(seed, np.arange(4), 9)
    shuffle = torch.rand(4, 9, generator=generator).argsort(1)
    straight = cells.gather(1, pick_best(score, cells, ties)[:, None])
    shuffled = cells.gather(1, shuffle)
    assert torch.equal(straight, shuffled.gather(1, pick_best(score.gather(1, shuffle), shuffled, ties)[:, None]))
    assert torch.equal(score.gather(1, straight)[:, 0], score.amax(1))


def test_without_removes_the_winner_alone() -> None:
    cells = torch.tensor([[3, 1, 4, 0], [2, 5, 6, 7]])
    left = without(cells, torch.tensor([3, 0]))
    assert left.sort(1).values.tolist() == [[1, 3, 4], [5, 6, 7]]


@torch.no_grad()
def test_regret_is_the_loss_of_placing_a_worse_cell() -> None:
    model, how = small_model(), ExtractionSettings()
    codes, condition = random_codes(model, 2), model.condition(random_text(model, 2))
    best = extract_orders(model, codes, condition, how)
    assert regret(model, codes, condition, how, best.order_BN).abs().max() < 1e-4
    worse = best.order_BN.flip(1)
    assert regret(model, codes, condition, how, worse)[:, 0].min() > 1e-3


def test_scores_are_what_their_names_say() -> None:
    p = torch.tensor([[[0.5, 0.3, 0.2]]])
    logits, target = p.log() + 3, torch.tensor([[1]])
    expected = {"gt_logprob": np.log(0.3), "max_prob": np.log(0.5), "neg_entropy": float((p * p.log()).sum()), "margin": 0.2}
    assert SCORES.keys() == expected.keys() == set(get_args(Score))
    for name, value in expected.items():
        assert SCORES[name](logits, target).item() == pytest.approx(value, rel=1e-5)


def test_cells_the_model_is_certain_of_keep_their_ranks() -> None:
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 0], logits[0, 1, 0] = 18.0, 20.0
    sure, surer = gt_logprob(logits, torch.zeros(1, 2, dtype=torch.long))[0].tolist()
    assert sure < surer < 0  # log_softmax gives 0 for both
    assert surer == pytest.approx(-3 * np.exp(-20), rel=1e-4)


def test_guidance_of_scale_1_needs_no_second_branch() -> None:
    logits = torch.randn(2, 3, 5)
    assert guide(logits, 1.0) is logits
    torch.testing.assert_close(guide(logits, 3.0), logits[1:] + 3 * (logits[:1] - logits[1:]))


@torch.no_grad()
def test_bf16_orders_lose_little_against_exact_ones() -> None:
    model, how = small_model(grid=4), ExtractionSettings()
    codes, text = random_codes(model, 4), random_text(model, 4)
    condition = model.condition(text)
    half = small_model(grid=4).to(torch.bfloat16)
    order = extract_orders(half, codes, half.condition(text), how).order_BN
    loss = regret(model, codes, condition, how, order)
    random_loss = regret(model, codes, condition, how, torch.arange(16).expand(4, -1))
    assert loss.mean() < 0.05 * random_loss.mean()


@torch.no_grad()
@pytest.mark.parametrize(
    ("codes", "complaint"),
    [(torch.zeros(1, 8, dtype=torch.long), "grid has 9 cells"), (torch.full((1, 9), 7), "vocabulary is 0 .. 6")],
)
def test_codes_that_do_not_fit_are_refused(codes: torch.Tensor, complaint: str) -> None:
    model = small_model()
    with pytest.raises(ValueError, match=complaint):
        extract_orders(model, codes, model.null_condition(1), ExtractionSettings())


@torch.no_grad()
def test_a_damaged_model_gives_an_error_and_no_order() -> None:
    model = small_model()
    model.output.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not numbers"):
        extract_orders(model, random_codes(model, 1), model.null_condition(1), ExtractionSettings())
