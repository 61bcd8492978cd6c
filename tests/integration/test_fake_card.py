"""What a GPU would be asked to do: no tensors of two devices, no waiting for results inside a step, the right types, and a CPU's numbers.

Every layout, condition and way of placing cells runs on tensors that say they are on a GPU (``fake_card.py``). That images are those of a
CPU, too, is in ``tests/generation/test_static_steps.py``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from fake_card import FakeCard, OnCard, Sync, fake_card, numbers, on_card
from small_models import CONDITIONS, cond_inputs, random_codes, random_orders, small_model
from torch import Tensor

from oar_scale.generation.arguments import given_order
from oar_scale.generation.sampling import Generated, Known, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel
from oar_scale.model.layouts import LAYOUTS
from oar_scale.orders.extraction import Orders, extract_orders
from oar_scale.orders.head import HeadSpec, OrderHead, predict_ahead, predict_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.maskgit_vq import MaskGITSpec, MaskGITVQ
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer

ANY_ORDER = [layout for layout in LAYOUTS if layout != "raster"]
IMAGES = 3
BF16 = torch.bfloat16
layouts = pytest.mark.parametrize("layout", LAYOUTS)
any_order = pytest.mark.parametrize("layout", ANY_ORDER)
CONDITIONED = [*((layout, "text") for layout in LAYOUTS), ("instructed", "class"), ("instructed", "features")]
"""Every layout and every condition; neither knows of the other."""
conditions = pytest.mark.parametrize(("layout", "condition"), CONDITIONED)
key_heads = pytest.mark.parametrize("kv_heads", [None, 1], ids=["heads", "grouped"])


def made(layout: str, condition: str = "text", dtype: torch.dtype = torch.float32, **changes: Any) -> AnyOrderModel:
    return small_model(layout=layout, condition=CONDITIONS[condition], **changes).to(dtype)


def orders_of(model: AnyOrderModel, images: int = IMAGES) -> Tensor:
    if model.spec.layout == "raster":
        return torch.arange(model.spec.cells).repeat(images, 1)
    return random_orders(model, images)


def rows_of(model: AnyOrderModel) -> Tensor:
    """Condition rows, without gradients."""
    inputs = cond_inputs(model, IMAGES)
    with torch.no_grad():
        return model.condition(OnCard(inputs) if isinstance(next(model.parameters()), OnCard) else inputs)


def nothing_mixed(card: FakeCard) -> None:
    assert not card.mixed, "operations on tensors of the CPU and of the card"


# -- training ------------------------------------------------------------------------------------------------------------------


@conditions
def test_a_training_pass_waits_for_nothing(layout: str, condition: str) -> None:
    """In bf16, with dropout and dropped captions; matrix products in bf16, losses in float32, nothing in float64."""
    model = made(layout, condition, BF16, dropout=0.1)
    inputs = random_codes(model, IMAGES), orders_of(model), cond_inputs(model, IMAGES), torch.tensor([True, False, False])
    with fake_card() as card:
        on = on_card(model).train()
        codes, order, asked, drop = (OnCard(each) for each in inputs)
        card.forget()
        loss, nll = on.loss(codes, order, on.condition(asked, drop))
        loss.backward()
    nothing_mixed(card)
    assert not card.syncs
    assert set(card.products) == {BF16} and not card.doubles
    assert loss.dtype == nll.dtype == torch.float32
    gradients = [parameter.grad for parameter in on.parameters() if parameter.requires_grad]
    assert all(numbers(gradient).dtype == BF16 for gradient in gradients)


@layouts
@key_heads
def test_a_card_trains_with_the_cpus_numbers(layout: str, kv_heads: int | None) -> None:
    model = made(layout, kv_heads=kv_heads)
    codes, order, asked = random_codes(model, IMAGES), orders_of(model), cond_inputs(model, IMAGES)
    loss, nll = model.loss(codes, order, model.condition(asked))
    loss.backward()
    with fake_card():
        on = on_card(model)
        card_loss, card_nll = on.loss(OnCard(codes), OnCard(order), on.condition(OnCard(asked)))
        card_loss.backward()
    torch.testing.assert_close(numbers(card_nll), nll, rtol=1e-5, atol=1e-5)
    for (name, ours), card_s in zip(model.named_parameters(), on.parameters(), strict=True):
        if ours.grad is not None:
            assert (numbers(card_s.grad) - ours.grad).norm() <= 1e-4 * ours.grad.norm(), name


# -- extraction ----------------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "guided": {"guidance": 2.0},
    "own code": {"score": "gt_logprob"},
    "entropy": {"score": "neg_entropy"},
    "margin": {"score": "margin"},
    "sampled": {"score": "sampled"},
    "noise": {"order_temperature": 1.0},
    "random first cell": {"first_cell": "random"},
    "three a step": {"commit_per_step": 3},
    "five steps": {"cosine_steps": 5},
}
WAYS_OF = [(layout, way) for layout in ANY_ORDER for way in WAYS if layout == "instructed" or way in ("exact", "three a step")]
"""Which cell is next is found from logits, whatever rows they are of."""


def extracted(model: AnyOrderModel, settings: ExtractionSettings) -> tuple[Orders, FakeCard, list[tuple[int, Counter[Sync]]]]:
    """The orders by a card; its kernels and syncs so far after each step."""
    codes, after = random_codes(model, IMAGES), list[tuple[int, Counter[Sync]]]()
    with fake_card() as card:
        on = on_card(model)
        condition = rows_of(on)
        card.forget()
        found = extract_orders(on, OnCard(codes), condition, settings, on_step=lambda: after.append((card.kernels, card.syncs.copy())))
    nothing_mixed(card)
    return found, card, after


@any_order
@key_heads
def test_a_card_finds_the_cpus_orders(layout: str, kv_heads: int | None) -> None:
    model = made(layout, kv_heads=kv_heads)
    expected = extract_orders(model, random_codes(model, IMAGES), rows_of(model), ExtractionSettings())
    found, _, after = extracted(model, ExtractionSettings())
    assert torch.equal(numbers(found.order_BN), expected.order_BN)
    torch.testing.assert_close(numbers(found.score_BN), expected.score_BN, rtol=1e-4, atol=1e-4)
    assert after[-1][1] == after[0][1]


@pytest.mark.parametrize(("layout", "way"), WAYS_OF)
def test_extraction_waits_for_nothing_inside_a_step(layout: str, way: str) -> None:
    _, card, after = extracted(made(layout, dtype=BF16), ExtractionSettings(**WAYS[way]))
    assert after[-1][1] - after[0][1] == Counter()
    assert set(card.products) == {BF16}


# -- generation ----------------------------------------------------------------------------------------------------------------

DRAWN: dict[str, dict[str, Any]] = {
    "by confidence": {"order_temperature": 0.5},
    "by drawn codes": {"score": "sampled"},
    "along an order": {"order": True},
    "in parallel": {"order": True, "steps": 3},
    "beside known cells": {"order_temperature": 0.5, "known": 2},
    "of the best codes": {"order": True, "top_k": 3},
}


def drawn(model: AnyOrderModel, way: str, **changes: Any) -> Generated:
    wanted = {**DRAWN[way], **changes}
    order = orders_of(model) if wanted.pop("order", False) else None
    known = None
    if count := wanted.pop("known", 0):
        known = Known(random_orders(model, IMAGES)[:, :count].contiguous(), random_codes(model, IMAGES)[:, :count].contiguous())
    condition = rows_of(model)
    if isinstance(condition, OnCard):
        order = None if order is None else OnCard(order)
        known = None if known is None else Known(*(OnCard(each) for each in known))
    settings = SampleSettings(**{"guidance": 2.0, "temperature": 1.0, "top_k": 0, "order_temperature": 0.0, **wanted})
    return generate(model, condition, settings, 0, order, known)


def ways_of(layout: str) -> list[str]:
    if layout == "raster":
        return ["along an order"]
    left_out = {"dual": "in parallel", "decoupled": "of the best codes"}.get(layout)  # rows of dual ask for one cell
    return [way for way in DRAWN if way != left_out]


BY_LOGITS = ("by drawn codes", "of the best codes")
"""What differs in them comes after the logits, which know nothing of their layout: of one layout they are tested each time."""
PAIRS = [
    pytest.param(layout, way, marks=[pytest.mark.slow] if way in BY_LOGITS and layout in ANY_ORDER[1:] else [])
    for layout in LAYOUTS
    for way in ways_of(layout)
]


def drawn_on_card(model: AnyOrderModel, way: str, **changes: Any) -> tuple[Generated, FakeCard]:
    with fake_card() as card:
        on = on_card(model)
        card.forget()
        images = drawn(on, way, **changes)
    nothing_mixed(card)
    return images, card


@pytest.mark.parametrize(("layout", "way"), PAIRS)
def test_generation_waits_for_nothing_inside_a_step(layout: str, way: str) -> None:
    """More cells, and so more steps, mean no more waiting."""
    changes = {"steps": 8} if way == "in parallel" else {}  # 4 and 8 steps, for 4 and 9 cells
    few, many = (drawn_on_card(made(layout, dtype=BF16, grid=grid), way, **changes)[1] for grid in (2, 3))
    assert many.syncs == few.syncs
    assert set(many.products) == {BF16}


def test_the_first_cell_of_a_blind_start_is_chosen_on_the_card() -> None:
    """It is the CPU's, and nothing waits for it."""
    blind, sighted = (made("decoupled", condition) for condition in ("class", "text"))
    assert (blind.spec.blind_start, sighted.spec.blind_start) == (True, False)
    ours = drawn(blind, "by confidence", order_temperature=0.0)
    (cards, card), (_, other) = (drawn_on_card(model, "by confidence", order_temperature=0.0) for model in (blind, sighted))
    assert torch.equal(numbers(cards.order_BN), ours.order_BN)
    assert card.syncs == other.syncs


