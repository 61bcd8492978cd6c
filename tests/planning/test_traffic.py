"""Bytes and requests are those that the software writes and sends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oar_scale.data.shards import token_sample, write_shard
from oar_scale.orders.order_table import OrderTable, write_orders
from oar_scale.planning import extraction_plan, traffic
from oar_scale.planning.shape import spec_of
from oar_scale.planning.traffic import checkpoint_traffic, orders_bytes, pool_load, token_shard
from oar_scale.planning.training_stage import checkpoint_timing
from oar_scale.shard_pool import Timing
from oar_scale.storage import s3_download
from oar_scale.storage.s3 import _TRANSFER
from tests.planning.cases import case


def test_the_constants_are_those_of_the_storage_and_the_pool() -> None:
    assert s3_download.PART_BYTES == _TRANSFER.multipart_chunksize == traffic.PART
    assert _TRANSFER.multipart_threshold == traffic.MULTIPART
    assert Timing().straggler == extraction_plan.STRAGGLER
    assert Timing().heartbeat_s == pool_load.__defaults__[0]  # type: ignore[index]


@pytest.mark.parametrize("recipe", ["imagenet", "celeba", "emoji"])
def test_a_planned_shard_is_as_long_as_a_real_one(recipe: str, tmp_path: Path) -> None:
    planned = case(recipe, "data.samples_per_shard=30")
    spec, views = planned.spec, len(planned.recipe.tokenizer.views)
    codes_VN = np.zeros((views, spec.cells), dtype=np.uint16)
    features: dict[str, bytes] = {}
    if recipe == "celeba":
        (tmp_path / "f.npy").touch()
        np.save(tmp_path / "f.npy", np.zeros((spec.condition.rows, 768), dtype=np.float16))
        features["features.npy"] = (tmp_path / "f.npy").read_bytes()
    label = {"json": b'{"label": 207}'} if recipe == "imagenet" else {}
    samples = (
        token_sample({"__key__": f"{n:08d}", "txt": b"a photo of a golden retriever", **label, **features}, codes_VN) for n in range(30)
    )
    real = write_shard(str(tmp_path / "shards"), "00000.tar", samples)
    assert token_shard(planned.recipe, spec_of(planned.recipe)).bytes == real.bytes


def test_order_tables_are_no_longer_than_planned(tmp_path: Path) -> None:
    planned, draw = case("emoji"), np.random.default_rng(0)
    cells, images = planned.spec.cells, 200
    orders = np.stack([draw.permutation(cells) for _ in range(images)]).astype(np.uint16)
    table = OrderTable(
        [f"{n:08d}" for n in range(images)], [0] * images, orders, draw.standard_normal(orders.shape).astype(np.float32), "m", "s"
    )
    write_orders(str(tmp_path / "0.parquet"), table)
    written = (tmp_path / "0.parquet").stat().st_size
    assert 0.5 * images * orders_bytes(planned.spec) < written < 1.1 * images * orders_bytes(planned.spec)


def test_a_checkpoint_is_three_numbers_a_parameter_or_four() -> None:
    """A checkpoint is three numbers a parameter and four with an average."""
    spec = case("imagenet").spec
    assert checkpoint_traffic(spec, 8, average=False).bytes == 12 * 342_912_000
    assert checkpoint_traffic(spec, 8, average=True).bytes == 16 * 342_912_000


def test_large_files_go_up_in_parts() -> None:
    spec = case("imagenet").spec
    few, many = checkpoint_traffic(spec, 8, average=False), checkpoint_traffic(spec, 1024, average=False)
    assert few.puts == 8 * (-(-few.bytes // 8 // (16 << 20)) + 2) + 3
    assert many.puts == 1024 + 3


def test_an_upload_waits_for_bytes_or_request_rate() -> None:
    """An upload waits for the bytes or for what a prefix takes."""
    few, many = (case("imagenet", "data.canonical_streams=1024", nodes=nodes, gpus_per_node=8) for nodes in (1, 128))
    slow, crowded = (checkpoint_timing(each, checkpoint_traffic(each.spec, each.workers, average=False), 600.0) for each in (few, many))
    assert slow.upload_s == pytest.approx(12 * 342_912_000 / 1e9 + 0.2)
    assert crowded.upload_s == pytest.approx((1024 + 3) / 3500 + 0.2)


def test_a_pool_claims_looks_reads_writes_enters_and_lets_go() -> None:
    shard = token_shard(case("imagenet").recipe, case("imagenet").spec)
    load = pool_load(1000, shard, 1 << 20, seconds=100.0)
    assert (load.gets, load.puts, load.deletes) == (1000 * (2 + shard.gets), 4000 + 10, 2000 + 10)
    assert load.lists == 1 and pool_load(1001, shard, 1 << 20, 1.0).lists == 2
    many = pool_load(1000, shard, 100 << 20, seconds=100.0)  # several orders of each image: a table goes up in parts
    assert many.puts - load.puts == 1000 * (7 + 2 - 1)
