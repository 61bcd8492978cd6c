"""An image does not depend on the batch that it is drawn in: not on its place, and not on how far the others are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from small_models import cond_inputs, random_codes, random_orders, small_model
from torch import Tensor

from oar_scale.generation import sampling
from oar_scale.generation.continuous import ContinuousBatch, Drawing
from oar_scale.generation.sampling import Generated, Known, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, Decoder
from oar_scale.orders.order_files import folder_files
from oar_scale.orders.policies import LateOrder, OrderRequest, policy
from oar_scale.orders.step_sizes import cells_per_step


def choices(**changes: Any) -> SampleSettings:
    return SampleSettings(**{"guidance": 1.0, "temperature": 1.0, "top_k": 0, "order_temperature": 0.0, **changes})


def assert_row(drawn: Generated, row: int, alone: Generated) -> None:
    for name, ours, theirs in zip(drawn._fields, drawn, alone, strict=True):
        if name == "score_BN":
            torch.testing.assert_close(ours[row], theirs[0], rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(ours[row], theirs[0]), name


ORDERS = ["chosen", "given", "late"]
WAYS: list[dict[str, Any]] = [
    {"guidance": 2.0, "guidance_schedule": "linear", "order_temperature": 1.0},
    {"guidance": 2.0, "guidance_schedule": "cosine", "steps": 5},
    {"guidance": 2.0, "draft": 3},
    {"guidance": 2.0, "score": "sampled", "steps": 5},
    {"layout": "decoupled", "guidance": 2.0, "steps": 5},
    {"layout": "grouped", "guidance": 2.0, "steps": 5},
    {"layout": "dual", "draft": 3},
    {"layout": "decoupled", "guidance": 2.0, "draft": 3},
    {},
]


def order_of(kind: str, model: AnyOrderModel, images: int) -> Tensor | LateOrder | None:
    if kind == "late":
        first = torch.tensor([[2, 7]]).expand(images, -1)
        return LateOrder(first, lambda rows_BRD, cells_BR: cells_BR.gather(1, rows_BRD[..., 0].argsort(1)))
    return random_orders(model, images, 3) if kind == "given" else None


def one_image(order: Tensor | LateOrder | None, row: int) -> Tensor | LateOrder | None:
    part = slice(row, row + 1)
    return order._replace(first_BK=order.first_BK[part]) if isinstance(order, LateOrder) else None if order is None else order[part]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", ORDERS)
def test_an_image_is_drawn_as_if_it_were_alone(kind: str, way: dict[str, Any]) -> None:
    """Images with none, some and all cells known, in one batch and one by one, at other places of the batch."""
    layout = way.get("layout", "instructed")
    way = {name: value for name, value in way.items() if name != "layout"}
    model = small_model(seed=2, layout=layout)
    counts, images = [4, 0, 9, 4, 2, 0], np.array([3, 0, 11, 5, 2, 9])
    condition, codes = model.condition(cond_inputs(model, 6)), random_codes(model, 6)
    order = order_of(kind, model, 6)
    cells = random_orders(model, 6, 8).masked_fill(torch.arange(9) >= torch.tensor(counts)[:, None], -1)
    known = Known(cells, codes.gather(1, cells.clamp_min(0)))
    drawn = generate(model, condition, choices(**way), 17, order, known, images)
    for row, count in enumerate(counts):
        own = Known(*(each[row : row + 1, :count] for each in known))
        alone = generate(model, condition[row : row + 1], choices(**way), 17, one_image(order, row), own, images[row : row + 1])
        assert_row(drawn, row, alone)
        assert torch.equal(drawn.order_BN[row, :count], cells[row, :count])
        assert torch.equal(drawn.codes_BN[row].gather(0, cells[row, :count]), own.codes_BK[0])


@torch.no_grad()
@pytest.mark.parametrize("way", [{"guidance": 2.0}, {"draft": 3}], ids=str)
@pytest.mark.parametrize("kind", ORDERS)
def test_many_images_are_drawn_in_parts(kind: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No more images at once than the memory of the cache allows, and they are those of one batch."""
    model = small_model(grid=4, seed=2)
    condition, order = model.condition(cond_inputs(model, 5)), order_of(kind, model, 5)
    cells = random_orders(model, 5, 8).masked_fill(torch.arange(16) >= torch.tensor([2, 0, 5, 2, 16])[:, None], -1)
    known = Known(cells, random_codes(model, 5).gather(1, cells.clamp_min(0)))
    whole = generate(model, condition, choices(**way), 17, order, known)
    batches: list[int] = []
    memory = Decoder.memory

    def noted(self: Decoder, first: Tensor, images: int, spare: int = 0) -> Tensor:
        batches.append(images)
        return memory(self, first, images, spare)

    monkeypatch.setattr(Decoder, "memory", noted)
    branches = 2 if "guidance" in way else 1
    monkeypatch.setitem(sampling.CACHE_BYTES, "cpu", 2 * branches * Decoder(model).image_bytes(condition))
    parts = generate(model, condition, choices(**way), 17, order, known)
    assert max(batches) == 2 * branches
    for row in range(5):
        assert_row(parts, row, Generated(*(each[row : row + 1] for each in whole)))


