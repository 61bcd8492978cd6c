"""Score ``info_gain``: its definition by full forward passes, what it converges to, and what it does not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_models import cond_inputs, random_codes, small_model
from torch import Tensor

from oar_scale.model import AnyOrderModel, Decoder, decoding
from oar_scale.orders.extraction import Orders, brute_force_orders, extract_orders, regret, scores_along
from oar_scale.orders.look_ahead import entropies, information_gain, least_certain
from oar_scale.orders.settings import ExtractionSettings

IMAGES, VOCAB = 2, 5
LAYOUTS = ["instructed", "dual", "decoupled", "grouped"]


def model_of(layout: str = "instructed", grid: int = 2, seed: int = 1) -> AnyOrderModel:
    """Its logits are spread, so that codes tell of one another."""
    model = small_model(layout=layout, grid=grid, vocab=VOCAB, seed=seed)
    with torch.no_grad():
        model.output.weight.mul_(3)
    return model


@torch.no_grad()
def condition_of(model: AnyOrderModel, images: int = IMAGES) -> Tensor:
    return model.condition(cond_inputs(model, images))


def found(model: AnyOrderModel, images: int = IMAGES, seed: int = 0, **how: Any) -> Orders:
    codes = random_codes(model, images, seed)
    return extract_orders(model, codes, condition_of(model, images), ExtractionSettings(score="info_gain", **how))


def entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


@torch.no_grad()
def defined_gain(model: AnyOrderModel, codes_N: Tensor, placed: list[int], cell: int, condition_1TD: Tensor) -> float:
    """By a full forward pass for each other cell, before and after each code of the cell."""
    others = [each for each in range(model.spec.cells) if each != cell and each not in placed]
    if not others:
        return 0.0

    def distributions(first: list[int], codes: Tensor, asked: list[int]) -> Tensor:
        """Logits of each cell that is asked about, the next one after the first ones: [H, M, V] for H images."""
        orders = torch.tensor([[*first, each, *(c for c in range(model.spec.cells) if c != each and c not in first)] for each in asked])
        images = len(codes)
        rows = codes.repeat_interleave(len(asked), 0), orders.repeat(images, 1), condition_1TD.expand(images * len(asked), -1, -1)
        return model(*rows)[:, len(first)].unflatten(0, (images, len(asked)))

    own = distributions(placed, codes_N[None], [cell])[0, 0].softmax(0)
    hypotheses = codes_N.repeat(VOCAB, 1)
    hypotheses[:, cell] = torch.arange(VOCAB)
    before = entropy(distributions(placed, codes_N[None], others)[0]).sum()
    after_V = entropy(distributions([*placed, cell], hypotheses, others)).sum(1)
    return float(before - (own * after_V).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_all_codes_it_is_what_its_definition_says(layout: str) -> None:
    model = model_of(layout)
    codes, condition, orders = random_codes(model, IMAGES), condition_of(model), found(model, info_gain_samples=0)
    for image in range(IMAGES):
        placed = list[int]()
        for cell, score in zip(orders.order_BN[image].tolist(), orders.score_BN[image].tolist(), strict=True):
            empty = [each for each in range(4) if each not in placed]
            gains = {each: defined_gain(model, codes[image], placed, each, condition[image : image + 1]) for each in empty}
            assert score == pytest.approx(gains[cell], abs=1e-4)
            assert gains[cell] >= max(gains.values()) - 1e-4
            placed.append(cell)
        assert score == 0, "the last cell has nobody to tell of"


@torch.no_grad()
def gains_of(model: AnyOrderModel, samples: int, uniform_BR: Tensor, most: int | None = None) -> Tensor:
    """Of all cells of empty images, which have the same condition."""
    decoder = Decoder(model)
    prefix = decoder.begin(condition_of(model, 1).expand(len(uniform_BR), -1, -1))
    candidates = decoder.candidate_rows(prefix, torch.arange(model.spec.cells).expand(len(uniform_BR), -1))
    entropy_BR = entropies(decoder, candidates.rows_BRD)
    return information_gain(decoder, prefix, candidates, entropy_BR, least_certain(entropy_BR, most), samples, uniform_BR)


def test_sampled_gains_are_unbiased_and_converge() -> None:
    """The mean of 300 estimates by two codes each is within four standard errors; 400 codes err by less than 0.02 nats."""
    model = model_of(grid=3)
    exact = gains_of(model, 0, torch.zeros(1, 9))
    assert float(exact.max() - exact.min()) > 0.2, "there is something to tell apart"
    uniform = torch.rand(300, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few = gains_of(model, 2, uniform)
    error = few.std(0) / 300**0.5
    assert int((error > 1e-3).sum()) > 4
    assert ((few.mean(0) - exact[0]).abs() < 4 * error + 1e-4).all()
    many = gains_of(model, 400, uniform[:1])
    torch.testing.assert_close(many, exact, atol=0.02, rtol=0)


@torch.no_grad()
def test_of_the_least_certain_cells_the_best_is_taken() -> None:
    model, uniform = model_of(grid=3), torch.full((1, 9), 0.5)
    exact, some = gains_of(model, 0, uniform), gains_of(model, 0, uniform, most=3)
    decoder = Decoder(model)
    rows = decoder.candidate_rows(decoder.begin(condition_of(model, 1)), torch.arange(9)[None]).rows_BRD
    least = entropies(decoder, rows).topk(3, dim=1).indices
    torch.testing.assert_close(some.gather(1, least), exact.gather(1, least))
    assert int(some.isfinite().sum()) == 3
    first = found(model, images=1, info_gain_samples=0, info_gain_candidates=3).order_BN[:, 0]
    assert torch.equal(first, some.argmax(1))


@pytest.mark.parametrize("how", [{"info_gain_samples": 0}, {}, {"info_gain_candidates": 4}, {"commit_per_step": 2}], ids=str)
def test_scores_along_an_order_are_those_it_was_found_with(how: dict[str, Any]) -> None:
    model = model_of(grid=3)
    orders, settings = found(model, **how), ExtractionSettings(score="info_gain", **how)
    along = scores_along(model, random_codes(model, IMAGES), condition_of(model), settings, orders.order_BN)
    columns = slice(None, None, how.get("commit_per_step", 1))  # the second cell of a step was scored without the first
    if "commit_per_step" in how:
        columns = slice(0, 1)
    torch.testing.assert_close(along[:, columns], orders.score_BN[:, columns], rtol=1e-4, atol=1e-4)


def test_orders_depend_on_no_batch_and_on_no_code_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how many hypotheses go through the trunk at once."""
    model = model_of(grid=3)
    together = found(model, images=2)
    alone = extract_orders(model, random_codes(model, 2)[:1], condition_of(model, 2)[:1], ExtractionSettings(score="info_gain"))
    assert torch.equal(together.order_BN[:1], alone.order_BN)
    assert torch.equal(found(model, seed=5).order_BN[:, 0], together.order_BN[:, 0])
    monkeypatch.setitem(decoding.ROWS_AT_ONCE, "cpu", 20)
    assert torch.equal(found(model, images=2).order_BN, together.order_BN)


