"""The extraction of a folder of shards: the tables are those of brute force, whatever was interrupted.

By two actors of a real Ray; what does not depend on them, by actors in this process.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool_worker import write_output
from small_models import random_codes, small_model

from oar_scale.config.schema import SentencePieceConfig
from oar_scale.data.manifest import Manifest, write_manifest
from oar_scale.data.shards import read_token_shard, shard_name, token_sample, write_shard
from oar_scale.errors import Unreachable, UserError
from oar_scale.model import load_model, save_model
from oar_scale.model.spec import TextSpec
from oar_scale.orders.extraction import brute_force_orders
from oar_scale.orders.order_table import join_orders, read_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.shard_pool import ArrayTask, Ledger, ShardResult, Timing
from oar_scale.shard_pool import extraction_pool as pool
from oar_scale.shard_pool.extraction_pool import ExtractionJob, ExtractionWorker, extract_all
from oar_scale.shard_pool.ledger import LedgerEntry, Record
from oar_scale.storage import open_storage
from oar_scale.storage.s3 import S3Storage
from oar_scale.tokenizers.text import TextTokenizer, train_text_tokenizer

CAPTIONS = ["a b", "b a", "a a b", "b b a", "a b a b"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text tokenizer and three token shards of 5, 5 and 3 samples with two views."""
    folder = tmp_path_factory.mktemp("inputs")
    text = train_text_tokenizer(CAPTIONS * 20, vocab_size=8, max_tokens=4)
    text.save(str(folder / "text.model"))
    model = small_model(grid=3, vocab=7, condition=TextSpec(vocab=text.vocab_size, rows=4))
    save_model(str(folder / "model.safetensors"), model)
    codes = random_codes(model, 26).numpy().reshape(13, 2, 9)
    samples = [token_sample({"__key__": f"image{i:02d}", "txt": CAPTIONS[i % 5]}, codes[i]) for i in range(13)]
    shards = [write_shard(str(folder / "tokens"), shard_name(i), samples[5 * i : 5 * i + 5]) for i in range(3)]
    write_manifest(str(folder / "tokens"), Manifest(shards=tuple(shards), grid=3, vocab_size=7, views=("center", "center_flip")))
    return folder


def job(inputs: Path, orders: Path) -> ExtractionJob:
    return ExtractionJob(
        tokens=str(inputs / "tokens"),
        orders=str(orders),
        model=str(inputs / "model.safetensors"),
        text=SentencePieceConfig(max_tokens=4),
        tokenizers=str(inputs),
        cache_dir=str(orders.parent / "cache"),
        settings=ExtractionSettings(),
        batch=2,
        precision="fp32",
    )


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def results(folder: Path) -> dict[str, ShardResult]:
    return {shard: entry.result for shard, entry in Ledger(str(folder / "ledger")).entries(map(shard_name, range(3))).items()}