def test_another_order_than_raster_is_refused_before_a_card_is_asked() -> None:
    """Its own assertion would end the process: nothing can be computed on a real card after one."""
    model = made("raster")
    with fake_card():
        on = on_card(model)
        condition, codes = rows_of(on), OnCard(torch.zeros(IMAGES, 1, dtype=torch.long))
        settings = SampleSettings(guidance=1.0, temperature=1.0, top_k=0, order_temperature=0.0)
        for order, known in ((orders_of(model).flip(1), None), (orders_of(model), Known(codes + 2, codes))):
            with pytest.raises(ValueError, match="in raster order only"):
                generate(on, condition, settings, 0, OnCard(order), known)


def test_an_order_that_a_card_drew_along_can_be_given() -> None:
    order = random_orders(made("instructed"), IMAGES)
    with fake_card() as card:
        given = given_order(OnCard(order), order.shape[1], IMAGES)
    nothing_mixed(card)
    assert torch.equal(given, order)


# -- around the model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vq", "maskgit"])
def test_a_card_encodes_and_decodes_as_a_cpu(kind: str) -> None:
    """Image to codes and back, by either tokenizer: the same codes, and nobody waits."""
    shape: dict[str, Any] = {"image_size": 16, "channels": 32, "multipliers": (1, 2), "res_blocks": 1, "codebook_size": 16}
    torch.manual_seed(0)
    tokenizer: ImageTokenizer = (
        VQTokenizer(VQSpec(**shape, latent_channels=32)) if kind == "vq" else MaskGITVQ(MaskGITSpec(**shape, latent_channels=32))
    )
    tokenizer.eval().requires_grad_(False)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(images)
    with fake_card() as card:
        on = on_card(tokenizer)
        seen = OnCard(images)
        card.forget()
        found = on.encode(seen)
        decoded = on.decode(found)
    nothing_mixed(card)
    assert not card.syncs
    assert torch.equal(numbers(found), codes)
    torch.testing.assert_close(numbers(decoded), tokenizer.decode(codes), rtol=1e-3, atol=1e-4)


