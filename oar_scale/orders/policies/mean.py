"""The mean order of the data set: cells by their mean placing time in the extracted orders, ties in raster order.

It is computed once, from all order tables, and kept beside them (in memory, where nothing is to be written).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.data.manifest import ShardInfo, read_manifest
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.orders.analysis import placing_times
from oar_scale.orders.order_files import OrderFiles, is_order
from oar_scale.orders.order_table import read_orders, table_name
from oar_scale.orders.policies import OrderRequest, Policy, TrainingOrders
from oar_scale.storage import Missing, join, open_storage, read_json, write_json


class MeanPolicy(Policy):
    """One order for all images: the mean of the extracted ones."""

    def training(self, files: OrderFiles, grid: int) -> TrainingOrders:
        """The mean order, computed from the order tables where it is not stored yet."""
        return TrainingOrders(order=tuple(mean_order(files, grid).tolist()))

    def sampling(self, request: OrderRequest) -> Tensor:
        """The mean order for every image. Raises UserError as :func:`mean_order`."""
        order_N = torch.from_numpy(mean_order(request.files, request.model.spec.grid))
        return order_N.expand(request.images, -1).to(request.device)

    def check_sampling(self, request: OrderRequest) -> None:
        """By the names of the tables: none is read. Raises UserError where the order, or a table for it, is not there."""
        files = request.files
        if open_storage(files.mean).exists(files.mean):
            mean_order(files, request.model.spec.grid)
            return
        tables, shards = _sources(files)
        there = set(open_storage(tables).list(tables))
        for shard in shards:
            if (uri := join(tables, table_name(shard.name))) not in there:
                raise _missing(uri)


def mean_order(files: OrderFiles, grid: int) -> NDArray[np.int64]:
    """The mean order [N]: read, or computed from the order tables and kept.

    Raises:
        UserError: orders of another grid or of several models, or an image without one.
    """
    try:
        stored = read_json(files.mean)
    except Missing:
        if files.read_only:
            stored = _in_memory(files)
        else:
            stored = _from_tables(files)
            write_json(files.mean, stored)
    order = stored.get("order")
    if not is_order(order, grid):
        raise UserError(f"{files.mean}: not an order of {grid} x {grid} cells. Delete it; it is made again from the order tables.")
    return np.array(order, dtype=np.int64)


def order_by_time(time_N: NDArray[np.floating]) -> NDArray[np.int64]:
    """Cells by placing time, ties in raster order."""
    return np.argsort(time_N, kind="stable")


def _sources(files: OrderFiles) -> tuple[str, Sequence[ShardInfo]]:
    """The folder of the order tables, and the token shards that have one each."""
    if files.tables is None or files.tokens is None:
        raise UserError(f"{files.where}: there is no mean order here ({files.mean}). A run's export has one if sample.order is mean.")
    return files.tables, read_manifest(files.tokens).shards


def _missing(uri: str) -> UserError:
    return UserError(f"{uri}: missing, and the mean order needs the orders of all images. Run the stage extract.")


def _from_tables(files: OrderFiles) -> JsonObject:
    tables, shards = _sources(files)
    total_N, images, made_by = np.zeros(0), 0, set[tuple[str, str]]()
    for shard in shards:
        try:
            table = read_orders(join(tables, table_name(shard.name)))
        except Missing as error:
            raise _missing(error.uri) from error
        made_by.add((table.model_id, table.settings_id))
        total_N = placing_times(table.order_SN).sum(axis=0) + (total_N if images else 0)
        images += len(table.keys)
    if len(made_by) != 1:
        raise UserError(f"{tables}: orders of several models or settings: {sorted(made_by)}. Extract them again.")
    ((model_id, settings_id),) = made_by
    return {
        "order": order_by_time(total_N / images).tolist(),
        "images": images,
        "model_id": model_id,
        "settings_id": settings_id,
    }


_in_memory = lru_cache(maxsize=1)(_from_tables)

POLICY = MeanPolicy(__name__)
