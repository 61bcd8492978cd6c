"""From a request to the drawings of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served import small_run
from torch import Tensor

from oar_scale.data.manifest import Manifest, ShardInfo, write_manifest
from oar_scale.generation.pretrained import Pretrained
from oar_scale.orders.order_files import run_files
from oar_scale.orders.order_table import OrderTable, read_orders, write_orders
from oar_scale.orders.policies import LateOrder, mean
from oar_scale.serve.limits import Limits
from oar_scale.serve.requests import Settings
from oar_scale.serve.server import ServeRequest, load
from oar_scale.serve.tasks import Planner, begin, usable_orders


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


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_mean_order_is_computed_when_asked_for_and_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server reads no order table at its start, each once at the first request, and leaves the run as it is."""
    files, orders = run_files(small_run(tmp_path)), np.array([[3, 1, 2, 0, 4, 5, 6, 7, 8], [1, 3, 0, 2, 4, 5, 6, 7, 8]], np.uint16)
    assert files.tokens is not None
    shards = tuple(ShardInfo(name=f"{number:05d}.tar", bytes=0, samples=1, crc32c=0) for number in range(2))
    write_manifest(files.tokens, Manifest(shards=shards, grid=3, vocab_size=7, views=("center",)))
    for number, order_N in enumerate(orders):
        table = OrderTable([str(number)], [0], order_N[None], np.zeros((1, 9), np.float32), "m", "s")
        write_orders(f"{files.tables}/{number:05d}.parquet", table)
    before, read = contents(tmp_path), list[str]()

    def counted(uri: str) -> OrderTable:
        read.append(uri)
        return read_orders(uri)

    monkeypatch.setattr(mean, "read_orders", counted)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    drawer = load(ServeRequest(model=str(tmp_path), which=None, host="", port=0, token=None, device="cpu", dtype="fp32", slots=1))
    assert "mean" in usable_orders(drawer) and not read
    task = Planner(drawer, Limits(), ["mean"]).sample(Settings(prompt="a red apple", order="mean"), 2, 0)
    for start in (*begin(drawer, task), *begin(drawer, task)):
        own = start.drawing.order
        assert isinstance(own, Tensor) and own.tolist() == [1, 3, 0, 2, 4, 5, 6, 7, 8]
    assert len(read) == 2 and contents(tmp_path) == before
    Path(read[0]).unlink()
    assert "mean" not in usable_orders(drawer)