def test_its_cost_is_counted() -> None:
    """2 candidates x 3 codes: 8 + 2 rows each of the first step, and so on; the last step looks nowhere."""
    ahead = sum(min(2, left) * 3 * (left - 1 + 2) for left in range(2, 10))
    assert found(model_of(grid=3), info_gain_samples=3, info_gain_candidates=2).rows == 9 * 10 // 2 + ahead


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"guidance": 2.0}, "of the conditional model alone"),
        ({"first_cell": "random"}, "compares all empty cells"),
        ({"info_gain_candidates": 2, "commit_per_step": 3}, "a step may place more cells than are looked at"),
        ({"info_gain_candidates": 60, "cosine_steps": 3}, "a step may place more cells than are looked at"),
        ({"info_gain_samples": -1}, "info_gain_samples"),
    ],
)
def test_what_it_cannot_do_is_refused(how: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ExtractionSettings(score="info_gain", **how)


def test_brute_force_is_refused() -> None:
    model, settings = model_of(), ExtractionSettings(score="info_gain")
    codes, condition = random_codes(model, 1), condition_of(model, 1)
    with pytest.raises(ValueError, match="a pass for each hypothesis and cell"):
        brute_force_orders(model, codes, condition, settings)
    with pytest.raises(ValueError, match="a pass for each hypothesis and cell"):
        regret(model, codes, condition, settings, torch.arange(4)[None])
