"""A run that is ready to be trained: real drawings, real shards, tokenizers that know nothing yet. Needs no Ray."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from oar_scale.config.schema import Recipe, SentencePieceConfig
from oar_scale.data.manifest import read_manifest, write_manifest
from oar_scale.data.tokenize import token_manifest, tokenize_shard
from oar_scale.model import AnyOrderModel, ModelSpec, save_model
from oar_scale.model.spec import condition_spec
from oar_scale.run.context import Run
from oar_scale.stages.data import run_data
from oar_scale.storage import open_storage
from oar_scale.tokenizers.prompts import load_prompts
from oar_scale.tokenizers.text import train_text_tokenizer
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq, save_vq
from oar_scale.training.job import TrainingJob


def small_recipe(run_dir: str, **changes: Any) -> Recipe:
    """96 drawings, a quarter held out, an 0.1 M parameter model, ten steps on two workers."""
    settings: dict[str, Any] = {
        "name": "small",
        "run_dir": run_dir,
        "data": {
            "source": {"type": "openmoji", "limit": 96},
            "heldout_fraction": 0.25,
            "samples_per_shard": 16,
            "canonical_streams": 4,
            "shuffle_window_shards": 2,
        },
        "tokenizer": {"text": {"vocab_size": 100}, "views": ("center", "jitter1")},
        "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_multiple_of": 32},
        "parallel": {"micro_batch": 4},
        "pretrain": {
            "steps": 10,
            "global_batch": 8,
            "warmup_steps": 2,
            "log_every": 1,
            "evaluate_every": 5,
            "checkpoint_every": 3,
            "keep_checkpoints": 3,
        },
        "finetune": {"global_batch": 8, "steps": 4},
    }
    for section, value in changes.items():
        settings[section] = {**settings.get(section, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(settings)


MADE_OF = {"name", "seed", "data", "tokenizer", "model"}
"""The parts of a recipe that say what :func:`prepare_small_run` makes."""


def prepare_small_run(recipe: Recipe) -> Run:
    """Data, tokenizers, token shards and a base model; recipes that agree in what these are made of get the same files, made once."""
    run = Run(recipe)
    if run.at().startswith("s3://"):
        _make(run)
    else:
        for name, content in _files(recipe.model_dump_json(include=MADE_OF)).items():
            path = Path(run.at(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    torch.manual_seed(0)  # whether they were made now or before
    return run


@cache
def _files(recipe: str) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        _make(Run(Recipe.model_validate_json(recipe).model_copy(update={"run_dir": folder})))
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def _make(run: Run) -> None:
    run_data(run)
    recipe = run.recipe
    text = recipe.tokenizer.text
    if isinstance(text, SentencePieceConfig):
        train_text_tokenizer(_captions(run), text.vocab_size, text.max_tokens).save(run.text_uri)
    torch.manual_seed(0)
    spec = VQSpec(image_size=32, channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_channels=32, codebook_size=64)
    save_vq(run.vq_uri, VQTokenizer(spec))
    vq = load_vq(run.vq_uri)
    for split in ("train", "heldout"):
        images = read_manifest(run.at("images", split))
        views = recipe.tokenizer.views if split == "train" else ("center",)
        shards = [tokenize_shard(run.at("images", split), run.at("tokens", split), s, vq, views, run.cache) for s in images.shards]
        write_manifest(run.at("tokens", split), token_manifest(shards, vq, views, images.attribution))
    condition = condition_spec(load_prompts(recipe.tokenizer.text, run.at("tokenizers")), encoder_layers=recipe.model.text_encoder_layers)
    model = ModelSpec.from_recipe(recipe.model, vocab_size=64, grid=8, condition=condition)
    save_model(run.model_uri("base"), AnyOrderModel(model))


def pretraining(run: Run) -> TrainingJob:
    return TrainingJob(run.recipe, "pretrain", run.at(), run.local(), run.model_uri("base"), run.model_uri("any_order"))


def _captions(run: Run) -> list[str]:
    from oar_scale.stages.tokenizer import read_images

    return read_images(run, "train")[1]


def copy_run(run: Run, folder: str, root: str | None = None, **changes: Any) -> Run:
    """A prepared run again: its shards, tokenizers and base model in another folder (and storage), under a changed recipe."""
    if root is not None:
        changes["storage"] = {**changes.get("storage", {}), "root": root}
    copy = Run(small_recipe(folder, **changes))
    for part in ("tokens", "tokenizers", "models/base.safetensors"):
        source = run.at(part)
        storage = open_storage(source)
        for uri in [source] if storage.exists(source) else storage.list(source):
            target = copy.at(part, uri.removeprefix(source))
            if not open_storage(target).exists(target):
                open_storage(target).upload(uri, target)
    return copy
