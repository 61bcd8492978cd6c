"""The same twenty steps for every engine: a tiny model whose weights and batches come from NumPy, so that they are the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oar_scale.config.schema import Layout, Recipe
from oar_scale.data.stream import Batch
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.spec import ClassSpec
from oar_scale.tokenizers.prompts import LabelEncoder
from oar_scale.training.engine import Engine

STEPS, IMAGES, CLASSES = 20, 6, 3
GOLDEN = Path(__file__).parent / "golden" / "losses.json"
PROMPTS = LabelEncoder(CLASSES)
LAYOUTS: tuple[Layout, ...] = ("raster", "instructed", "dual", "decoupled", "grouped")


def golden(layout: Layout) -> list[float]:
    """The losses as they are committed."""
    curves: dict[str, list[float]] = json.loads(GOLDEN.read_text())
    return curves[layout]


def golden_recipe(layout: Layout = "instructed", **parallel: Any) -> Recipe:
    """Micro-batches of one image, clipping at a norm that some steps exceed, weight decay, a moving average."""
    training = {"steps": STEPS, "global_batch": IMAGES, "lr": 1e-2, "warmup_steps": 2, "clip_norm": 0.5, "ema_decay": 0.9}
    settings = {"micro_batch": 1, "workers": 1, "zero_stage": 0, "precision": "fp32", **parallel}
    sections = {"data": {"canonical_streams": IMAGES}, "pretrain": training, "finetune": {"global_batch": IMAGES}}
    return Recipe.model_validate({"name": "golden", "model": {"layout": layout}, "parallel": settings, **sections})


def golden_model(layout: Layout) -> AnyOrderModel:
    """Two layers, 4 x 4 codes of 32."""
    spec = ModelSpec(
        layout=layout, dim=16, layers=2, heads=2, ffn_hidden=32, vocab_size=32, grid=4, dropout=0.0, condition=ClassSpec(classes=CLASSES)
    )
    model, noise = AnyOrderModel(spec), np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = noise.normal(scale=0.1, size=tuple(parameter.shape)) + (parameter.ndim == 1)
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return model


def golden_batch(layout: Layout, step: int, images: slice = slice(None)) -> Batch:
    """Codes that a model can learn: each image repeats one of three rows of codes. ``images``: a rank's share of the six."""
    noise = np.random.default_rng(step)
    labels = noise.integers(CLASSES, size=IMAGES)
    codes = (labels[:, None] * 10 + np.arange(16) % 4 + noise.integers(2, size=(IMAGES, 16))).astype(np.int64)
    uids = torch.arange(step * IMAGES, (step + 1) * IMAGES)
    raster = torch.arange(16).expand(IMAGES, -1)
    return Batch(
        step=step,
        uid_b=uids[images],
        codes_bN=torch.from_numpy(codes)[images],
        encoded_prompts_b=torch.from_numpy(labels)[:, None][images],
        drop_b=torch.from_numpy(noise.random(IMAGES) < 0.2)[images],
        seed=0,
        epoch_b=torch.zeros_like(uids)[images],
        fixed_b=torch.full((IMAGES,), layout == "raster")[images],
        fixed_bN=raster[images],
    )


def losses(engine: Engine, images: slice = slice(None), first: int = 0, end: int = STEPS) -> list[float]:
    """Take the steps ``first`` to ``end - 1`` at the peak rate; the loss of each."""
    return [engine.train_step(golden_batch(engine.spec.layout, step, images), 1e-2).loss for step in range(first, end)]


def rewrite() -> None:
    """Compute the curves anew: ``python tests/golden_training.py``. A change of them is a change of the method: say why in the commit."""
    from oar_scale.training.plain_engine import PlainEngine

    torch.set_num_threads(1)
    curves = {}
    for layout in LAYOUTS:
        recipe = golden_recipe(layout)
        curves[layout] = losses(PlainEngine(golden_model(layout), PROMPTS, recipe.pretrain, recipe.parallel))
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    rewrite()
