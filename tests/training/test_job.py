"""What a training job takes along to its workers."""

from __future__ import annotations

import pickle
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import small_model
from small_run import prepare_small_run, small_recipe
from small_training import tiny_recipe

from oar_scale.data.manifest import read_manifest
from oar_scale.data.shards import read_token_shard
from oar_scale.errors import Missing, UserError
from oar_scale.model import model_id, save_model
from oar_scale.orders.order_table import OrderTable, table_name, write_orders
from oar_scale.training.inputs import job_prompts, job_stream
from oar_scale.training.job import TrainingJob


def test_a_copy_of_a_job_knows_the_models_id(tmp_path: Path) -> None:
    """The file of the model is read for it once, and not by each of hundreds of workers."""
    file = tmp_path / "base.safetensors"
    save_model(str(file), small_model())
    job = TrainingJob(small_recipe(str(tmp_path)), "pretrain", str(tmp_path), str(tmp_path), str(file), "")
    fresh = pickle.loads(pickle.dumps(job))
    expected = model_id(str(file))
    assert job.start_id == expected
    copy = pickle.loads(pickle.dumps(job))
    file.unlink()
    assert copy.start_id == expected
    with pytest.raises(Missing):
        _ = fresh.start_id


def test_a_fine_tuning_does_not_go_on_with_other_orders(tmp_path: Path) -> None:
    """``oar run --only extract`` with other settings, while a fine-tuning has checkpoints and is not finished."""

    def job(stage: str = "finetune", **extract: Any) -> TrainingJob:
        recipe = run.recipe.model_copy(update={"extract": run.recipe.extract.model_copy(update=extract)})
        return TrainingJob(recipe, stage, run.at(), run.local(), run.model_uri("base"), "")

    run = prepare_small_run(tiny_recipe(str(tmp_path)))

    before = job().identity
    assert job(score="neg_entropy").changed_since(before) == {"extract.score": ("max_prob", "neg_entropy")}
    assert not job(actors=7).changed_since(before)
    of_control = job("control").identity
    assert not job("control", score="neg_entropy").changed_since(of_control)
    assert job("control", views=2).changed_since(of_control) == {"extract.views": (1, 2)}
    older = {name: value for name, value in before.items() if not name.startswith("extract.")}
    assert not job(score="neg_entropy").changed_since(older), "an older version did not write it"


def test_a_fine_tuning_does_not_go_on_with_orders_that_were_predicted_anew(tmp_path: Path) -> None:
    """``oar orders --train-head --predict`` between two attempts, or interrupted, or while it trains."""
    run = prepare_small_run(tiny_recipe(str(tmp_path), finetune={"order": "order-head"}))
    shards = read_manifest(run.at("tokens", "train")).shards

    def predict(head: str, *numbers: int) -> None:
        for number in numbers:
            keys = read_token_shard(run.at("tokens", "train", shards[number].name), run.cache, shards[number]).keys
            order_SN = np.tile(np.arange(64, dtype=np.uint16), (len(keys), 1))
            table = OrderTable(keys, [0] * len(keys), order_SN, np.zeros(order_SN.shape, np.float32), model_id(run.model_uri("base")), head)
            write_orders(run.at("orders", "predicted", table_name(shards[number].name)), table)

    def job(stage: str = "finetune") -> TrainingJob:
        return TrainingJob(run.recipe.of(run.recipe.stage(stage)), stage, run.at(), run.local(), run.model_uri("base"), "")

    def train(job: TrainingJob) -> None:
        deque(job_stream(job, job_prompts(job), 0, 1).batches(0, 12), maxlen=0)

    predict("one head", *range(len(shards)))
    before, of_control, begun = job().identity, job("control").identity, job()
    train(begun)
    predict("another", 0)
    assert job().changed_since(before) == {"orders/predicted": ("one head", "another")}
    assert not job("control").changed_since(of_control)
    older = {name: value for name, value in before.items() if name != "orders/predicted"}
    assert not job().changed_since(older), "an older version did not write it"
    for attempt in (begun, job()):  # it goes on while they are written; it begins when some of them are
        with pytest.raises(UserError, match=r"predicted/.*orders of (one head|another), .* --predict to its end"):
            train(attempt)
    predict("another", *range(1, len(shards)))
    train(job())
