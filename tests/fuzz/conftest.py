"""The folder that hostile input lives in, and a trained run in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher import run_workers
from sandbox import oar
from small_run import prepare_small_run, pretraining
from small_training import tiny_recipe

from oar_scale.config.loading import dump_recipe
from oar_scale.distributed.worker import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The sandbox. Nothing may appear beside it."""
    around = tmp_path_factory.mktemp("around")
    inside = around / "inside"
    inside.mkdir()
    yield inside
    assert os.listdir(around) == ["inside"]


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A trained run: shards, tokenizers, a checkpoint, a model, orders. Its recipe is ``run.yaml`` beside it."""
    recipe = tiny_recipe(str(folder / "run"), pretrain={"steps": 2, "global_batch": 6, "checkpoint_every": 1, "keep_checkpoints": 2})
    prepared = prepare_small_run(recipe)
    run_workers(train, 1, pretraining(prepared))
    (folder / "run.yaml").write_text(dump_recipe(recipe))
    oar(folder, "status", "run.yaml")
    return folder / "run"