@any_order
def test_an_order_head_predicts_on_a_card_as_on_a_cpu(layout: str) -> None:
    model = made(layout)
    torch.manual_seed(0)
    head = OrderHead(HeadSpec(model_id="", dim=model.spec.dim, grid=model.spec.grid, width=16, first=2)).eval()
    codes = random_codes(model, IMAGES)
    expected = [predict(model, codes, rows_of(model), head).order_BN for predict in (predict_orders, predict_ahead)]
    with fake_card() as card:
        on, on_head = on_card(model), on_card(head)
        condition = rows_of(on)
        found = [predict(on, OnCard(codes), condition, on_head).order_BN for predict in (predict_orders, predict_ahead)]
    nothing_mixed(card)
    for cards, ours in zip(found, expected, strict=True):
        assert torch.equal(numbers(cards), ours)


# -- the card itself -------------------------------------------------------------------------------------------------------------


def test_the_card_notices_what_a_gpu_would_suffer_from() -> None:
    """Each kind of fault that the tests above look for is seen when it is there."""
    with fake_card() as card:
        x = torch.ones(2, 3, device="cuda")
        assert x.device == torch.device("cuda:0") and card.kernels == 1 and not card.syncs
        x[0] += 1
        assert float(x.sum()) == 9.0
        assert x[x > 1].shape == (3,)
        x.cpu(), torch.tensor([1.0], device="cuda")
        x + torch.ones(3)
        x.double() @ x.double().t()
    assert {each.what for each in card.syncs} == {"item", "index with a mask", "copy from the card", "copy to the card"}
    assert card.mixed == ["aten::add.Tensor in outside"]
    assert card.products == {torch.float64: 1} and card.doubles.total() > 0
