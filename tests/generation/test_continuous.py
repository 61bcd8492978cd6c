"""Drawings that join and leave a running batch are those of ``generate``, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import CONDITIONS, cond_inputs, random_codes, random_orders, small_model

import oar_scale
from oar_scale.generation.continuous import ContinuousBatch, Drawing
from oar_scale.generation.drawing import draw_most_confident
from oar_scale.generation.sampling import Generated, Known, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel
from oar_scale.model.transformer import CodeHead
from oar_scale.orders.policies import LateOrder
from oar_scale.orders.selection import CounterRNG


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
    "by drawn codes": {"guidance": 2.0, "score": "sampled", "order_temperature": 0.3, "top_p": 0.9},
    "several by drawn codes": {"steps": 5, "score": "sampled"},
    "by entropy": {"score": "neg_entropy"},
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


MODELS: list[dict[str, Any]] = [
    {"layout": "raster", "condition": CONDITIONS["class"]},
    {"layout": "instructed"},
    {"layout": "dual", "condition": CONDITIONS["features"]},
    {"layout": "decoupled", "condition": CONDITIONS["class"]},  # all cells of an empty image are alike
    {"layout": "decoupled", "step_attention": "mutual"},
    {"layout": "grouped"},
]


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: " ".join(str(each) for each in (spec["layout"], *list(spec)[1:])))
def test_drawings_of_all_kinds_are_those_of_generate(spec: dict[str, Any]) -> None:
    """They arrive and are removed at random steps; each step's cells and codes are those of the image it ends with."""
    model, layout = small_model(grid=4, seed=2, **spec), spec["layout"]
    random, batch, kinds = np.random.default_rng(3), ContinuousBatch(model, 4), kinds_of(layout)
    waiting = [drawing_of(model, kinds[number % len(kinds)], number, known=int(random.choice([0, 0, 3, 9, 16]))) for number in range(10)]
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
        assert batch.free == 4 - len(running)
    assert done >= 8


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


def finished(batch: ContinuousBatch, drawings: list[Drawing], between: int = 0) -> list[Generated]:
    """Draw some, one added every so many steps."""
    done, ids, step = dict[int, Generated](), list[int](), 0
    while batch.busy or len(ids) < len(drawings):
        while len(ids) < len(drawings) and batch.free and step >= between * len(ids):
            ids.append(batch.add(drawings[len(ids)]))
        done |= {progress.id: progress.done for progress in batch.step() if progress.done is not None}
        step += 1
    return [done[id] for id in ids]


@pytest.mark.parametrize("between", [0, 2])
@pytest.mark.parametrize("kind", ["guided by confidence", "by drawn codes", "along an order", "in parallel"])
@pytest.mark.parametrize("layout", ["instructed", "grouped"])
def test_drawings_of_one_kind_are_those_of_generate(layout: str, kind: str, between: int) -> None:
    """Together they are one run; at different lengths those along an order are one attention by masks, fewer heads of keys or not."""
    model = small_model(layout=layout, kv_heads=1)
    drawings = [drawing_of(model, kind, number) for number in range(3)]
    for drawing, drawn in zip(drawings, finished(ContinuousBatch(model, 3), drawings, between), strict=True):
        assert_same(drawn, alone(model, drawing))


def test_the_shipped_model_draws_the_images_of_generate() -> None:
    emoji = oar_scale.load("recipes/weights/emoji")
    condition = torch.stack([emoji.model.null_condition(1)[0], *small_conditions(emoji.model)]).detach()
    settings = choices(guidance=2.0, steps=10)
    drawings = [Drawing(condition_TD=each, settings=settings, seed=1, number=number) for number, each in enumerate(condition)]
    for drawing, drawn in zip(drawings, finished(ContinuousBatch(emoji.model, 3), drawings, 2), strict=True):
        assert_same(drawn, alone(emoji.model, drawing))


def small_conditions(model: AnyOrderModel) -> torch.Tensor:
    with torch.no_grad():
        return model.condition(cond_inputs(model, 2))


def test_seed_and_number_alone_make_the_noise() -> None:
    """Seeds and numbers beyond 32 and 63 bits included; drafts change nothing but the passes that generate takes."""
    model = small_model(grid=4)
    first = drawing_of(model, "guided by confidence", 1)
    along = drawing_of(model, "along an order", 2)
    drawings = [
        *(replace(first, seed=seed, number=number) for seed, number in [(2**64 - 1, 0), (5, 3 << 32), (5, 3)]),
        replace(along, settings=replace(along.settings, draft=4)),
    ]
    drawn = finished(ContinuousBatch(model, 4), drawings)
    for one, drawing in zip(drawn, drawings, strict=True):
        assert_same(one, alone(model, replace(drawing, settings=replace(drawing.settings, draft=0))))
    assert len({tuple(each.codes_BN[0].tolist()) for each in drawn}) == 4


def wrong(model: AnyOrderModel, layout: str, **changes: Any) -> Drawing:
    drawing = drawing_of(model, "along an order" if layout == "raster" else "by confidence", 0)
    chosen = {name: changes.pop(name) for name in ("steps", "draft") if name in changes}
    return replace(drawing, settings=replace(drawing.settings, **chosen), **changes)


