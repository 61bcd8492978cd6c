"""What several stages read of a run: codes with their captions, pictures, orders, models; an error names the stage that writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from oar_scale.config.schema import SentencePieceConfig
from oar_scale.data.images import decode_image
from oar_scale.data.manifest import read_manifest
from oar_scale.data.shards import identity, read_shard, read_token_shard
from oar_scale.errors import UserError
from oar_scale.orders.order_table import join_orders, read_orders, table_name
from oar_scale.registry import MODELS, ModelName
from oar_scale.results.examples import Picture
from oar_scale.run.context import ONE_ORDER, OTHER_LAYOUT, Run
from oar_scale.storage import fetch, join, open_storage
from oar_scale.tokenizers.prompts import Field, Prompt, PromptEncoder, check_features, for_new_prompts, load_prompts


@dataclass(frozen=True)
class Tokens:
    """Images as codes: view 0, in the order of the shards."""

    keys: list[str]
    captions: list[str]
    codes_SN: NDArray[np.int64]
    prompts: list[Prompt]
    """What the model is conditioned on for each image: its caption, label or features."""
    families: list[str]
    """What each image is a variant of (``SourceImage.family``); empty where nothing says it."""

    @property
    def family_names(self) -> list[str]:
        """The family of each image; one without is a family of its own."""
        return [family or f"image {key}" for key, family in zip(self.keys, self.families, strict=True)]

    @property
    def families_S(self) -> NDArray[np.int64]:
        """The same number for images of one family, which are not independent of each other."""
        return np.unique(self.family_names, return_inverse=True)[1]


def require(run: Run, uri: str, stage: str) -> str:
    """``uri`` itself, if it is there.

    Raises:
        UserError: it is not; names the stage that writes it.
    """
    if open_storage(uri).exists(uri):
        return uri
    marker = run.marker(stage)
    if open_storage(marker).exists(marker):  # a run skips the stage, and would end here again
        raise UserError(
            f"{uri}: missing, although the stage {stage} has written it and is done. "
            f"Put it back, or do the stage again: oar run RECIPE --only {stage}"
        )
    raise UserError(f"{uri}: missing. The stage {stage} writes it: run that first.")


def require_any_order(run: Run) -> None:
    """Raises UserError for a recipe whose model has its raster order only."""
    if run.recipe.model.layout == "raster":
        raise UserError(f"{run.at()}: {ONE_ORDER}.\n{OTHER_LAYOUT}")


def model_files(run: Run) -> dict[ModelName, str]:
    """Local files of the run's models; the control only where the recipe has one. Raises UserError as :func:`require`."""
    wanted = [name for name in MODELS if name != "control" or run.recipe.pipeline.control]
    return {name: fetch(require_model(run, name), run.cache) for name in wanted}


def require_model(run: Run, name: str) -> str:
    """The file of one of the run's models. Raises UserError as :func:`require`, and for a name that the recipe has no model of."""
    if name not in run.recipe.models():
        raise UserError(f"no model {name!r} in this run; it has: {', '.join(run.recipe.models())}")
    stages = {model.name: model.stage for model in MODELS.values()} | {stage.model: stage.name for stage in run.recipe.stages()}
    return require(run, run.model_uri(name), stages[name])


def prompt_encoder(run: Run, *, new: bool = False) -> PromptEncoder:
    """The encoder, by the recipe's ``tokenizer.text``, of the prompts in the token shards, or of ``new`` ones that somebody types.

    Raises:
        UserError: the stage tokenizer has not finished, or the shards hold features of another text tower.
    """
    config = run.recipe.tokenizer.text
    if isinstance(config, SentencePieceConfig):
        require(run, run.text_uri, "tokenizer")
    if new:
        return load_prompts(for_new_prompts(config), run.at("tokenizers"))
    prompts, tokens = load_prompts(config, run.at("tokenizers")), run.at("tokens", "train")
    if open_storage(tokens).exists(join(tokens, "manifest.json")):
        check_features(read_manifest(tokens).features, prompts, tokens)
    return prompts


def read_tokens(run: Run, split: str, limit: int | None = None, field: Field = "txt") -> Tokens:
    """The first ``limit`` images of a split (default: all) as codes. Raises UserError where the stage has not finished."""
    folder = run.at("tokens", split)
    require(run, join(folder, "manifest.json"), "tokens")
    keys: list[str] = []
    captions: list[str] = []
    prompts: list[Prompt] = []
    families: list[str] = []
    codes: list[NDArray[np.int64]] = []
    for info in read_manifest(folder).shards:
        if limit is None or len(keys) < limit:
            shard = read_token_shard(join(folder, info.name), run.cache, info)
            keys += shard.keys
            captions += shard.captions
            prompts += shard.prompts(field)
            families += [identity(shard.metadata(row))[1] for row in range(len(shard))]
            codes.append(shard.view(0).astype(np.int64))
    return Tokens(keys[:limit], captions[:limit], np.concatenate(codes)[:limit], prompts[:limit], families[:limit])


def read_pictures(run: Run, split: str, keys: list[str]) -> list[Picture]:
    """The images that the first tokens of a split were made from.

    Raises:
        UserError: the image shards hold others, or the stage has not finished.
    """
    folder = run.at("images", split)
    require(run, join(folder, "manifest.json"), "data")
    wanted, pictures = set(keys), dict[str, Picture]()
    for info in read_manifest(folder).shards:
        if len(pictures) < len(wanted):
            for sample in read_shard(join(folder, info.name), run.cache, info):
                key = sample["__key__"]
                if key in wanted:
                    pictures[key] = np.asarray(decode_image(sample["png"], f"{join(folder, info.name)}: image of sample {key!r}"))
    if len(pictures) < len(wanted):
        raise UserError(f"{folder}: these are not the images that the tokens were made from. Run the stage tokens again.")
    return [pictures[key] for key in keys]


def training_pictures(run: Run, count: int) -> Iterator[Picture]:
    """The first training images, one after the other. Raises UserError where the stage has not finished."""
    folder = run.at("images", "train")
    require(run, join(folder, "manifest.json"), "data")
    samples = (sample for info in read_manifest(folder).shards for sample in read_shard(join(folder, info.name), run.cache, info))
    for sample in islice(samples, count):
        yield np.asarray(decode_image(sample["png"], f"{folder}: image of sample {sample['__key__']!r}"))


def without_variant(heldout: Tokens, train: Tokens) -> NDArray[np.bool_]:
    """Which held-out images [S] share no family with an image of ``train``, which holds all training images."""
    in_train = set(train.families) - {""}
    return np.array([family not in in_train for family in heldout.families])


def read_train_orders(run: Run, train: Tokens) -> NDArray[np.uint16]:
    """The stored order [S, N] of each of the first training images, which ``train`` holds; the first one where it has several.

    Raises:
        UserError: one is missing.
    """
    folder, start = run.at("tokens", "train"), 0
    orders: list[NDArray[np.uint16]] = []
    for info in read_manifest(folder).shards:
        if start >= len(train.keys):
            break
        uri = require(run, run.at("orders", "train", table_name(info.name)), "extract")
        keys = train.keys[start : start + info.samples]
        orders.append(join_orders(keys, read_orders(uri), shard=join(folder, info.name), cells=run.recipe.grid**2)[:, 0])
        start += info.samples
    return np.concatenate(orders)
