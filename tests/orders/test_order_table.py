"""Order tables: what is written is read, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from oar_scale.errors import UserError
from oar_scale.orders.order_table import OrderTable, join_orders, read_orders, stored_settings, table_name, write_orders
from oar_scale.storage import Missing

SHARD = "tokens/train/00000.tar"


@pytest.fixture
def table() -> OrderTable:
    generator = np.random.default_rng(0)
    order = np.stack([generator.permutation(16) for _ in range(5)]).astype(np.uint16)
    score = generator.normal(size=(5, 16)).astype(np.float32)
    return OrderTable([f"image{i}" for i in range(5)], [0] * 5, order, score, model_id="m1", settings_id="s1")


def written(table: OrderTable, folder: Path) -> OrderTable:
    uri = str(folder / table_name("00000.tar"))
    write_orders(uri, table)
    return read_orders(uri)


def test_a_table_comes_back_as_it_was_written(table: OrderTable, tmp_path: Path) -> None:
    read_back = written(table, tmp_path)
    assert (read_back.keys, read_back.views, read_back.model_id, read_back.settings_id) == (table.keys, table.views, "m1", "s1")
    np.testing.assert_array_equal(read_back.order_SN, table.order_SN)
    np.testing.assert_array_equal(read_back.score_SN, table.score_SN)
    assert read_back.order_SN.dtype == np.uint16


def test_settings_are_read_without_the_orders(table: OrderTable, tmp_path: Path) -> None:
    """From the end of the file: of a table whose beginning is lost they are still known."""
    path = tmp_path / "00000.parquet"
    size = write_orders(str(path), table).size
    start = size - 8 - int.from_bytes(path.read_bytes()[-8:-4], "little")
    assert 0 < start < size
    path.write_bytes(bytes(start) + path.read_bytes()[start:])
    assert stored_settings(str(path), size) == "s1"
    for damaged in (b"", b"PAR", bytes(size), path.read_bytes()[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"00000\.parquet: not a readable Parquet file"):
            stored_settings(str(path), len(damaged))


def test_the_file_is_plain_parquet_with_fixed_size_lists(table: OrderTable, tmp_path: Path) -> None:
    written(table, tmp_path)
    schema = pq.read_schema(tmp_path / "00000.parquet")
    assert [str(field.type) for field in schema] == [
        "string",
        "int32",
        "int32",
        "fixed_size_list<element: uint16>[16]",
        "fixed_size_list<element: float>[16]",
    ]
    assert schema.metadata[b"model_id"] == b"m1"
    assert schema.metadata[b"settings_id"] == b"s1"


def test_the_same_table_gives_the_same_bytes(table: OrderTable, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_orders(str(tmp_path / name), table)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_orders_are_joined_by_key_and_not_by_position(table: OrderTable, tmp_path: Path) -> None:
    read_back = written(table, tmp_path)
    joined = join_orders(["image3", "image0"], read_back, shard=SHARD, cells=16, model_id="m1")
    np.testing.assert_array_equal(joined, table.order_SN[[3, 0], None])


def test_all_orders_of_a_sample_come_in_the_order_of_their_draws(table: OrderTable, tmp_path: Path) -> None:
    several = dataclasses.replace(table, keys=["cat", "dog", "cat", "dog", "cat"], views=[0, 0, 0, 0, 1], draws=[1, 0, 0, 1, 0])
    read_back = written(several, tmp_path)
    assert read_back.draws == several.draws
    joined = join_orders(["dog", "cat"], read_back, shard=SHARD, cells=16)
    np.testing.assert_array_equal(joined, table.order_SN[[[1, 3], [2, 0]]])
    with pytest.raises(UserError, match="no order for sample 'dog'"):
        join_orders(["dog", "cat"], dataclasses.replace(read_back, draws=[2, 0, 0, 1, 0]), shard=SHARD, cells=16)


def test_a_table_from_before_there_were_several_orders_is_read(table: OrderTable, tmp_path: Path) -> None:
    written(table, tmp_path)
    path = tmp_path / "00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["draw"]), path)
    np.testing.assert_array_equal(join_orders(["image1"], read_orders(str(path)), shard=SHARD, cells=16)[0, 0], table.order_SN[1])


def test_a_repeated_cell_is_named_with_file_and_key(table: OrderTable, tmp_path: Path) -> None:
    table.order_SN[2, 0] = table.order_SN[2, 1]
    with pytest.raises(UserError, match=r"00000\.parquet: the order of 'image2' is not a permutation"):
        written(table, tmp_path)


@pytest.mark.parametrize("other", [65_536.0, -65_536.0, 0.5, np.nan])
def test_what_would_be_a_cell_only_in_a_narrower_type_is_no_cell(table: OrderTable, tmp_path: Path, other: float) -> None:
    """A column of another program may be of another type; permutations in it are read."""
    written(table, tmp_path)
    path, stored = tmp_path / "00000.parquet", pq.read_table(tmp_path / "00000.parquet")
    kind = np.int64 if other == int(np.nan_to_num(other)) else np.float64

    def write(order_SN: NDArray[np.generic]) -> OrderTable:
        column = pa.FixedSizeListArray.from_arrays(pa.array(order_SN.ravel()), 16)
        pq.write_table(stored.set_column(3, "order", column), path)
        return read_orders(str(path))

    np.testing.assert_array_equal(write(table.order_SN.astype(kind)).order_SN, table.order_SN)
    wrong_SN = table.order_SN.astype(kind)
    wrong_SN[2, wrong_SN[2] == 0] = other
    with pytest.raises(UserError, match=r"00000\.parquet: the order of 'image2' is not a permutation"):
        write(wrong_SN)


def test_what_does_not_fit_is_named_with_table_and_shard(table: OrderTable, tmp_path: Path) -> None:
    read_back = written(table, tmp_path)
    with pytest.raises(UserError, match=r"00000\.parquet: no order for sample 'cat' of tokens/train/00000\.tar and 1 others"):
        join_orders(["image1", "cat", "dog"], read_back, shard=SHARD, cells=16)
    with pytest.raises(UserError, match=r"00000\.parquet: orders of 16 cells, tokens/train/00000\.tar has 64"):
        join_orders(["image1"], read_back, shard=SHARD, cells=64)
    with pytest.raises(UserError, match=r"00000\.parquet: orders found by model m1, not by m2.*tokens/train/00000\.tar"):
        join_orders(["image1"], read_back, shard=SHARD, cells=16, model_id="m2")


def test_an_order_of_another_view_does_not_count(table: OrderTable, tmp_path: Path) -> None:
    read_back = written(dataclasses.replace(table, views=[0, 1, 0, 0, 0]), tmp_path)
    with pytest.raises(UserError, match="no order for sample 'image1'"):
        join_orders(["image1"], read_back, shard=SHARD, cells=16)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "no model", "no score", "other cells", "no list"])
def test_a_file_that_is_no_order_table_is_named(table: OrderTable, tmp_path: Path, damage: str) -> None:
    written(table, tmp_path)
    path = tmp_path / "00000.parquet"
    stored = pq.read_table(path)
    says = {name.decode(): value.decode() for name, value in stored.schema.metadata.items()}
    changed = {
        "foreign": lambda: stored.replace_schema_metadata({}),
        "no model": lambda: stored.replace_schema_metadata({name: value for name, value in says.items() if name != "model_id"}),
        "no score": lambda: stored.drop_columns(["score"]),
        "other cells": lambda: stored.replace_schema_metadata({**says, "cells": "1 6"}),
        "no list": lambda: stored.set_column(3, "order", [[0] * 5]),
    }
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        pq.write_table(changed[damage](), path)
    with pytest.raises(UserError, match=r"00000\.parquet: not a"):
        read_orders(str(path))


def test_what_is_wrong_with_a_table_says_how_it_is_made_again(table: OrderTable, tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"00000\.parquet: there is no order table here.*`oar extract RECIPE --verify`") as missing:
        read_orders(str(tmp_path / "00000.parquet"))
    assert str(pickle.loads(pickle.dumps(missing.value))) == str(missing.value)
    read_back = written(table, tmp_path)
    with pytest.raises(UserError, match=r"`oar extract RECIPE --verify` finds"):
        join_orders(["dog"], read_back, shard=SHARD, cells=16)
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"(?s)not a readable Parquet file.*`oar extract RECIPE --verify` finds"):
        read_orders(str(tmp_path / "00000.parquet"))
