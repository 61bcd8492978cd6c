"""The size of a recipe's model and data, before any tokenizer, shard or weight exists. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from oar_scale.config.schema import ClipTextConfig, FeaturesConfig, LabelsConfig, Layout, OpenMojiSource, Recipe, TextConfig
from oar_scale.data.manifest import read_manifest
from oar_scale.errors import UserError
from oar_scale.model.spec import ClassSpec, FeatureSpec, ModelSpec, TextSpec
from oar_scale.planning.assumptions import Assumptions
from oar_scale.storage import join

VECTORS: dict[Layout, Callable[[int], int]] = {
    "raster": lambda cells: 0,
    "instructed": lambda cells: 1,
    "dual": lambda cells: 2,
    "decoupled": lambda cells: 2,
    "grouped": lambda cells: cells + 1 + 1 + 2,  # positions, question, norm
}
"""Learned vectors that a layout has for what it asks and where, as a function of the number of cells."""


def spec_of(recipe: Recipe) -> ModelSpec:
    """The spec that the recipe's model will have; the tokenizer is assumed to be as its section describes."""
    return ModelSpec.from_recipe(
        recipe.model,
        vocab_size=recipe.tokenizer.image.codebook_size,
        grid=recipe.grid,
        condition=_condition(recipe.tokenizer.text, recipe.model.text_encoder_layers),
    )


def _condition(text: TextConfig, encoder_layers: int) -> ClassSpec | TextSpec | FeatureSpec:
    match text:
        case LabelsConfig():
            return ClassSpec(classes=text.classes)
        case FeaturesConfig():
            return FeatureSpec(width=text.width, rows=text.rows)
        case ClipTextConfig():
            width, joint, rows = _tower(text.architecture)
            return FeatureSpec(width=width, rows=rows) if text.features == "tokens" else FeatureSpec(width=joint, rows=1)
    return TextSpec(vocab=text.vocab_size, rows=text.max_tokens, encoder_layers=encoder_layers)


def _tower(architecture: str) -> tuple[int, int, int]:
    """Width, width of the joint space and context length of an open_clip text tower, from open_clip's own description of it.

    The file is read where open_clip is installed; importing open_clip would bring torch.

    Raises:
        UserError: open_clip has no such architecture, or one with another kind of text tower.
    """
    package = find_spec("open_clip")
    folder = os.path.join(os.path.dirname(package.origin), "model_configs") if package and package.origin else ""
    try:
        with open(os.path.join(folder, f"{architecture}.json"), encoding="utf-8") as file:
            config = json.load(file)
        text = config["text_cfg"]
        return int(text["width"]), int(config["embed_dim"]), int(text["context_length"])
    except (OSError, KeyError) as error:
        raise UserError(
            f"tokenizer.text.architecture = {architecture}: open_clip, where it is installed, describes no plain text tower of this name "
            f"({folder or 'it is not installed'}). Names: python -c 'import open_clip; print(open_clip.list_models())'"
        ) from error


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters, by part. A test compares them with those of the real model."""

    blocks: int
    """The trunk."""
    codes: int
    """Embedding of the codes, and the output head."""
    condition: int
    rest: int
    """The last norm and the layout's vectors."""
    largest: int
    """The largest single parameter."""

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.blocks + self.codes + self.condition + self.rest


def parameters(spec: ModelSpec) -> ParameterCounts:
    """Count them: the null of a LlamaGen text model, which is never trained, included."""
    table = spec.vocab_size * spec.dim
    matrices = (_qkv(spec), spec.dim * spec.dim, spec.dim * spec.ffn_hidden, table)
    return ParameterCounts(
        blocks=_blocks(spec),
        codes=2 * table,
        condition=_condition_parameters(spec),
        rest=_norm(spec) + VECTORS[spec.layout](spec.cells) * spec.dim,
        largest=max(matrices),
    )


def _qkv(spec: ModelSpec) -> int:
    return spec.dim * (spec.heads + 2 * (spec.kv_heads or spec.heads)) * spec.head_dim


def _norm(spec: ModelSpec) -> int:
    """A norm of the trunk: a scale, in family vit also a shift."""
    return spec.dim if spec.block == "llama" else 2 * spec.dim


def block_parameters(spec: ModelSpec) -> int:
    """Number of parameters of one block, with self-attention."""
    matrices = _qkv(spec) + spec.dim * spec.dim + (3 if spec.block == "llama" else 2) * spec.dim * spec.ffn_hidden
    biases = _qkv(spec) // spec.dim + 2 * spec.dim + spec.ffn_hidden if spec.block == "vit" else 0
    return matrices + biases + 2 * _norm(spec)


def _blocks(spec: ModelSpec) -> int:
    """All blocks, and what lies between the halves of a decoupled model: a norm, keys and values that its second half shares."""
    if not spec.decoupled:
        return spec.layers * block_parameters(spec)
    shared = _qkv(spec) - spec.dim * spec.heads * spec.head_dim
    return spec.layers * block_parameters(spec) - (spec.layers // 2 - 1) * shared + spec.dim


def _condition_parameters(spec: ModelSpec) -> int:
    match spec.condition:
        case ClassSpec() as kind:
            return (kind.classes + 1) * spec.dim
        case TextSpec() as kind:
            return (kind.vocab + 2 * kind.rows) * spec.dim + _norm(spec) + kind.encoder_layers * block_parameters(spec)
        case FeatureSpec() as kind:
            return (kind.width + spec.dim) * spec.dim + (kind.null_rows or kind.rows) * kind.width


@dataclass(frozen=True)
class Images:
    """Number of training images."""

    count: int
    source: str
    """Where the number comes from, for the report."""


def training_images(recipe: Recipe, given: int | None, assumed: Assumptions) -> Images | None:
    """Images of the training split: as given, as the run's shards say, or as is known of the data set; None: unknown."""
    if given is not None:
        return Images(given, "--images")
    tokens = join(recipe.root, "tokens", "train")
    if os.path.exists(join(tokens, "manifest.json")):
        return Images(read_manifest(tokens).samples, tokens)
    source = recipe.data.source
    known = assumed.data_set(["openmoji"] if isinstance(source, OpenMojiSource) else [recipe.name])
    if known is None:
        return None
    if isinstance(source, OpenMojiSource) and source.limit is not None:
        known = min(known, source.limit)
    left_out = "shares held out and kept for a test" if recipe.data.test_fraction else "share held out"
    return Images(round(known * recipe.data.train_fraction), f"the data set, without the {left_out}")
