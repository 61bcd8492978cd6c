"""The folder of a small run, with the parts that drawing needs: tokenizers and a model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_models import small_model

from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import Recipe
from oar_scale.model import save_model
from oar_scale.model.spec import TextSpec
from oar_scale.tokenizers.text import train_text_tokenizer
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, save_vq

CAPTIONS = ["a red apple", "a smiling cat", "a blue car", "two green leaves"]
GRID, CODES, PIXELS = 3, 7, 12


def small_run(folder: Path, text: dict[str, Any], condition: Any, **changes: Any) -> str:
    """The folder of a run, with the parts that drawing needs."""
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "data": {"image_size": PIXELS},
            "tokenizer": {"image": {"multipliers": (1, 1, 1)}, "text": text},
            "model": {"layout": changes.get("layout", "instructed")},
            "sample": {"guidance": 1.5, "top_k": 5},
        }
    )
    (folder / "models").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": PIXELS, "channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1, "latent_channels": 32}
    save_vq(str(folder / "tokenizers" / "vq.safetensors"), VQTokenizer(VQSpec(**sizes, codebook_size=CODES, codebook_dim=4)))
    if text["type"] == "sentencepiece":
        encoder = train_text_tokenizer(CAPTIONS, 64, 4)
        encoder.save(str(folder / "tokenizers" / "text.model"))
        condition = TextSpec(vocab=encoder.vocab_size, rows=4)
    name = "any_order" if changes.get("layout") == "raster" else "ordered"
    save_model(str(folder / "models" / f"{name}.safetensors"), small_model(grid=GRID, vocab=CODES, condition=condition, **changes))
    return str(folder)
