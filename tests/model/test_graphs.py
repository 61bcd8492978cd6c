"""What torch.compile sees of the model: a training pass is one graph, and nothing in it looks at numbers.

A backend that compiles nothing counts, so no C++ compiler runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import CONDITIONS, cond_inputs, random_codes, random_orders, small_model
from torch import Tensor
from torch.fx import GraphModule

from oar_scale.config.schema import ParallelConfig
from oar_scale.model import AnyOrderModel, Decoder, Prefix
from oar_scale.model.acceleration import accelerate
from oar_scale.model.layouts import LAYOUTS
from oar_scale.orders.step_sizes import cells_per_step

IMAGES = 2


class Graphs:
    """How many graphs were made, as a backend of torch.compile."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: GraphModule, _example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def made(layout: str, condition: str = "class", **changes: Any) -> tuple[AnyOrderModel, Tensor, Tensor, Tensor]:
    """A model, codes, orders that its layout takes, inputs of its condition."""
    model = small_model(layout=layout, condition=CONDITIONS[condition], **changes)
    order = random_orders(model, IMAGES)
    if layout == "raster":
        order = torch.arange(model.spec.cells).repeat(IMAGES, 1)
    return model, random_codes(model, IMAGES), order, cond_inputs(model, IMAGES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_pass_is_one_graph(graphs: Graphs, layout: str) -> None:
    """Condition, trunk and loss, whole: anything that breaks the graph is an error here."""
    model, codes, order, inputs = made(layout, dropout=0.1)

    def loss(codes: Tensor, order: Tensor, inputs: Tensor) -> Tensor:
        return model.loss(codes, order, model.condition(inputs))[0]

    torch.compile(loss, backend=graphs, fullgraph=True)(codes, order, inputs)
    assert graphs.count == 1


def test_steps_of_any_grouping_share_the_graphs_of_blocks(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each grouping is another number of rows; at Dynamo's limit of eight graphs blocks would run eagerly without a word."""
    model, codes, order, inputs = made("grouped", dropout=0.1, grid=8)
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend=graphs))
    accelerate(model.train(), ParallelConfig(compile=True))
    after = []
    for steps in (64, 32, 24, 20, 16, 12, 10, 8, 6, 4, 64):
        model.loss(codes, order, model.condition(inputs), cells_per_step(64, steps))
        after.append(graphs.count)
    assert after[1:] == [after[1]] * 10 and after[1] <= 4, after


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_is_one_graph(graphs: Graphs, condition: str) -> None:
    """With dropped captions."""
    model, _, _, inputs = made("instructed", condition)
    torch.compile(model.condition, backend=graphs, fullgraph=True)(inputs, torch.tensor([True, False]))
    assert graphs.count == 1


def test_a_raster_model_still_refuses_other_orders() -> None:
    model, codes, order, inputs = made("raster")
    with pytest.raises(ValueError, match="in raster order only"):
        model.loss(codes, order.flip(1), model.condition(inputs))


def test_all_steps_of_decoding_share_one_graph(graphs: Graphs) -> None:
    model, codes, order, inputs = made("instructed", layers=1)
    decoder = Decoder(model)
    with torch.no_grad():
        prefix = decoder.begin(model.condition(inputs)).on_static_buffers()

        def step(prefix: Prefix, cell_B1: Tensor, code_B: Tensor) -> Prefix:
            candidates = decoder.candidate_rows(prefix, cell_B1)
            return decoder.commit(prefix, candidates, torch.zeros_like(code_B), code_B)

        compiled = torch.compile(step, backend=graphs, fullgraph=True)
        for place in range(3):
            cell_B1 = order[:, place : place + 1]
            prefix = compiled(prefix, cell_B1, codes.gather(1, cell_B1)[:, 0])
    assert graphs.count <= 2  # the first step has no code before it
