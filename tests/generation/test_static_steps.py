"""Steps on static buffers, recorded and replayed: the images and orders of slices, by one recording and one compiled graph a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_card import OnCard, fake_card, numbers, on_card
from small_models import cond_inputs, random_codes, random_orders, small_model
from tape import Tapes
from torch import Tensor
from torch.fx import GraphModule

from oar_scale.generation.sampling import Generated, Known, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, cache, decoding, steps
from oar_scale.model.layouts import LAYOUTS
from oar_scale.orders.extraction import Orders, extract_orders
from oar_scale.orders.settings import ExtractionSettings

IMAGES = 2
ANY_ORDER = [layout for layout in LAYOUTS if layout != "raster"]
EVERYTHING = 2**20
DRAWN: dict[str, dict[str, Any]] = {
    "by confidence": {},
    "by drawn codes": {"score": "sampled", "top_k": 4},
    "several by confidence": {"steps": 4, "guidance": 1.0},
    "along an order": {"order": True},
    "of the best codes": {"order": True, "top_k": 3},
    "in parallel": {"order": True, "steps": 6},
    "by a schedule": {"order": True, "guidance_schedule": "linear"},
    "beside known cells": {"order_temperature": 0.5, "known": True, "guidance_schedule": "cosine"},
}
EXTRACTED: dict[str, dict[str, Any]] = {
    "exact": {},
    "guided": {"guidance": 2.0, "score": "max_prob"},
    "drawn and noisy": {"score": "sampled", "order_temperature": 1.0},
    "three a step": {"commit_per_step": 3, "score": "margin"},
    "from a random cell": {"first_cell": "random", "score": "neg_entropy"},
}


def ways_of(layout: str) -> list[str]:
    if layout == "raster":
        return ["along an order", "by a schedule"]
    return [way for way in DRAWN if way != "in parallel" or layout != "dual"]  # whose rows ask for one cell


PAIRS = [(layout, way) for layout in LAYOUTS for way in ways_of(layout)]
BY_LOGITS = ("by drawn codes", "by a schedule", "of the best codes")
"""What differs in them comes after the logits, which know nothing of their layout: of one layout they are tested each time."""
MARKED = [
    pytest.param(layout, way, marks=[pytest.mark.slow] if way in BY_LOGITS and layout in ANY_ORDER[1:] else []) for layout, way in PAIRS
]


def drawn(model: AnyOrderModel, way: str, wrap: Callable[[Tensor], Tensor] = lambda tensor: tensor, **changes: Any) -> Generated:
    wanted = {**DRAWN[way], **changes}
    order = known = None
    if wanted.pop("order", False):
        order = random_orders(model, IMAGES) if model.spec.layout != "raster" else torch.arange(model.spec.cells).repeat(IMAGES, 1)
    if wanted.pop("known", False):
        cells, codes = random_orders(model, IMAGES)[:, :2].clone(), random_codes(model, IMAGES)[:, :2].clone()
        cells[0, 1] = -1  # one image knows one cell, the other two
        known = Known(wrap(cells), wrap(codes))
    settings = SampleSettings(**{"guidance": 2.0, "temperature": 1.0, "top_k": 0, "order_temperature": 0.0, **wanted})
    with torch.no_grad():
        condition = model.condition(wrap(cond_inputs(model, IMAGES)))
    return generate(model, condition, settings, 0, None if order is None else wrap(order), known)


def extracted(model: AnyOrderModel, way: str, wrap: Callable[[Tensor], Tensor] = lambda tensor: tensor, **options: Any) -> Orders:
    with torch.no_grad():
        condition = model.condition(wrap(cond_inputs(model, IMAGES)))
    return extract_orders(model, wrap(random_codes(model, IMAGES)), condition, ExtractionSettings(**EXTRACTED[way]), **options)


def same_images(one: Generated, other: Generated) -> None:
    assert torch.equal(one.codes_BN, other.codes_BN) and torch.equal(one.order_BN, other.order_BN)
    assert torch.equal(one.passes_B, other.passes_B)
    torch.testing.assert_close(one.score_BN, other.score_BN, rtol=1e-4, atol=1e-4)


def same_orders(one: Orders, other: Orders) -> None:
    assert torch.equal(one.order_BN, other.order_BN)
    torch.testing.assert_close(one.score_BN, other.score_BN, rtol=1e-4, atol=1e-4)


def on_static_buffers(patch: pytest.MonkeyPatch, how: str) -> Tapes:
    """From here on all steps are on static buffers, as they are or recorded."""
    tapes = Tapes()
    patch.setitem(cache.STATIC_ROWS, "cpu", EVERYTHING)
    if how == "replayed":
        patch.setitem(steps.RECORDERS, "cpu", lambda: tapes)
    return tapes


hows = pytest.mark.parametrize("how", [pytest.param("run", marks=pytest.mark.slow), "replayed"])
"""Where steps are replayed, the first of a kind is run, too."""


@hows
@pytest.mark.parametrize(("layout", "way"), MARKED)
def test_static_steps_draw_the_images_of_slices(layout: str, way: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(layout=layout, kv_heads=1)
    expected, tapes = drawn(model, way), on_static_buffers(monkeypatch, how)
    same_images(drawn(model, way), expected)
    # No two steps by confidence that place several cells are of a kind; a CPU looks at a raster model's order, and cannot record that.
    assert (tapes.replays > 0) == (how == "replayed" and way != "several by confidence" and layout != "raster")


@hows
@pytest.mark.parametrize("way", EXTRACTED)
@pytest.mark.parametrize("layout", ANY_ORDER)
def test_static_steps_find_the_orders_of_slices(layout: str, way: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(layout=layout)
    expected, tapes = extracted(model, way), on_static_buffers(monkeypatch, how)
    same_orders(extracted(model, way), expected)
    assert (tapes.replays > 0) == (how == "replayed" and way != "three a step")


def test_an_extraction_begins_in_slices_where_it_has_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on with static buffers when steps are small enough for them to pay: the same orders."""
    model = small_model(grid=4)
    expected, calls = extracted(model, "guided"), list[bool]()
    monkeypatch.setitem(cache.STATIC_ROWS, "cpu", 2 * IMAGES * 6)
    run = steps.Steps.__call__

    def seen(self: steps.Steps, step: Any, prefix: Any, *arguments: Any) -> Any:
        calls.append(prefix.static)
        return run(self, step, prefix, *arguments)

    monkeypatch.setattr(steps.Steps, "__call__", seen)
    same_orders(extracted(model, "guided"), expected)
    assert calls == [False] * 10 + [True] * 6


