"""Order tables: for each token shard one Parquet file of the same stem.

    key    view    draw    order (fixed_size_list<uint16>[N])    score (fixed_size_list<float32>[N])

One row per sample and view, in the order of the shard, and for each of its draws where a sample has several orders. ``score``
belongs to the cell of the same position in ``order``. The schema's metadata names the model that found the orders (hash of its
weights file), with which settings, on which grid. Joined to a token shard by key; everything that does not fit is an error that
says where.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oar_scale.data.hashing import name_bytes
from oar_scale.errors import UserError
from oar_scale.storage import Missing, open_storage
from oar_scale.text import shown

FORMAT = "1"
_SAID, _COLUMNS = {"cells", "model_id", "settings_id"}, {"key", "view", "order", "score"}
"""What the schema's metadata and a table have; ``draw`` came later."""
_AGAIN = "`oar extract RECIPE --verify` finds all tables that are lost or damaged, and the next `oar extract RECIPE` makes them again."


@dataclass(frozen=True)
class OrderTable:
    """S orders of a shard's samples."""

    keys: list[str]
    views: list[int]
    order_SN: NDArray[np.uint16]
    score_SN: NDArray[np.float32]
    model_id: str
    settings_id: str
    uri: str = ""
    """Where it was read from, for errors."""
    draws: list[int] | None = None
    """Which of its sample's orders each is, from 0; None: every sample has one."""


def table_name(shard: str) -> str:
    """The order table of a token shard: same stem."""
    return f"{shard.removesuffix('.tar')}.parquet"


class NoOrders(Missing):
    """There is no order table at ``uri``."""

    def __init__(self, uri: str) -> None:
        UserError.__init__(self, f"{uri}: there is no order table here. If it was lost: {_AGAIN}")
        self.uri = uri

    def __reduce__(self) -> tuple[type[NoOrders], tuple[str]]:
        return NoOrders, (self.uri,)


@dataclass(frozen=True)
class Stored:
    """Size and checksum of a stored table."""

    size: int
    """Bytes."""
    crc32c: int

    @classmethod
    def of(cls, data: bytes) -> Stored:
        """Size and checksum of some bytes."""
        return cls(len(data), crc32c.crc32c(data))


def write_orders(uri: str, table: OrderTable) -> Stored:
    """Write a table atomically."""
    data = order_bytes(table)
    open_storage(uri).write(uri, data)
    return Stored.of(data)


