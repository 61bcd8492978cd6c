"""The order head: it learns, says what it is worth on images it has not seen, and belongs to one model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import random_codes, random_text, small_model

from oar_scale.config.schema import OrderHeadConfig
from oar_scale.data.manifest import Manifest, read_manifest, write_manifest
from oar_scale.data.shards import token_sample, write_shard
from oar_scale.errors import UserError
from oar_scale.model import model_id, save_model
from oar_scale.model.spec import ClassSpec
from oar_scale.orders.extraction import extract_orders
from oar_scale.orders.head import HeadSpec, OrderHead, load_head, predict_ahead, predict_orders, ranking_loss, save_head, tables_id
from oar_scale.orders.order_files import head_file, run_files
from oar_scale.orders.order_table import OrderTable, join_orders, read_orders, table_name, write_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.studies.order_head_training import HeadData, kept_out, train_head, write_predicted
from oar_scale.tokenizers.prompts import LabelEncoder

SHARDS, IMAGES, CLASSES, GRID = 4, 40, 5, 4
CONFIG = OrderHeadConfig(width=32, steps=120, batch=16, lr=5e-3, heldout_fraction=0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> HeadData:
    """160 images of random codes, a class each, with the exact orders of a model that has opinions. Two images are one family."""
    root = str(tmp_path_factory.mktemp("run"))
    files, model = run_files(root), small_model(grid=GRID, vocab=16, condition=ClassSpec(classes=CLASSES))
    save_model(f"{root}/models/any_order.safetensors", model)
    infos = []
    for index in range(SHARDS):
        codes, labels = random_codes(model, IMAGES, seed=index), torch.arange(IMAGES) % CLASSES
        keys = [f"{index}x{row}" for row in range(IMAGES)]
        metadata = [{"label": int(label), "family": f"{index} {row // 2}"} for row, label in enumerate(labels)]
        assert files.tokens is not None and files.tables is not None
        samples = [
            token_sample({"__key__": key, "txt": b"", "json": json.dumps(each).encode()}, row[None].numpy().astype(np.uint16))
            for key, each, row in zip(keys, metadata, codes, strict=True)
        ]
        infos.append(write_shard(files.tokens, f"{index:05d}.tar", samples))
        with torch.no_grad():
            orders = extract_orders(model, codes, model.condition(labels[:, None]), ExtractionSettings(score="gt_logprob"))
        table = OrderTable(keys, [0] * IMAGES, orders.order_BN.numpy().astype(np.uint16), orders.score_BN.numpy(), "exact", "s")
        write_orders(f"{files.tables}/{table_name(infos[-1].name)}", table)
    assert files.tokens is not None
    write_manifest(files.tokens, Manifest(shards=tuple(infos), grid=GRID, vocab_size=16, views=("center",)))
    return HeadData(model, LabelEncoder(CLASSES), files, f"{root}/cache", None)


def test_the_loss_is_small_for_the_order_large_for_its_reverse() -> None:
    """The loss is small for the right order and large for its reverse."""
    exact = torch.tensor([[2, 0, 1, 3]])
    right = exact.float() * 10
    assert float(ranking_loss(right, exact)) < 1e-3 < 5 < float(ranking_loss(-right, exact))
    assert float(ranking_loss(torch.zeros(1, 4), exact)) == pytest.approx(np.log(2))


@pytest.mark.parametrize("first", [0, 3])
def test_it_learns_exact_orders_and_is_measured_beside_baselines(first: int, data: HeadData) -> None:
    """It learns from exact orders and is measured beside what needs no training."""
    steps: list[int] = []
    config = CONFIG.model_copy(update={"first": first})
    head, report = train_head(data, config, "exact", seed=0, on_step=lambda step, loss: steps.append(step))
    tau = {row.name: row.tau for row in report.rows}
    assert steps == list(range(1, CONFIG.steps + 1)) and not head.training
    assert report.images + report.heldout == SHARDS * IMAGES and 16 <= report.heldout <= 48
    assert report.exact_rows == 136 and {row.name: row.rows for row in report.rows} == dict.fromkeys(tau, 16) | {
        "mean order of the data set": 0
    }
    assert tau["order head in hindsight"] > tau["own code's score, asked once"] > tau["mean order of the data set"] + 0.1
    rest = {row.name: row.tau_rest for row in report.rows}
    assert rest["order head ahead"] > rest["mean order of the data set"]
    assert rest == tau if first == 0 else rest["order head ahead"] > tau["order head ahead"]


def test_the_seed_alone_decides_the_head(data: HeadData) -> None:
    """The same seed gives the same head and another one another."""
    config = CONFIG.model_copy(update={"steps": 3})
    first, again, other = (train_head(data, config, "exact", seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_variants_of_a_picture_are_on_one_side(data: HeadData) -> None:
    for info in data.manifest.shards:
        out = kept_out(data.open(info), 0.3)
        assert np.array_equal(out[::2], out[1::2]) and 0 < out.sum() < len(out)


def test_no_image_to_measure_with_names_the_field(data: HeadData) -> None:
    """No image to measure with is an error that names the field."""
    with pytest.raises(UserError, match=r"order_head\.heldout_fraction 1e-09 keeps no image out"):
        train_head(data, CONFIG.model_copy(update={"heldout_fraction": 1e-9, "steps": 1}), "exact", seed=0)
    with pytest.raises(UserError, match=r"order_head\.heldout_fraction 1 leaves none to train on"):
        train_head(data, CONFIG.model_copy(update={"heldout_fraction": 1.0, "steps": 1}), "exact", seed=0)
    with pytest.raises(UserError, match=r"order_head\.first 16: the model has 16 cells"):
        train_head(data, CONFIG.model_copy(update={"first": 16}), "exact", seed=0)


@torch.no_grad()
def test_predicted_orders_are_permutations_in_any_batch() -> None:
    """Predicted orders are permutations for one row a cell and do not depend on the batch."""
    model = small_model(grid=GRID, vocab=16)
    head = OrderHead(HeadSpec.of(model.spec, "m", width=8, first=0)).eval()
    codes, condition = random_codes(model, 6), model.condition(random_text(model, 6))
    predicted = predict_orders(model, codes, condition, head)
    assert predicted.rows == 16 and torch.equal(predicted.order_BN.sort(1).values, torch.arange(16).expand(6, -1))
    assert torch.equal(predict_orders(model, codes[4:], condition[4:], head).order_BN, predicted.order_BN[4:])
    other = predict_orders(model, random_codes(model, 6, seed=5), condition, head)
    assert not torch.equal(other.order_BN, predicted.order_BN), "in hindsight it sees the codes"


@torch.no_grad()
def test_ahead_sees_the_codes_of_its_first_cells_and_no_others() -> None:
    model = small_model(grid=GRID, vocab=16)
    head = OrderHead(HeadSpec.of(model.spec, "m", width=8, first=4)).eval()
    codes, condition = random_codes(model, 6), model.condition(random_text(model, 6))
    predicted = predict_ahead(model, codes, condition, head)
    assert predicted.rows == 16 and torch.equal(predicted.order_BN.sort(1).values, torch.arange(16).expand(6, -1))
    assert torch.equal(predicted.order_BN[:, :4], head.first_N.expand(6, -1))
    others = random_codes(model, 6, seed=5)
    kept = others.scatter(1, predicted.order_BN[:, :4], codes.gather(1, predicted.order_BN[:, :4]))
    assert torch.equal(predict_ahead(model, kept, condition, head).order_BN, predicted.order_BN)
    assert not torch.equal(predict_ahead(model, others, condition, head).order_BN, predicted.order_BN)


@torch.no_grad()
def test_it_comes_back_as_it_was_for_its_model_alone(tmp_path: Path) -> None:
    model, file = small_model(grid=GRID, vocab=16), str(tmp_path / "model.safetensors")
    save_model(file, model)
    head = OrderHead(HeadSpec.of(model.spec, model_id(file), width=8, first=2)).eval()
    save_head(head_file(file), head)
    codes, condition = random_codes(model, 3), model.condition(random_text(model, 3))
    expected = predict_orders(model, codes, condition, head).order_BN
    assert torch.equal(predict_orders(model, codes, condition, load_head(head_file(file), model, model_id(file))).order_BN, expected)
    with pytest.raises(UserError, match="this order head was trained on the rows of model"):
        load_head(head_file(file), model, "another")


def test_it_is_refused_once_its_orders_were_extracted_anew(data: HeadData, tmp_path: Path) -> None:
    """It is refused once the orders that it learned from were extracted anew."""
    head, report = train_head(data, CONFIG.model_copy(update={"steps": 1}), "exact", seed=0)
    assert head.spec.settings_id == report.settings_id == "s" and head.spec.heldout_fraction == CONFIG.heldout_fraction
    uri = str(tmp_path / "head.safetensors")
    save_head(uri, head)
    assert load_head(uri, data.model, "exact", tables_id(data.files)).spec == head.spec
    anew = shutil.copytree(Path(data.tokens).parents[1], tmp_path / "run")
    files = run_files(str(anew))
    assert files.tables is not None
    first = f"{files.tables}/{table_name(data.manifest.shards[0].name)}"
    write_orders(first, dataclasses.replace(read_orders(first), settings_id="t"))
    with pytest.raises(UserError, match=r"learned from orders of the settings s, .* extracted with t\. Train the head again"):
        load_head(uri, data.model, "exact", tables_id(files))
    with pytest.raises(UserError, match="orders of several settings: t, s"):
        train_head(dataclasses.replace(data, files=files), CONFIG, "exact", seed=0)
    assert tables_id(run_files(str(tmp_path / "nothing"))) is None


def test_predicted_tables_are_written_once_for_training(data: HeadData) -> None:
    """Its orders of all images are tables that training reads and are written once."""
    head = OrderHead(HeadSpec.of(data.model.spec, "exact", width=8, first=0)).eval()
    done: list[int] = []
    assert write_predicted(data, head, 16, done.append) == SHARDS * IMAGES and done[-1] == SHARDS * IMAGES
    assert data.files.predicted is not None and data.files.tokens is not None
    uris = [f"{data.files.predicted}/{table_name(info.name)}" for info in read_manifest(data.files.tokens).shards]
    first = [Path(uri).stat().st_mtime_ns for uri in uris]
    for uri, info in zip(uris, data.manifest.shards, strict=True):
        shard = data.open(info)
        orders = join_orders(shard.keys, read_orders(uri), shard=info.name, cells=16, model_id="exact")[:, 0]
        taken = data.take(shard, np.arange(3), orders)
        assert np.array_equal(predict_orders(data.model, taken.codes_BN, taken.condition_BTD, head).order_BN.numpy(), orders[:3])
    write_predicted(data, head, 16, done.append)
    assert [Path(uri).stat().st_mtime_ns for uri in uris] == first
    other = OrderHead(HeadSpec.of(data.model.spec, "exact", width=8, first=0)).eval()
    write_predicted(data, other, 16, done.append)
    assert all(Path(uri).stat().st_mtime_ns > before for uri, before in zip(uris, first, strict=True)), "another head's orders were kept"
