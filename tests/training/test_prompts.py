"""Training on what is not SentencePiece: class labels, precomputed features, a frozen text tower; and in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launcher import run_workers
from PIL import Image
from pool_worker import write_output
from small_run import prepare_small_run, pretraining, small_recipe

from oar_scale.errors import UserError
from oar_scale.model import load_model
from oar_scale.observe.events import read_events
from oar_scale.orders.order_table import read_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.run.context import Run
from oar_scale.shard_pool.extraction_pool import ExtractionJob, ExtractionWorker
from oar_scale.training.job import TrainingJob

TOWER = "ViT-S-16-alt"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 noisy squares in three colours, each with caption, label and features."""
    folder, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(48):
        label = index % 3
        pixels = noise.integers(0, 120, (32, 32, 3), dtype=np.uint8)
        pixels[8:24, 8:24, label] = 255
        Image.fromarray(pixels).save(folder / f"p{index}.png")
        (folder / f"p{index}.txt").write_text(f"a square of colour {label}")
        (folder / f"p{index}.json").write_text(json.dumps({"label": label}))
        np.save(folder / f"p{index}.features.npy", noise.normal(size=(2, 6)).astype(np.float16) + label)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    import open_clip  # seconds, in each process that collects tests

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tower") / "clip.pt"
    torch.save(open_clip.create_model(TOWER, pretrained=None).state_dict(), path)
    return str(path)


def train_all(jobs: list[TrainingJob]) -> None:
    from oar_scale.distributed.worker import train

    for job in jobs:
        train(job)


@pytest.fixture(scope="module")
def runs(pictures: Path, tower: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Four short pretrainings in one process."""
    texts: dict[str, dict[str, Any]] = {
        "labels": {"type": "labels", "classes": 3},
        "features": {"type": "features", "rows": 2, "width": 6},
        "open_clip": {"type": "open_clip", "architecture": TOWER, "weights": tower},
        "captions": {"vocab_size": 64, "max_tokens": 8},
    }
    layouts = {"labels": "dual", "features": "raster", "open_clip": "instructed", "captions": "dual"}
    runs = {}
    for name, text in texts.items():
        folder = tmp_path_factory.mktemp(name)
        recipe = small_recipe(
            str(folder),
            data={"source": {"type": "folder", "path": str(pictures)}},
            tokenizer={"text": text, "views": ("center",)},
            model={"layout": layouts[name]},
            parallel={"workers": 1, "precision": "fp32", "activation_checkpointing": "selective" if name == "labels" else "none"},
            # The pictures themselves once more, tokenised on the fly.
            pretrain={
                "steps": 4,
                "checkpoint_every": 4,
                "evaluate_every": 4,
                "mix": [{"shards": str(folder / "images" / "train"), "weight": 0.5}] if name == "captions" else [],
            },
        )
        runs[name] = prepare_small_run(recipe)
    run_workers(train_all, 1, [pretraining(run) for run in runs.values()])
    return runs


@pytest.mark.parametrize("name", ["labels", "features", "open_clip", "captions"])
def test_a_model_learns_from_such_prompts(runs: dict[str, Run], name: str) -> None:
    events = read_events(runs[name].events, "pretrain")
    heldout = [event["nll_random"] for event in events if event["kind"] == "heldout"]
    assert heldout[-1] < heldout[0] - 0.01
    trained, base = (load_model(runs[name].model_uri(model)) for model in ("any_order", "base"))
    moved = {n for n, tensor in trained.state_dict().items() if not torch.equal(tensor, base.state_dict()[n])}
    assert moved == set(base.state_dict()), "every tensor is trained, the null condition included"


@pytest.mark.parametrize("name", ["labels", "open_clip"])
def test_orders_are_extracted_under_the_same_prompts(runs: dict[str, Run], name: str, tmp_path: Path) -> None:
    run = runs[name]
    job = ExtractionJob(
        tokens=run.at("tokens", "train"),
        orders=str(tmp_path),
        model=run.model_uri("any_order"),
        text=run.recipe.tokenizer.text,
        tokenizers=run.at("tokenizers"),
        cache_dir=run.cache,
        settings=ExtractionSettings(),
        batch=16,
        precision="fp32",
    )
    write_output(ExtractionWorker(job), "00000.tar")
    orders = read_orders(str(tmp_path / "00000.parquet")).order_SN
    assert (np.sort(orders, axis=1) == np.arange(64)).all()


def test_another_kind_of_prompts_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["labels"]
    job = ExtractionJob(
        tokens=run.at("tokens", "train"),
        orders=str(tmp_path),
        model=run.model_uri("any_order"),
        text=runs["captions"].recipe.tokenizer.text,
        tokenizers=runs["captions"].at("tokenizers"),
        cache_dir=run.cache,
        settings=ExtractionSettings(),
        batch=16,
        precision="fp32",
    )
    with pytest.raises(UserError, match=r"its condition has type class, the prompt encoder of tokenizer\.text makes text"):
        ExtractionWorker(job)
