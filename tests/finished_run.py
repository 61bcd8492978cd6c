"""A run up to its fine-tuned models, which are small and random: real drawings, shards, tokenizers and order tables. Needs no Ray."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import Recipe
from oar_scale.data.manifest import read_manifest, write_manifest
from oar_scale.data.shards import read_token_shard
from oar_scale.data.tokenize import token_manifest, tokenize_shard
from oar_scale.model import AnyOrderModel, ModelSpec, load_model, save_model
from oar_scale.model.spec import TextSpec
from oar_scale.observe.console import Console
from oar_scale.orders.extraction import extract_orders
from oar_scale.orders.order_table import OrderTable, table_name, write_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.run.artifacts import prompt_encoder
from oar_scale.run.context import Run
from oar_scale.stages.data import run_data
from oar_scale.stages.tokenizer import read_images
from oar_scale.storage import join, write_json
from oar_scale.tokenizers.text import train_text_tokenizer
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq, save_vq


def recipe(folder: Path, **changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "run_dir": str(folder),
            "data": {"source": {"type": "openmoji", "limit": 120}, "image_size": 16, "heldout_fraction": 0.4, "samples_per_shard": 32},
            "tokenizer": {"image": {"codebook_size": 32}, "text": {"vocab_size": 200, "max_tokens": 6}},
            "model": {"dim": 32, "layers": 2, "heads": 2},
            "parallel": {"workers": 1, "micro_batch": 24},
            "sample": {"images": 3},
            "evaluate": {"nll_images": 24, "feature_images": 24},
            **changes,
        }
    )


def small_model(run: Run, seed: int) -> AnyOrderModel:
    torch.manual_seed(seed)
    spec = ModelSpec.from_recipe(
        run.recipe.model, vocab_size=32, grid=run.recipe.grid, condition=TextSpec(vocab=prompt_encoder(run).vocab_size, rows=6)
    )
    model = AnyOrderModel(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    return model


def finished_run(folder: Path, **changes: Any) -> Run:
    """120 drawings, 4 x 4 cells of 32 codes; ``ordered`` has the weights of ``any_order``."""
    run = Run(recipe(folder, **changes), Console(io.StringIO()))
    write_json(run.at("stages", "data.json"), {"stage": "data", "seconds": 2.0, "started": 1.7e9, "results": run_data(run)})
    _, captions = read_images(run, "train")
    train_text_tokenizer(captions, 200, 6).save(run.text_uri)
    torch.manual_seed(1)
    spec = VQSpec(image_size=16, channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_channels=32, codebook_size=32, codebook_dim=4)
    save_vq(run.vq_uri, VQTokenizer(spec))
    vq = load_vq(run.vq_uri)
    for split in ("train", "heldout"):
        source, target = run.at("images", split), run.at("tokens", split)
        shards = [tokenize_shard(source, target, shard, vq, ("center",), run.cache) for shard in read_manifest(source).shards]
        write_manifest(target, token_manifest(shards, vq, ("center",), ""))
    for name, seed in {"base": 1, "any_order": 2, "control": 3, "ordered": 2}.items():
        save_model(run.model_uri(name), small_model(run, seed))
    write_tables(run)
    (folder / "recipe.yaml").write_text(dump_recipe(run.recipe))
    results = {"images": 80, "seconds": 4.0, "images_per_s": 20.0, "actors": 1, "poison": {}}
    write_json(run.at("stages", "extract.json"), {"stage": "extract", "seconds": 4.5, "started": 1.7e9, "results": results})
    return run


def write_tables(run: Run) -> None:
    model, folder = load_model(run.model_uri("any_order")), run.at("tokens", "train")
    for info in read_manifest(folder).shards:
        shard = read_token_shard(join(folder, info.name), run.cache, info)
        codes = torch.from_numpy(shard.view(0).astype(np.int64))
        orders = extract_orders(model, codes, model.null_condition(len(codes)), ExtractionSettings())
        order, score = orders.order_BN.numpy().astype(np.uint16), orders.score_BN.numpy()
        write_orders(
            run.at("orders", "train", table_name(info.name)), OrderTable(shard.keys, [0] * len(codes), order, score, "model", "settings")
        )
