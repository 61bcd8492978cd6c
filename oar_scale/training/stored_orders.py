"""Where a training's samples have their orders from, one by one: for each token shard its samples' orders [S, K, N] by view.

Each class here is a :data:`~oar_scale.data.shard_source.StoredOrders`: called with a shard's name and its samples, it returns K orders for
each of them in each view that has some. It is sent to loader processes, and its answer depends on the shard alone, so that all of them see
the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from oar_scale.data.hashing import name_keys, permutations
from oar_scale.data.open_shard import OpenShard
from oar_scale.data.shard_source import Orders, StoredOrders
from oar_scale.errors import UserError
from oar_scale.orders.distinct import nearest_orders
from oar_scale.orders.order_table import OrderTable, join_orders, mirror_orders, read_orders, table_name
from oar_scale.storage import join


@dataclass(frozen=True)
class OneOrder:
    """One order for all samples of a shard, in all views that have orders."""

    order: tuple[int, ...]
    views: tuple[int, ...]

    def __call__(self, shard: str, samples: OpenShard) -> dict[int, Orders]:
        orders_SKN = np.broadcast_to(np.array(self.order, dtype=np.uint16), (len(samples), 1, len(self.order)))
        return dict.fromkeys(self.views, orders_SKN)


@dataclass(frozen=True)
class OrderTables:
    """The orders of a token shard's samples, from the order table of the same name."""

    orders: str
    tokens: str
    grid: int
    model_id: str
    views: int
    """The first so many views have rows in the table."""
    mirrored: dict[int, int]
    """Of some of these: the view that is the mirror image."""
    settings_id: str | None = None
    """How the orders must have been found; None takes any."""

    def __call__(self, shard: str, samples: OpenShard) -> dict[int, Orders]:
        table, where = read_orders(join(self.orders, table_name(shard))), join(self.tokens, shard)
        if self.settings_id is not None and table.settings_id != self.settings_id:
            raise UserError(
                f"{table.uri}: orders of {table.settings_id}, the training began on those of {self.settings_id}: they have been predicted "
                "anew, or not all of them. Run oar orders RECIPE --predict to its end, and do the stage again with --from."
            )
        own = {
            view: join_orders(samples.keys, _of_view(table, view), shard=where, cells=self.grid**2, model_id=self.model_id)
            for view in range(self.views)
        }
        return own | _mirror_images(own, self.mirrored, self.grid)


@dataclass(frozen=True)
class OrdersByKey:
    """A random order for each sample, the same in every epoch: a hash of the seed and the sample's key. All views have it, mirror images
    the mirrored one."""

    seed: int
    grid: int
    views: int
    mirrored: dict[int, int]

    def __call__(self, shard: str, samples: OpenShard) -> dict[int, Orders]:
        order_SN = permutations("order of a key", self.grid**2, self.seed, *name_keys(samples.keys)).astype(np.uint16)
        own = dict.fromkeys(range(self.views), order_SN[:, None])
        return own | _mirror_images(own, self.mirrored, self.grid)


@dataclass(frozen=True)
class NearestOrders:
    """Of few orders, the one that is nearest to each stored one."""

    stored: StoredOrders
    chosen_KN: Orders

    def __call__(self, shard: str, samples: OpenShard) -> dict[int, Orders]:
        return {view: self._nearest(orders_SKN) for view, orders_SKN in self.stored(shard, samples).items()}

    def _nearest(self, orders_SKN: Orders) -> Orders:
        nearest_R = nearest_orders(orders_SKN.reshape(-1, orders_SKN.shape[-1]), self.chosen_KN)
        return self.chosen_KN[nearest_R].reshape(orders_SKN.shape)


@dataclass(frozen=True)
class OrdersOfOthers:
    """Each sample has the stored orders of another sample of its shard: the next one on a random cycle through all of them."""

    stored: StoredOrders
    seed: int

    def __call__(self, shard: str, samples: OpenShard) -> Mapping[int, Orders]:
        if len(samples) < 2:
            raise UserError(
                f"{shard}: one image alone, which cannot have the order of another one (orders_of: other_images).\n"
                "Set data.samples_per_shard so that the last shard has more."
            )
        next_S = next_on_cycle(len(samples), self.seed, shard)
        return {view: orders_SKN[next_S] for view, orders_SKN in self.stored(shard, samples).items()}


def next_on_cycle(count: int, seed: int, shard: str) -> NDArray[np.int64]:
    """For each of ``count`` samples another one, all of them different: a permutation of a single cycle, so that none keeps its place."""
    cycle_S = permutations("orders of others", count, seed, *(key_1[0] for key_1 in name_keys([shard])))
    next_S = np.empty_like(cycle_S)
    next_S[cycle_S] = np.roll(cycle_S, -1)
    return next_S


def _mirror_images(own: Mapping[int, Orders], mirrored: Mapping[int, int], grid: int) -> dict[int, Orders]:
    """The orders of views that are mirror images of others."""
    return {other: mirror_orders(own[view], grid) for view, other in mirrored.items()}


def _of_view(table: OrderTable, view: int) -> OrderTable:
    """The rows of one view, as a table of first views. Raises UserError where it has none."""
    rows = [row for row, each in enumerate(table.views) if each == view]
    if not rows:
        raise UserError(
            f"{table.uri}: no orders of view {view}, where extract.views asks for those of the first {view + 1} and more. "
            "Extract them again, or set extract.views back."
        )
    draws = None if table.draws is None else [table.draws[row] for row in rows]
    keys, order_SN, score_SN = [table.keys[row] for row in rows], table.order_SN[rows], table.score_SN[rows]
    return replace(table, keys=keys, views=[0] * len(rows), order_SN=order_SN, score_SN=score_SN, draws=draws)
