"""From a request to the drawings of its images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oar_scale.generation.pretrained import Pretrained
from oar_scale.orders.policies import LateOrder
from oar_scale.serve.limits import Limits
from oar_scale.serve.requests import Settings
from oar_scale.serve.tasks import Planner, begin


@pytest.mark.parametrize("late", [False, True])
def test_a_job_asks_once_for_the_orders_of_its_images(drawer: Pretrained, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """A policy may read large files for them; each image has the order that it would have alone."""
    task = Planner(drawer, Limits(), ["random"]).sample(Settings(prompt="a red apple", order="random", seed=4), 3, 0)
    alone, asked, orders = [drawer.orders("random", np.array([number]), 4) for number in range(3)], list[int](), drawer.orders

    def counted(order: Any, images_B: Any, *options: Any) -> Tensor | LateOrder | None:
        asked.append(len(images_B))
        found = orders(order, images_B, *options)
        assert isinstance(found, Tensor)
        return LateOrder(found[:, :2], lambda rows_BRD, cells_BR: cells_BR) if late else found

    monkeypatch.setattr(drawer, "orders", counted)
    starts = begin(drawer, task)
    assert asked == [3]
    for start, order in zip(starts, alone, strict=True):
        own = start.drawing.order
        assert isinstance(order, Tensor)
        if late:
            assert isinstance(own, LateOrder) and torch.equal(own.first_BK, order[:, :2])
        else:
            assert isinstance(own, Tensor) and torch.equal(own, order[0])
