"""How many kernels a GPU is asked to start: docs/results/kernels.md says, and a change of the number is seen in review.

REGENERATE_GOLDEN=1 pytest tests/integration/test_kernel_counts.py      writes the file anew; read the diff
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fake_card import OnCard, fake_card, on_card
from small_models import CONDITIONS, cond_inputs, random_codes, random_orders, small_model

from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, cache
from oar_scale.model.layouts import LAYOUTS
from oar_scale.orders.extraction import extract_orders
from oar_scale.orders.settings import ExtractionSettings

FILE = Path(__file__).resolve().parents[2] / "docs" / "results" / "kernels.md"
IMAGES = 2
HEAD = """# Kernels on a GPU

Operations that a GPU is asked to start, in bfloat16, with a class for condition; views and fresh memory are none. A training pass is
forward and backward, eager, with dropout, for one micro-batch, without the optimizer. A step of exact extraction places one cell; so does
one of generation, with guidance, by confidence or along a given order. The host takes some microseconds to start each: a step whose
kernels are shorter waits for the host. So small steps are recorded and started as one ([static buffers](../model.md)); counted are
those that are not.

Counted by `tests/integration/test_kernel_counts.py` on tensors that only say that they are on a GPU (`tests/fake_card.py`); nothing was
measured. An operation may be more than one kernel of the card. The numbers are of the package's code and of PyTorch's rules for tensors of
another device, in which this machine's processor and its number of threads have no part; another PyTorch may have other rules.
`REGENERATE_GOLDEN=1 pytest tests/integration/test_kernel_counts.py` writes this file.
"""


def made(layout: str, layers: int, dropout: float = 0.0) -> AnyOrderModel:
    model = small_model(layout=layout, layers=layers, grid=2, dropout=dropout, condition=CONDITIONS["class"])
    return model.to(torch.bfloat16)


def order_of(model: AnyOrderModel) -> OnCard:
    orders = random_orders(model, IMAGES)
    return OnCard(orders if model.spec.layout != "raster" else torch.arange(model.spec.cells).expand_as(orders).contiguous())


def training(layout: str, layers: int) -> int:
    model = made(layout, layers, dropout=0.1)
    with fake_card() as card:
        on = on_card(model).train()
        codes, order, labels = OnCard(random_codes(model, IMAGES)), order_of(model), OnCard(cond_inputs(model, IMAGES))
        card.forget()
        on.loss(codes, order, on.condition(labels))[0].backward()
        return card.kernels


def extraction(layout: str, layers: int) -> int:
    model, after = made(layout, layers), list[int]()
    with fake_card() as card, torch.no_grad():
        on = on_card(model)
        condition = on.condition(OnCard(cond_inputs(model, IMAGES)))
        codes = OnCard(random_codes(model, IMAGES))
        extract_orders(on, codes, condition, ExtractionSettings(), on_step=lambda: after.append(card.kernels))
    return alike(after)


def generation(layout: str, layers: int, *, given: bool) -> int:
    model, after = made(layout, layers), list[int]()
    settings = SampleSettings(guidance=2.0, temperature=1.0, top_k=0, order_temperature=0.0)
    with fake_card() as card, torch.no_grad():
        on = on_card(model)
        condition, order = on.condition(OnCard(cond_inputs(model, IMAGES))), order_of(model) if given else None
        on.output.register_forward_hook(lambda *_: after.append(card.kernels))
        generate(on, condition, settings, 0, order)
    return alike(after)


def alike(after: list[int]) -> int:
    """Kernels of a step, from those so far at a point of each; the last has one candidate, and nothing to prepare, and may have fewer."""
    steps = [later - earlier for earlier, later in pairwise(after[:-1])]
    assert len(steps) == 2 and len(set(steps)) == 1, f"steps differ: {steps}"
    return steps[0]


def counted(layout: str, count: Callable[[int], int]) -> str:
    few = 2 if layout == "decoupled" else 1  # it has halves
    once, twice = count(few), count(2 * few)
    pair = (twice - once) * 2 // few
    two = once + (2 - few) * pair // 2
    return f"{two - pair} + {pair} for two layers | {two + 17 * pair:,}"


def the_table() -> str:
    lines = ["| layout | | kernels | XL, 36 layers |", "| --- | --- | --- | --- |"]
    for layout in LAYOUTS:
        ways: dict[str, Callable[[int], int]] = {"training pass": lambda layers, own=layout: training(own, layers)}
        if layout != "raster":
            ways["extraction, a step"] = lambda layers, own=layout: extraction(own, layers)
            ways["generation by confidence, a step"] = lambda layers, own=layout: generation(own, layers, given=False)
        ways["generation along an order, a step"] = lambda layers, own=layout: generation(own, layers, given=True)
        lines += [f"| {layout} | {name} | {counted(layout, count)} |" for name, count in ways.items()]
    return "\n".join(lines) + "\n"


def test_kernels_are_as_many_as_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cache.STATIC_ROWS, "cuda", 0)
    found = f"{HEAD}\n{the_table()}"
    if os.environ.get("REGENERATE_GOLDEN"):
        FILE.write_text(found)
    how = "REGENERATE_GOLDEN=1 pytest tests/integration/test_kernel_counts.py"
    assert found == FILE.read_text(), f"other numbers of kernels than {FILE.name} has, by this code or this torch. If that is wanted: {how}"