def test_random_orders_are_those_of_the_image() -> None:
    model = small_model(grid=4)
    together, alone = (
        policy("random").sampling(OrderRequest(model, torch.tensor(images), 3, folder_files("nowhere"), "")) for images in ([1, 4, 2], [2])
    )
    assert isinstance(together, Tensor)
    assert isinstance(alone, Tensor)
    assert torch.equal(together[2], alone[0])
    assert torch.equal(together.sort(1).values, torch.arange(16).expand(3, -1))
    assert len({tuple(each) for each in together.tolist()}) == 3


@torch.no_grad()
@pytest.mark.parametrize("layout", ["instructed", "dual", "decoupled", "grouped"])
def test_several_cells_a_step_are_the_most_confident_ones(layout: str) -> None:
    """Without a given order, a pass places the cells with the largest probabilities that it has found."""
    model = small_model(grid=4, layout=layout)
    condition = model.condition(cond_inputs(model, 2))
    drawn = generate(model, condition, choices(top_k=1, steps=4), 0)
    sizes = cells_per_step(16, 4)
    assert drawn.passes_B.tolist() == [len(sizes)] * 2
    placed = 0
    for size in sizes:
        decoder, cells = Decoder(model), drawn.order_BN[:, :placed]
        prefix = decoder.prefill(decoder.begin(condition), cells, drawn.codes_BN.gather(1, cells))
        empty = torch.stack([torch.tensor([c for c in range(16) if c not in row]) for row in cells.tolist()])
        logits = decoder.candidate_rows(prefix, empty).logits_BRV
        best = logits.log_softmax(-1).amax(-1).topk(size, dim=1).indices
        assert torch.equal(empty.gather(1, best), drawn.order_BN[:, placed : placed + size])
        codes = logits.argmax(-1).gather(1, best)
        assert torch.equal(codes, drawn.codes_BN.gather(1, drawn.order_BN[:, placed : placed + size]))
        placed += size


PARALLEL = ("instructed", "decoupled", "grouped")
"""Layouts that ask for several cells of an order at once."""


@contextmanager
def counted_passes(model: AnyOrderModel) -> Iterator[list[str]]:
    """What goes through the trunk: ``enter`` (rows that stay in the cache) and ``ask`` (candidates)."""
    passes, layout = list[str](), model.layout
    enter, ask = layout.enter, layout.ask

    def entered(*arguments: Any) -> Tensor:
        passes.append("enter")
        return enter(*arguments)

    def asked(*arguments: Any) -> Tensor:
        passes.append("ask")
        return ask(*arguments)

    layout.enter, layout.ask = entered, asked  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del layout.enter, layout.ask


@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "ordered"),
    [*((layout, False) for layout in ("instructed", "dual", "decoupled", "grouped")), *((layout, True) for layout in PARALLEL)],
)
def test_an_image_in_one_step_is_one_pass_behind_its_condition(layout: str, ordered: bool) -> None:
    """Also of images of which different numbers of cells are known: there a pass for each number; and where they arrive one by one."""
    model = small_model(grid=4, layout=layout)
    condition, order = model.condition(cond_inputs(model, 3)), random_orders(model, 3) if ordered else None
    asks = "enter" if ordered and layout != "decoupled" else "ask"
    with counted_passes(model) as passes:
        drawn = generate(model, condition, choices(guidance=2.0, steps=1), 0, order)
    assert drawn.passes_B.tolist() == [1, 1, 1] and passes == ["enter", asks]
    cells = random_orders(model, 3, 7)[:, :4].clone()
    cells[0, 1:] = -1
    known = Known(cells, random_codes(model, 3, 7)[:, :4])
    with counted_passes(model) as passes:
        drawn = generate(model, condition, choices(steps=1), 0, order, known)
    assert drawn.passes_B.tolist() == [1, 1, 1] and passes.count("ask") + passes.count("enter") <= 1 + 2 * 3
    assert passes[-1] == asks, "nothing enters the cache behind the last cells"
    batch = ContinuousBatch(model, 2)
    batch.add(
        Drawing(condition_TD=condition[0], settings=choices(guidance=2.0, steps=1), seed=0, order=None if order is None else order[0])
    )
    with counted_passes(model) as passes:
        (progress,) = batch.step()
    assert progress.done is not None and not batch.busy and passes == ["enter", asks]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["instructed", "dual", "decoupled", "grouped"])
def test_the_last_step_by_confidence_lets_nothing_enter_the_cache(layout: str) -> None:
    model = small_model(grid=4, layout=layout)
    with counted_passes(model) as passes:
        drawn = generate(model, model.condition(cond_inputs(model, 2)), choices(steps=4), 0)
    assert drawn.passes_B.tolist() == [4, 4] and passes[-1] == "ask" and passes.count("ask") == 4


def test_a_damaged_model_is_named() -> None:
    model = small_model()
    with torch.no_grad():
        model.output.weight.fill_(torch.nan)
    for order in (None, torch.arange(9)[None]):
        with pytest.raises(ArithmeticError, match="not numbers"):
            generate(model, model.null_condition(1), choices(), 0, order)
