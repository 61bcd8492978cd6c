"""Few orders instead of many: K orders of the training set, of which each image follows the nearest.

    chosen     images are drawn one after the other, by a hash of seed and key, until their (first) orders are K different ones
    nearest    the chosen order with the fewest pairs of cells the other way round (Kendall); of several, the one that was drawn first

The chosen ones are orders that a model has found, and no means of some. Images that were drawn keep their own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oar_scale.data.hashing import hash_keys, name_keys
from oar_scale.data.manifest import read_manifest
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.orders.order_files import OrderFiles, is_order
from oar_scale.orders.order_table import read_orders, table_name
from oar_scale.storage import Missing, join, read_json, write_json

Orders = NDArray[np.uint16]
_SIGNS_AT_ONCE = 2**24


def distinct_orders(files: OrderFiles, count: int, seed: int, grid: int) -> Orders:
    """``count`` orders [K, N] of the training set: read, or drawn from the order tables and written.

    Raises:
        UserError: an image without an order, fewer different orders than are wanted, or a damaged file.
    """
    assert files.distinct is not None
    uri = join(files.distinct, f"{count}-{seed}.json")
    try:
        stored = read_json(uri)
    except Missing:
        stored = _draw(files, count, seed)
        write_json(uri, stored)
    orders = stored.get("orders")
    if not isinstance(orders, list) or len(orders) != count or not all(is_order(order, grid) for order in orders):
        raise UserError(f"{uri}: not {count} orders of {grid} x {grid} cells. Delete it; it is made again from the order tables.")
    return np.array(orders, dtype=np.uint16)


def nearest_orders(order_SN: Orders, chosen_KN: Orders) -> NDArray[np.int64]:
    """Which of K orders is nearest to each of S orders by Kendall's distance, [S]; of several the first one."""
    cells = order_SN.shape[1]
    pairs = np.triu_indices(cells, k=1)
    chosen_KP = _signs(chosen_KN, pairs)
    at_once = max(1, _SIGNS_AT_ONCE // max(1, len(pairs[0])))
    parts = [order_SN[start : start + at_once] for start in range(0, len(order_SN), at_once)]
    # The sum of products of signs is the number of pairs that two orders place alike, less that of the others: exact in float32.
    nearest = [(_signs(part, pairs) @ chosen_KP.T).argmax(axis=1) for part in parts]
    return np.concatenate(nearest) if nearest else np.zeros(0, dtype=np.int64)


def _signs(order_SN: Orders, pairs: tuple[NDArray[np.intp], NDArray[np.intp]]) -> NDArray[np.float32]:
    """For each pair of cells [S, P]: 1 where the first one is placed earlier, else -1."""
    time_SN = np.argsort(order_SN, axis=1)
    return np.where(time_SN[:, pairs[0]] < time_SN[:, pairs[1]], np.float32(1), np.float32(-1))


def _draw(files: OrderFiles, count: int, seed: int) -> JsonObject:
    assert files.tables is not None and files.tokens is not None
    rank_of: dict[bytes, int] = {}
    """Of the orders whose images come first so far: the rank of the first image of each, which is a hash."""
    made_by = set[tuple[str, str]]()
    for shard in read_manifest(files.tokens).shards:
        table = read_orders(join(files.tables, table_name(shard.name)))
        made_by.add((table.model_id, table.settings_id))
        draws = table.draws or [0] * len(table.keys)
        first = [row for row, (view, draw) in enumerate(zip(table.views, draws, strict=True)) if view == 0 and draw == 0]
        ranks = hash_keys("distinct orders", seed, *name_keys([table.keys[row] for row in first]))
        for row, rank in zip(first, ranks.tolist(), strict=True):
            order = table.order_SN[row].astype("<u2").tobytes()
            rank_of[order] = min(rank, rank_of.get(order, rank))
        rank_of = dict(sorted(rank_of.items(), key=lambda item: item[1])[:count])
    if len(made_by) != 1:
        raise UserError(f"{files.tables}: orders of several models or settings: {sorted(made_by)}. Extract them again.")
    if len(rank_of) < count:
        raise UserError(
            f"{files.tables}: {len(rank_of)} different orders in all, and finetune.distinct_orders asks for {count}.\n"
            f"Set it to {len(rank_of)} or lower."
        )
    ((model_id, settings_id),) = made_by
    orders = [np.frombuffer(order, dtype="<u2").tolist() for order in rank_of]
    return {"orders": orders, "seed": seed, "model_id": model_id, "settings_id": settings_id}