# -- graphs --------------------------------------------------------------------------------------------------------------------


class Compiled:
    """As a recorder: a graph of torch.compile, whole, for each kind of step. A backend that compiles nothing counts."""

    def __init__(self) -> None:
        self.kinds = self.graphs = self.calls = 0

    def record(self, function: steps.Replay, inputs: steps.Outputs) -> steps.Replay:
        self.kinds += 1
        torch._dynamo.reset()
        compiled = torch.compile(function, backend=self.backend, fullgraph=True)

        def replay(*inputs: Tensor) -> steps.Outputs:
            self.calls += 1
            return compiled(*inputs)

        return replay

    def backend(self, graph: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """All steps by confidence ask about 9 candidates, so that those after the first two are replays of one graph."""
    recorder = Compiled()
    monkeypatch.setitem(steps.RECORDERS, "cpu", lambda: recorder)
    for module in (cache, decoding):
        monkeypatch.setattr(module, "least_candidates", lambda cells: cells)
    return recorder


COMPILED = [(layout, "by confidence") for layout in ANY_ORDER]
COMPILED += [(layout, "in parallel" if "in parallel" in ways_of(layout) else "along an order") for layout in LAYOUTS]
"""Tracing takes long, and who draws in parallel also draws one by one. Noise in the choice of cells begins with a hash on the host, which
is no part of a graph."""


@pytest.mark.parametrize(("layout", "way"), COMPILED)
def test_steps_of_a_kind_are_one_graph(layout: str, way: str, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the question to the codes and the cache behind them."""
    grid, changes = (4, {"steps": 12}) if way == "in parallel" else (3, {})  # of 16 cells 8 one by one, then 8 in pairs
    model = small_model(layout=layout, grid=grid)
    expected = drawn(model, way, **changes)
    monkeypatch.setitem(cache.STATIC_ROWS, "cpu", EVERYTHING)
    same_images(drawn(model, way, **changes), expected)
    assert compiled.kinds == compiled.graphs == (2 if way == "in parallel" else 1)
    assert compiled.calls >= 6  # all but the first of each kind, and a first one that has no code before it


@pytest.mark.parametrize("layout", ANY_ORDER)
def test_steps_of_extraction_share_graphs(layout: str, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(layout=layout)
    expected = extracted(model, "guided")
    monkeypatch.setitem(cache.STATIC_ROWS, "cpu", EVERYTHING)
    same_orders(extracted(model, "guided"), expected)
    assert compiled.kinds == compiled.graphs == 1
    assert compiled.calls >= 6


# -- a card --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "way"), MARKED)
def test_a_card_replays_the_cpus_images(layout: str, way: str) -> None:
    """From the same seed, on either device."""
    model = small_model(layout=layout)
    with fake_card() as card:
        images = drawn(on_card(model), way, OnCard)
    assert not card.mixed, "operations on tensors of the CPU and of the card"
    same_images(Generated(*(numbers(each) for each in images)), drawn(model, way))
    assert card.tapes.replays > 0 or way == "several by confidence"


@pytest.mark.parametrize("layout", ANY_ORDER)
def test_steps_on_a_card_wait_for_nothing(layout: str) -> None:
    """Extraction in bfloat16: beyond the first step nobody asks for a result, nothing is copied to the card or from it."""
    model, after = small_model(layout=layout).to(torch.bfloat16), list[Any]()
    with fake_card() as card:
        on = on_card(model)
        card.forget()
        extracted(on, "guided", OnCard, on_step=lambda: after.append(card.syncs.copy()))
    assert after[-1] == after[0] and not card.mixed
    assert card.tapes.replays >= 3