@pytest.mark.usefixtures("shared_ray")
def test_every_image_gets_the_brute_force_order_of_view_0(inputs: Path, tmp_path: Path) -> None:
    progress: list[int] = []
    report = extract_all(job(inputs, tmp_path / "orders"), actors=2, on_progress=lambda done, _: progress.append(done))
    report.raise_for_poison()
    assert (progress[0], progress[-1], len(progress)) == (0, 13, 4)
    model, text = load_model(str(inputs / "model.safetensors")), TextTokenizer.load(str(inputs / "text.model"), 4)
    for index in range(3):
        uri = str(inputs / "tokens" / shard_name(index))
        shard, table = read_token_shard(uri, str(tmp_path)), read_orders(str(tmp_path / "orders" / f"0000{index}.parquet"))
        joined = join_orders(shard.keys, table, shard=uri, cells=9)[:, 0]
        with torch.no_grad():
            condition = model.condition(text.encode(shard.captions))
            codes = torch.from_numpy(shard.view(0).astype(np.int64))
            images = np.array([zlib.crc32(key.encode()) for key in shard.keys])
            expected = brute_force_orders(model, codes, condition, ExtractionSettings(), images)
        np.testing.assert_array_equal(joined, expected.order_BN.numpy())
        np.testing.assert_allclose(table.score_SN, expected.score_BN.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("pool_here")
def test_a_resumed_extraction_equals_an_uninterrupted_one(inputs: Path, tmp_path: Path) -> None:
    calm, torn = tmp_path / "calm", tmp_path / "torn"
    extract_all(job(inputs, calm), actors=1)
    # One shard finished, one with a table but no entry in the ledger, as if its actor had died between the two.
    worker = ExtractionWorker(job(inputs, torn))
    assert Ledger(str(torn / "ledger")).enter(shard_name(0), LedgerEntry(write_output(worker, shard_name(0))))
    (torn / "00001.parquet").write_bytes(b"half a table")
    report = extract_all(job(inputs, torn), actors=2)
    assert report.already_done == 1
    assert tables(torn) == tables(calm)
    assert results(torn) == results(calm)


@pytest.mark.usefixtures("pool_here")
def test_orders_of_two_settings_do_not_mix(inputs: Path, tmp_path: Path) -> None:
    first = job(inputs, tmp_path / "orders")
    extract_all(first, actors=2)
    with pytest.raises(UserError, match=r"00000\.tar were extracted with settings_id"):
        extract_all(dataclasses.replace(first, settings=ExtractionSettings(guidance=2.0)), actors=2)


def test_a_model_that_does_not_fit_is_refused_by_its_header(inputs: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    other = tmp_path / "other.safetensors"
    save_model(str(other), small_model(grid=4))
    other.write_bytes(other.read_bytes()[:-1000])  # nobody gets as far as its tensors
    with pytest.raises(UserError, match=r"other\.safetensors: made for grid 4, the token shards in .*tokens have grid 3"):
        extract_all(dataclasses.replace(job(inputs, tmp_path / "orders"), model=str(other)), actors=2)
    with pytest.raises(UserError, match=r"tokens: the shards hold 2 views, and orders of 3 are wanted"):
        extract_all(dataclasses.replace(job(inputs, tmp_path / "orders"), views=3), actors=2)
    assert not (tmp_path / "orders").exists() and not list(tmp_path.glob("orders*"))


def test_every_view_can_have_an_order_of_its_own(inputs: Path, tmp_path: Path) -> None:
    worker = ExtractionWorker(dataclasses.replace(job(inputs, tmp_path / "orders"), views=2))
    write_output(worker, shard_name(2))
    table = read_orders(str(tmp_path / "orders/00002.parquet"))
    assert (table.keys[:4], table.views) == (["image10", "image10", "image11", "image11"], [0, 1] * 3)
    write_output(ExtractionWorker(job(inputs, tmp_path / "first")), shard_name(2))
    first = read_orders(str(tmp_path / "first/00002.parquet"))
    np.testing.assert_array_equal(table.order_SN[::2], first.order_SN)
    model, text = load_model(str(inputs / "model.safetensors")), TextTokenizer.load(str(inputs / "text.model"), 4)
    shard = read_token_shard(str(inputs / "tokens" / shard_name(2)), str(tmp_path))
    with torch.no_grad():
        codes = torch.from_numpy(shard.view(1).astype(np.int64))
        images = np.array([zlib.crc32(f"{key}/1".encode()) for key in shard.keys])
        expected = brute_force_orders(model, codes, model.condition(text.encode(shard.captions)), ExtractionSettings(), images)
    np.testing.assert_array_equal(table.order_SN[1::2], expected.order_BN.numpy())


@pytest.mark.usefixtures("pool_here")
def test_a_damaged_token_shard_is_named_others_are_extracted(inputs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tokens"
    copy.mkdir()
    for path in (inputs / "tokens").iterdir():
        data = path.read_bytes()
        (copy / path.name).write_bytes(data[:-2000] if path.name == shard_name(1) else data)
    report = extract_all(dataclasses.replace(job(inputs, tmp_path / "orders"), tokens=str(copy)), actors=2)
    assert list(report.done) == [shard_name(0), shard_name(2)]
    with pytest.raises(UserError, match=r"1 of 3 shards could not be done:\n.*00001\.tar.*The file is damaged"):
        report.raise_for_poison()


@pytest.mark.usefixtures("pool_here")
def test_only_tables_that_are_gone_or_cut_are_made_again(inputs: Path, tmp_path: Path) -> None:
    here = job(inputs, tmp_path / "orders")
    worker, ledger = ExtractionWorker(here), Ledger(here.ledger)
    for index in range(3):
        result = write_output(worker, shard_name(index))
        if index == 2:  # as older versions entered it
            result = {name: value for name, value in result.items() if not name.startswith("table_")}
        ledger.enter(shard_name(index), LedgerEntry(result))
    before, intact = tables(tmp_path / "orders"), open_storage(here.orders).version(f"{here.orders}/00002.parquet")
    (tmp_path / "orders/00000.parquet").unlink()
    (tmp_path / "orders/00001.parquet").write_bytes(before["00001.parquet"][:-1])
    events: list[tuple[str, Record]] = []
    report = extract_all(here, actors=1, on_event=lambda kind, fields: events.append((kind, fields)))
    assert (report.already_done, len(report.done)) == (1, 3)
    assert [fields for kind, fields in events if kind == "lost_output"] == [
        {"shard": "00000.tar", "error": "its table is gone"},
        {
            "shard": "00001.tar",
            "error": f"its table has {len(before['00001.parquet']) - 1} bytes, {len(before['00001.parquet'])} were written",
        },
    ]
    assert tables(tmp_path / "orders") == before
    assert open_storage(here.orders).version(f"{here.orders}/00002.parquet") == intact


def test_a_folder_of_another_config_loses_no_entry(inputs: Path, tmp_path: Path) -> None:
    here = job(inputs, tmp_path / "orders")
    Ledger(here.ledger).enter(shard_name(0), LedgerEntry(write_output(ExtractionWorker(here), shard_name(0))))
    (tmp_path / "orders/00000.parquet").unlink()
    with pytest.raises(UserError, match="were extracted with settings_id"):
        extract_all(dataclasses.replace(here, batch=3), actors=2)
    assert Ledger(here.ledger).done() == {shard_name(0)}


def test_scores_that_are_no_numbers_are_not_the_shards_fault(inputs: Path, tmp_path: Path) -> None:
    worker = ExtractionWorker(job(inputs, tmp_path / "orders"))
    with torch.no_grad():
        worker.model.output.weight[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match=r"tokens/00000\.tar: the model's scores are not numbers"):  # UserError is not tried again
        worker.run(shard_name(0), lambda: None)


def test_a_gpu_without_memory_names_the_batch(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pool, "extract_orders", full)
    with pytest.raises(RuntimeError, match=r"00000\.tar: .*too small for extract\.batch = 2 images.*CUDA out of memory") as raised:
        ExtractionWorker(job(inputs, tmp_path / "orders")).run(shard_name(0), lambda: None)
    assert not isinstance(raised.value, UserError)


def test_processes_without_ray_take_the_gpus_they_see_in_turn(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(pool, "run_pool", lambda make, *_, **__: seen.append(make.__self__.device))
    here = dataclasses.replace(job(inputs, tmp_path / "orders"), cuda=True)
    for index in (0, 3, 6):
        extract_all(here, actors=1, array=ArrayTask(index, 8))
    extract_all(here, actors=1)  # Ray shows an actor its own GPUs alone
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    extract_all(here, actors=1, array=ArrayTask(6, 8))  # as Slurm does
    assert [str(device) for device in seen] == ["cuda:0", "cuda:3", "cuda:2", "cuda:0", "cuda:0"]


def test_several_orders_of_several_views_have_rows_of_their_own(inputs: Path, tmp_path: Path) -> None:
    settings = ExtractionSettings(order_temperature=1.0, orders_per_image=2)
    write_output(ExtractionWorker(dataclasses.replace(job(inputs, tmp_path / "orders"), views=2, settings=settings)), shard_name(2))
    table = read_orders(str(tmp_path / "orders/00002.parquet"))
    assert table.keys == [f"image{index}" for index in (10, 11, 12) for _ in range(4)]
    assert (table.views, table.draws) == ([0, 0, 1, 1] * 3, [0, 1, 0, 1] * 3)
    model, text = load_model(str(inputs / "model.safetensors")), TextTokenizer.load(str(inputs / "text.model"), 4)
    shard = read_token_shard(str(inputs / "tokens" / shard_name(2)), str(tmp_path))
    for row, (view, draw) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        with torch.no_grad():
            codes, condition = torch.from_numpy(shard.view(view).astype(np.int64)), model.condition(text.encode(shard.captions))
            images = np.array([zlib.crc32((f"{key}/{view}" if view else key).encode()) for key in shard.keys])
            expected = brute_force_orders(model, codes, condition, settings, images, draw)
        np.testing.assert_array_equal(table.order_SN[row::4], expected.order_BN.numpy())
    joined = join_orders(shard.keys, table, shard=shard_name(2), cells=9)
    np.testing.assert_array_equal(joined, table.order_SN.reshape(3, 4, 9)[:, :2])


@pytest.mark.usefixtures("pool_here")
def test_an_extraction_starts_when_its_storage_is_back(inputs: Path, tmp_path: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the driver reads or lists as it starts is out of reach at first: manifest, model, ledger, tables."""
    extract_all(job(inputs, tmp_path / "orders"), actors=1)
    for folder in (inputs, tmp_path / "orders"):
        for path in open_storage(str(folder)).list(str(folder)):
            open_storage(s3_root).upload(path, f"{s3_root}/back/{folder.name}/{path.removeprefix(f'{folder}/')}")
    there, refused = f"{s3_root}/back/{inputs.name}", list[str]()
    orders = f"{s3_root}/back/orders"
    here = dataclasses.replace(
        job(inputs, tmp_path / "orders"), tokens=f"{there}/tokens", model=f"{there}/model.safetensors", orders=orders
    )
    for verb in ("read", "sizes"):
        answer = getattr(S3Storage, verb)

        def refuse_once(storage: S3Storage, uri: str, *where: int, answer: Any = answer, verb: str = verb) -> Any:
            if f"{verb} {uri}" not in refused:
                refused.append(f"{verb} {uri}")
                raise Unreachable(f"{uri}: no connection")
            return answer(storage, uri, *where)

        monkeypatch.setattr(S3Storage, verb, refuse_once)
    monkeypatch.setattr("oar_scale.runtime.retry.FIRST_S", 0.001)
    assert extract_all(here, actors=1, timing=Timing(patience_s=60)).already_done == 3
    for each in (f"read {here.tokens}/manifest.json", f"read {here.model}", f"sizes {here.ledger}", f"sizes {here.orders}"):
        assert each in refused
