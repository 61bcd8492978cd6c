"""Extraction against brute force: the same cells, in the same order, with the same scores; and what an order may depend on."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONDITIONS, cond_inputs, random_codes, random_text, small_model

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.schema import Score
from oar_scale.model import AnyOrderModel
from oar_scale.orders.extraction import Orders, brute_force_orders, extract_orders, regret, scores_along
from oar_scale.orders.scores import SCORES
from oar_scale.orders.settings import ExtractionSettings


def assert_same_orders(orders: Orders, expected: Orders) -> None:
    assert torch.equal(orders.order_BN, expected.order_BN)
    torch.testing.assert_close(orders.score_BN, expected.score_BN, rtol=1e-4, atol=1e-4)


def is_permutation(order_BN: torch.Tensor) -> bool:
    return torch.equal(order_BN.sort(1).values, torch.arange(order_BN.shape[1]).expand_as(order_BN))


SETTINGS = st.fixed_dictionaries(
    {
        "score": st.sampled_from(sorted(SCORES)),
        "guidance": st.sampled_from([1.0, 2.5, 0.0]),
        "order_temperature": st.sampled_from([0.0, 0.0, 0.7]),
        "first_cell": st.sampled_from(["free", "free", "random", 0]),
        "commit_per_step": st.sampled_from([1, 1, 2, 5]),
        "tie_seed": st.integers(-5, 1000),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(["instructed", "dual", "decoupled", "grouped"]),
    condition=st.sampled_from(sorted(CONDITIONS)),
    kv_heads=st.sampled_from([None, 1]),
    grid=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
    how=SETTINGS,
)
@torch.no_grad()
def test_orders_equal_brute_force(
    layout: str, condition: str, kv_heads: int | None, grid: int, batch: int, seed: int, how: dict[str, Any]
) -> None:
    model = small_model(grid=grid, seed=seed, layout=layout, condition=CONDITIONS[condition], kv_heads=kv_heads)
    codes, rows, chosen = random_codes(model, batch, seed), model.condition(cond_inputs(model, batch, seed)), ExtractionSettings(**how)
    orders, expected = (find(model, codes, rows, chosen) for find in (extract_orders, brute_force_orders))
    assert is_permutation(orders.order_BN)
    differs = orders.order_BN != expected.order_BN
    same, first = differs.cumsum(1) == 0, differs & (differs.cumsum(1) == 1)
    torch.testing.assert_close(orders.score_BN[same], expected.score_BN[same], rtol=1e-3, atol=1e-4)
    # Equal orders; or up to the first other cell the same was placed, and the two cells there are a tie within rounding.
    assert not (chosen.order_temperature and differs.any())
    torch.testing.assert_close(orders.score_BN[first], expected.score_BN[first], rtol=1e-5, atol=1e-5)
    assert orders.rows == expected.rows


@torch.no_grad()
def test_a_clear_model_gives_exactly_the_brute_force_orders() -> None:
    """Every seed of a clear model gives exactly the brute force orders."""
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


@torch.no_grad()
def test_regret_is_the_loss_of_placing_a_worse_cell() -> None:
    """Shortfall is the loss of placing a worse cell."""
    model, how = small_model(), ExtractionSettings()
    codes, condition = random_codes(model, 2), model.condition(random_text(model, 2))
    best = extract_orders(model, codes, condition, how)
    assert regret(model, codes, condition, how, best.order_BN).abs().max() < 1e-4
    worse = best.order_BN.flip(1)
    assert regret(model, codes, condition, how, worse)[:, 0].min() > 1e-3


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
@pytest.mark.parametrize("how", [{"score": "sampled"}, {"order_temperature": 2.0}, {"first_cell": "random"}])
def test_chance_belongs_to_the_image_and_not_to_the_batch(how: dict[str, Any]) -> None:
    model, how_S = small_model(grid=3), ExtractionSettings(**how)
    codes, rows, images = random_codes(model, 5), model.condition(random_text(model, 5)), np.array([11, 5, 2**31, 0, 7])
    together = extract_orders(model, codes, rows, how_S, images)
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        alone = extract_orders(model, codes[part], rows[part], how_S, images[part])
        assert torch.equal(alone.order_BN, together.order_BN[part])
        torch.testing.assert_close(alone.score_BN, together.score_BN[part], rtol=1e-4, atol=1e-5)
    backwards = [numbers[::-1].copy() for numbers in (np.arange(5), images)]
    turned = extract_orders(model, codes[backwards[0]], rows[backwards[0]], how_S, backwards[1])
    assert torch.equal(turned.order_BN.flip(0), together.order_BN)
    again = extract_orders(model, codes, rows, how_S, images)
    assert torch.equal(again.order_BN, together.order_BN)
    assert torch.equal(again.score_BN, together.score_BN)
    other = extract_orders(model, codes, rows, dataclasses.replace(how_S, tie_seed=1), images)
    assert not torch.equal(other.order_BN, together.order_BN)


@torch.no_grad()
@pytest.mark.parametrize("how", [{"score": "sampled"}, {"order_temperature": 1.0}])
def test_each_draw_is_another_order_of_the_image(how: dict[str, Any]) -> None:
    model, settings = small_model(grid=4), ExtractionSettings(orders_per_image=3, **how)
    codes, rows = random_codes(model, 3), model.condition(random_text(model, 3))
    draws = [extract_orders(model, codes, rows, settings, draw=draw).order_BN for draw in range(3)]
    for image in range(3):
        assert len({tuple(order[image].tolist()) for order in draws}) == 3
    assert torch.equal(draws[2], extract_orders(model, codes, rows, settings, draw=2).order_BN)


@torch.no_grad()
def test_order_noise_prefers_better_cells_by_temperature() -> None:
    """Noise on the choice prefers better cells by its temperature."""
    model = small_model(grid=2)
    codes, rows = random_codes(model, 1).expand(4000, -1), model.condition(random_text(model, 1)).expand(4000, -1, -1)
    named = [ExtractionSettings(first_cell=cell) for cell in range(4)]
    first = torch.stack([extract_orders(model, codes[:1], rows[:1], settings).score_BN[0, 0] for settings in named])
    for temperature in (0.3, 2.0):
        order = extract_orders(model, codes, rows, ExtractionSettings(order_temperature=temperature)).order_BN
        share = order[:, 0].bincount(minlength=4) / 4000
        torch.testing.assert_close(share, (first / temperature).softmax(0), atol=0.03, rtol=0)


@torch.no_grad()
def test_the_first_cell_is_the_one_that_was_named_or_any() -> None:
    model = small_model(grid=3)
    codes, rows = random_codes(model, 900), model.null_condition(900)
    assert extract_orders(model, codes[:4], rows[:4], ExtractionSettings(first_cell=7)).order_BN[:, 0].tolist() == [7] * 4
    first = extract_orders(model, codes, rows, ExtractionSettings(first_cell="random")).order_BN[:, 0].bincount(minlength=9)
    assert first.min() > 60
    assert first.max() < 140
    with pytest.raises(ValueError, match=r"first_cell 9: the model's cells are 0 .. 8"):
        extract_orders(model, codes[:1], rows[:1], ExtractionSettings(first_cell=9))


@torch.no_grad()
@pytest.mark.parametrize("how", [{"score": "gt_logprob"}, {"guidance": 2.0}, {"score": "neg_entropy"}, {"score": "sampled"}])
def test_the_scores_of_an_order_are_those_it_was_found_by(how: dict[str, Any]) -> None:
    model, settings = small_model(grid=4), ExtractionSettings(**how)
    codes, rows = random_codes(model, 3), model.condition(random_text(model, 3))
    orders = extract_orders(model, codes, rows, settings)
    torch.testing.assert_close(scores_along(model, codes, rows, settings, orders.order_BN), orders.score_BN, rtol=1e-4, atol=1e-4)
    if settings.score == "gt_logprob":
        torch.testing.assert_close(orders.score_BN, -model.nll(codes, orders.order_BN, rows), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_candidate_is_asked_about_once() -> None:
    model = small_model(grid=4)
    codes, rows = random_codes(model, 2), model.null_condition(2)
    assert extract_orders(model, codes, rows, ExtractionSettings()).rows == 16 * 17 // 2
    assert extract_orders(model, codes, rows, ExtractionSettings(first_cell=0)).rows == 1 + 15 * 16 // 2


def test_settings_have_ids_and_the_default_keeps_its_own() -> None:
    """Settings have names of their own and the plain ones keep theirs."""
    plain = {"method": "exact", "score": "gt_logprob", "guidance": 1.0, "tie_seed": 0}
    assert ExtractionSettings(score="gt_logprob").id == fingerprint(plain)
    # As written by version 60fa78e, whose settings also had repulsion_radius, frontier_random and rescore_radius.
    assert ExtractionSettings(score="gt_logprob").id == "957fbdd69981a439"
    assert ExtractionSettings(score="gt_logprob", guidance=2.0, commit_per_step=4).id == "cdbde7c775ab8c7b"
    others: list[dict[str, Any]] = [
        *({"score": score} for score in get_args(Score)),
        *({"first_cell": first} for first in (0, 1, "random")),
        *({"guidance": 2.0}, {"tie_seed": 1}, {"order_temperature": 1.0}, {"score": "sampled", "orders_per_image": 2}),
        *({"commit_per_step": 2}, {"commit_per_step": 3}, {"cosine_steps": 1}),
        *({"score": "info_gain", "info_gain_samples": 0}, {"score": "info_gain", "info_gain_candidates": 9}),
    ]
    assert len({ExtractionSettings(**other).id for other in others}) == len(others)


@torch.no_grad()
def test_a_model_that_is_being_trained_is_refused() -> None:
    model = small_model().train()
    with pytest.raises(ValueError, match="training mode"):
        extract_orders(model, random_codes(model, 1), model.null_condition(1), ExtractionSettings())


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
    with pytest.raises(ArithmeticError, match="not numbers"):
        extract_orders(model, random_codes(model, 1), model.null_condition(1), ExtractionSettings())
