"""Drawings that join and leave a running batch are those of ``generate``, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_models import cond_inputs, random_codes, random_orders, small_model

from oar_scale.generation.continuous import ContinuousBatch, Drawing
from oar_scale.generation.sampling import Generated, Known, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel
from oar_scale.orders.policies import LateOrder


def choices(**changes: Any) -> SampleSettings:
    return SampleSettings(**{"guidance": 1.0, "temperature": 1.0, "top_k": 0, "order_temperature": 0.0, **changes})


def late_order() -> LateOrder:
    return LateOrder(torch.tensor([[2, 7]]), lambda rows_BRD, cells_BR: cells_BR.gather(1, rows_BRD[..., 0].argsort(1)))


def alone(model: AnyOrderModel, drawing: Drawing) -> Generated:
    """The drawing by ``generate``."""
    order, known = drawing.order, drawing.known
    return generate(
        model,
        drawing.condition_TD[None],
        drawing.settings,
        drawing.seed,
        order[None] if isinstance(order, torch.Tensor) else order,
        None if known is None else Known(known[0][None], known[1][None]),
        np.array([drawing.number]),
    )


def assert_same(drawn: Generated, expected: Generated) -> None:
    for name, ours, theirs in zip(drawn._fields, drawn, expected, strict=True):
        if name == "score_BN":
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(ours, theirs), name


KINDS: dict[str, dict[str, Any]] = {
    "by confidence": {},
    "guided by confidence": {"guidance": 2.0, "guidance_schedule": "linear", "order_temperature": 1.0, "top_p": 0.9},
    "several by confidence": {"guidance": 2.0, "steps": 5},
    "along an order": {"order": "given", "temperature": 0.8, "top_k": 4},
    "guided along an order": {"order": "given", "guidance": 3.0, "guidance_schedule": "cosine", "guidance_start": 0.5, "min_p": 0.02},
    "in parallel": {"order": "given", "steps": 5, "guidance": 1.5},
    "in a late order": {"order": "late", "guidance": 2.0},
}


def kinds_of(layout: str) -> list[str]:
    if layout == "raster":
        return ["along an order", "guided along an order"]
    return [kind for kind in KINDS if kind != "in parallel" or layout != "dual"]  # whose rows ask for one cell


def drawing_of(model: AnyOrderModel, kind: str, number: int, known: int = 0) -> Drawing:
    """A drawing of a kind; condition, order and known cells follow from its number."""
    wanted, cells, known_cells = dict(KINDS[kind]), model.spec.cells, None
    order: torch.Tensor | LateOrder | None = None
    match wanted.pop("order", None):
        case "given":
            order = torch.arange(cells) if model.spec.layout == "raster" else random_orders(model, 1, number)[0]
        case "late":
            order = late_order()
    if known:
        at_K = torch.arange(known) if model.spec.layout == "raster" else random_orders(model, 1, number + 1)[0, :known]
        known_cells = at_K, random_codes(model, 1, number)[0, at_K]
    with torch.no_grad():
        condition_TD = model.condition(cond_inputs(model, 1, number))[0]
    return Drawing(condition_TD=condition_TD, settings=choices(**wanted), seed=number % 3, number=number, order=order, known=known_cells)


@pytest.mark.parametrize("layout", ["raster", "instructed", "dual", "decoupled", "grouped"])
def test_drawings_of_all_kinds_are_those_of_generate(layout: str) -> None:
    """They arrive and are removed at random steps; each step's cells and codes are those of the image it ends with."""
    model = small_model(grid=4, seed=2, layout=layout)
    random, batch, kinds = np.random.default_rng(3), ContinuousBatch(model, 5), kinds_of(layout)
    waiting = [drawing_of(model, kinds[number % len(kinds)], number, known=int(random.choice([0, 0, 3, 9, 16]))) for number in range(14)]
    running, placed, done = dict[int, Drawing](), dict[int, list[tuple[int, int]]](), 0
    while waiting or batch.busy:
        while waiting and batch.free and random.random() < 0.4:
            drawing = waiting.pop()
            running[batch.add(drawing)] = drawing
        if running and random.random() < 0.03:
            removed, _ = running.popitem()
            batch.remove(removed)
        for progress in batch.step():
            placed.setdefault(progress.id, []).extend(zip(progress.cells, progress.codes, strict=True))
            if progress.done is not None:
                drawing = running.pop(progress.id)
                assert_same(progress.done, alone(model, drawing))
                image, known = progress.done, 0 if drawing.known is None else len(drawing.known[0])
                cells = image.order_BN[0, known:].tolist()
                assert placed.get(progress.id, []) == [(cell, int(image.codes_BN[0, cell])) for cell in cells]
                done += 1
        assert batch.free == 5 - len(running)
    assert done >= 10


def test_a_full_batch_says_so() -> None:
    model = small_model()
    batch, drawing = ContinuousBatch(model, 1), drawing_of(model, "by confidence", 0)
    number = batch.add(drawing)
    with pytest.raises(RuntimeError, match="all 1 slots are taken"):
        batch.add(drawing)
    batch.remove(number)
    assert batch.free == 1
    assert batch.add(drawing) != number
    with pytest.raises(KeyError):
        batch.remove(number)