REVERSED = torch.arange(9).flip(0)
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "no permutation": ("instructed", {"order": torch.zeros(9, dtype=torch.long)}),
    "a short order": ("instructed", {"order": torch.arange(8)}),
    "a cell known twice": ("instructed", {"known": (torch.tensor([1, 1]), torch.tensor([0, 0]))}),
    "a cell outside": ("instructed", {"known": (torch.tensor([9]), torch.tensor([0]))}),
    "a code outside": ("instructed", {"known": (torch.tensor([1]), torch.tensor([7]))}),
    "cells without codes": ("instructed", {"known": (torch.tensor([1, 2]), torch.tensor([0]))}),
    "raster by confidence": ("raster", {"order": None}),
    "raster in another order": ("raster", {"order": REVERSED}),
    "raster behind another cell": ("raster", {"known": (torch.tensor([3]), torch.tensor([0]))}),
    "raster with drafts": ("raster", {"draft": 2}),
    "raster in parallel": ("raster", {"steps": 3}),
    "dual in parallel": ("dual", {"steps": 3, "order": REVERSED}),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_generate_refuses_is_refused(case: str) -> None:
    """When it is added, in the same words; the batch goes on as it was."""
    layout, changes = WRONG[case]
    model = small_model(layout=layout)
    batch, right = ContinuousBatch(model, 2), wrong(model, layout)
    batch.add(right)
    with pytest.raises(ValueError) as ours:
        batch.add(wrong(model, layout, **changes))
    with pytest.raises(ValueError) as theirs:
        alone(model, wrong(model, layout, **changes))
    assert str(ours.value) == str(theirs.value)
    assert batch.free == 1
    assert_same(finished(batch, [right])[0], alone(model, right))


def test_other_wrong_arguments_are_refused() -> None:
    model = small_model()
    batch, right = ContinuousBatch(model, 1), drawing_of(model, "in a late order", 0)
    for first in ([[2, 2]], [[9]], [[1], [2]]):
        with pytest.raises(ValueError, match="a late order's first cells"):
            batch.add(replace(right, order=late_order()._replace(first_BK=torch.tensor(first))))
    with pytest.raises(ValueError, match=r"condition_TD \[3, 32\] must be \[4, 32\]"):
        batch.add(replace(right, condition_TD=right.condition_TD[:3]))
    with pytest.raises(ValueError, match="slots 0"):
        ContinuousBatch(model, 0)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        batch.add(right)
    with pytest.raises(ValueError, match="training mode"):
        ContinuousBatch(model, 1)


@pytest.mark.parametrize("kind", ["by confidence", "along an order", "in a late order"])
def test_a_drawing_that_is_not_a_number_fails_alone(kind: str) -> None:
    """It says so in its first step; what it left in its slot is seen by none of those that are drawn there, and by masks, later."""
    model = small_model(grid=4)
    batch, drawings = ContinuousBatch(model, 3), [drawing_of(model, kind, number) for number in range(4)]
    damaged = replace(drawing_of(model, "by confidence", 1), condition_TD=torch.full_like(drawings[1].condition_TD, torch.nan))
    ids = [batch.add(each) for each in (drawings[0], damaged, drawings[2])]
    failed = {progress.id: progress.failed for progress in batch.step()}
    assert isinstance(failed.pop(ids[1]), ArithmeticError)
    assert set(failed.values()) == {None}
    assert batch.free == 1
    ids.append(batch.add(drawings[3]))
    done = dict[int, Generated]()
    while batch.busy:
        for progress in batch.step():
            assert progress.failed is None
            done |= {progress.id: progress.done} if progress.done is not None else {}
    for id, drawing in zip([ids[0], *ids[2:]], [drawings[0], *drawings[2:]], strict=True):
        assert_same(done[id], alone(model, drawing))


def test_a_cell_that_is_not_a_number_is_not_passed_over() -> None:
    """Whoever chooses among scores of which one is NaN says so, though the chosen one is a number."""
    head, settings = CodeHead(4, 5), choices()
    torch.nn.init.normal_(head.weight)
    rows, cells = torch.randn(2, 3, 4), torch.arange(3).expand(2, -1)
    rows[1, 2] = torch.nan
    rng = CounterRNG.of(0, np.arange(2), 0, 9, torch.device("cpu"))
    with torch.no_grad():
        drawn = draw_most_confident(head, rows, cells, 1, settings, rng, 0)
    assert drawn.score_BM.isnan().flatten().tolist() == [False, True]


def test_a_step_that_raises_leaves_all_as_they_were() -> None:
    model = small_model(grid=4)
    calls = list[int]()

    def rest(rows_BRD: torch.Tensor, cells_BR: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) <= 2:
            raise RuntimeError("not now")
        return late_order().rest(rows_BRD, cells_BR)

    late = replace(drawing_of(model, "in a late order", 0), order=late_order()._replace(rest=rest))
    drawings = [late, *(drawing_of(model, kind, number) for number, kind in enumerate(kinds_of("instructed"), 1))]
    batch, done = ContinuousBatch(model, len(drawings)), dict[int, Generated]()
    ids = [batch.add(each) for each in drawings]
    while batch.busy:
        try:
            done |= {progress.id: progress.done for progress in batch.step() if progress.done is not None}
        except RuntimeError as error:
            assert str(error) == "not now"
    assert len(calls) == 3
    for id, drawing in zip(ids, [drawing_of(model, "in a late order", 0), *drawings[1:]], strict=True):
        assert_same(done[id], alone(model, drawing))


def test_its_memory_is_allotted_once() -> None:
    """Keys and values of all rows of an image, with its caption and without, in each slot."""
    model = small_model(kv_heads=1)
    batch = ContinuousBatch(model, 3)
    rows = model.spec.condition.rows + 2 * model.spec.cells
    assert batch.memory_bytes == 3 * 2 * model.spec.layers * 2 * rows * model.spec.head_dim * 4
    finished(batch, [drawing_of(model, "guided along an order", number) for number in range(4)])
    assert batch.memory_bytes == 3 * 2 * model.spec.layers * 2 * rows * model.spec.head_dim * 4