def order_bytes(table: OrderTable) -> bytes:
    """The file of a table; the same table gives the same bytes."""
    cells = table.order_SN.shape[1]
    metadata = {"oar_format": FORMAT, "model_id": table.model_id, "settings_id": table.settings_id, "cells": str(cells)}
    order = pa.FixedSizeListArray.from_arrays(pa.array(table.order_SN.astype(np.uint16).ravel()), cells)
    score = pa.FixedSizeListArray.from_arrays(pa.array(table.score_SN.astype(np.float32).ravel()), cells)
    draws = [0] * len(table.keys) if table.draws is None else table.draws
    columns = {
        "key": _key_column(table.keys),
        "view": pa.array(table.views, pa.int32()),
        "draw": pa.array(draws, pa.int32()),
        "order": order,
        "score": score,
    }
    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()], metadata)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(list(columns.values()), schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def read_orders(uri: str) -> OrderTable:
    """Read a table and check that every order is a permutation.

    Raises:
        NoOrders: there is nothing.
        UserError: not an order table, or a row that is no permutation; names file and key.
    """
    try:
        data = open_storage(uri).read(uri)
    except Missing as error:
        raise NoOrders(uri) from error
    return parse_orders(data, uri)


def parse_orders(data: bytes, uri: str) -> OrderTable:
    """:func:`read_orders` of what was read from ``uri``."""
    with _readable(uri):
        table = pq.read_table(io.BytesIO(data))
    metadata = _metadata(table.schema, uri)
    lists = (getattr(table.schema.field(name).type, "list_size", None) for name in ("order", "score"))
    if {metadata["cells"]} != {str(size) for size in lists}:
        raise UserError(f"{uri}: not a whole order table: its orders are not of {shown(metadata['cells'])} cells each.\n{_AGAIN}")
    cells = int(metadata["cells"])
    keys = [key if isinstance(key, str) else key.decode("utf-8", "surrogateescape") for key in table["key"].to_pylist()]
    found_SN = _matrix(table["order"], cells)
    wrong_S = (np.sort(found_SN, axis=1) != np.arange(cells)).any(axis=1)  # before a narrower type makes 0 of 65,536
    if wrong_S.any():
        key = keys[int(wrong_S.argmax())]
        raise UserError(f"{uri}: the order of {key!r} is not a permutation of 0 .. {cells - 1}.\n{_AGAIN}")
    order_SN, score_SN = found_SN.astype(np.uint16), _matrix(table["score"], cells).astype(np.float32)
    draws = table["draw"].to_pylist() if "draw" in table.column_names else None
    return OrderTable(keys, table["view"].to_pylist(), order_SN, score_SN, metadata["model_id"], metadata["settings_id"], uri, draws)


def stored_settings(uri: str, size: int) -> str:
    """The settings that the orders of a table of ``size`` bytes were extracted with: read from the end of the file, without the orders.

    Raises:
        UserError: not an order table.
    """
    storage = open_storage(uri)
    footer = int.from_bytes(storage.read(uri, max(0, size - 8))[:4], "little")
    with _readable(uri):
        schema = pq.read_schema(io.BytesIO(storage.read(uri, max(0, size - 8 - footer))))
    return _metadata(schema, uri)["settings_id"]


@contextmanager
def _readable(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{uri}: not a readable Parquet file ({error}).\n{_AGAIN}") from error


def _metadata(schema: pa.Schema, uri: str) -> dict[str, str]:
    """What the schema says of a whole order table. Raises UserError for another one."""
    metadata = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in (schema.metadata or {}).items()}
    if metadata.get("oar_format") != FORMAT:
        raise UserError(f"{uri}: not an order table of oar_scale, format {FORMAT} (found: {metadata.get('oar_format')}).")
    if lacking := sorted(_SAID - metadata.keys() | _COLUMNS - {*schema.names}):
        raise UserError(f"{uri}: not a whole order table: it has no {', '.join(lacking)}.\n{_AGAIN}")
    return metadata


def join_orders(keys: Sequence[str], table: OrderTable, *, shard: str, cells: int, model_id: str | None = None) -> NDArray[np.uint16]:
    """The orders [S, K, N] of a token shard's samples, in their order: K orders of each sample's first view.

    Args:
        keys: of the token shard.
        shard: the token shard's URI, for errors.
        cells: N of the token shard's grid.
        model_id: the model that must have found the orders; None takes any.

    Raises:
        UserError: another grid, another model, or a key without an order, or with fewer orders than others have.
    """
    table_cells = table.order_SN.shape[1]
    if table_cells != cells:
        raise UserError(
            f"{table.uri}: orders of {table_cells} cells, {shard} has {cells}. They belong to another grid: extract them again."
        )
    if model_id is not None and model_id != table.model_id:
        raise UserError(f"{table.uri}: orders found by model {table.model_id}, not by {model_id}. Extract them again for {shard}.")
    draws = table.draws or [0] * len(table.keys)
    rows = zip(table.keys, table.views, draws, strict=True)
    row_of = {(key, draw): row for row, (key, view, draw) in enumerate(rows) if view == 0}
    wanted = [(key, draw) for key in keys for draw in range(max(draws, default=0) + 1)]
    missing = list(dict.fromkeys(key for key, draw in wanted if (key, draw) not in row_of))
    if missing:
        raise UserError(
            f"{table.uri}: no order for sample {missing[0]!r} of {shard}"
            f"{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}.\n{_AGAIN}"
        )
    return table.order_SN[[row_of[each] for each in wanted]].reshape(len(keys), -1, cells)


def mirror_orders(orders: NDArray[np.uint16], grid: int) -> NDArray[np.uint16]:
    """The same ways through the cells of a mirrored image: left and right are exchanged. [..., N] of N = grid x grid cells."""
    row, column = np.divmod(orders, np.uint16(grid))
    mirrored: NDArray[np.uint16] = row * np.uint16(grid) + np.uint16(grid - 1) - column
    return mirrored


def _key_column(keys: Sequence[str]) -> pa.Array:
    """The keys as text; as bytes where one of them is no UTF-8."""
    try:
        return pa.array(keys, pa.string())
    except UnicodeEncodeError:
        return pa.array([name_bytes(key) for key in keys], pa.binary())


def _matrix(column: pa.ChunkedArray, cells: int) -> NDArray[np.generic]:
    """A fixed_size_list column as [S, cells]."""
    values: NDArray[np.generic] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, cells)
