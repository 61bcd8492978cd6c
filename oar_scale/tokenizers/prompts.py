"""Prompts, which the model is conditioned on, as tensors: the caption of an image, its class label, or precomputed features.

    shard sample --field--> prompt --encode--> encoded_prompts --conditioning_inputs--> cond_inputs of ``AnyOrderModel.condition``

``encode`` is cheap and runs where the batch is made (in a loader process); ``conditioning_inputs`` runs on the model's device, and only a
frozen text tower computes anything there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from oar_scale.config.schema import ClipTextConfig, FeaturesConfig, LabelsConfig, SentencePieceConfig, TextConfig
from oar_scale.errors import UserError
from oar_scale.storage import join, read_json, write_json
from oar_scale.text import shown
from oar_scale.tokenizers.clip_spec import ClipTextSpec
from oar_scale.tokenizers.clip_text import ClipText
from oar_scale.tokenizers.text import TextTokenizer
from oar_scale.tokenizers.text_features import TextFeatures

Field = Literal["txt", "label", "features"]
"""Which part of a shard sample the prompts are: ``KEY.txt``, ``label`` of ``KEY.json``, or ``KEY.features.npy``."""

Prompt = str | int | NDArray[np.generic]
"""A caption, a class label, or features [T, F] of a caption."""

TEXT_FILE, FEATURES_FILE = "text.model", "text-features.json"


class PromptEncoder(Protocol):
    """Turns the prompts of one kind into a tensor with a row for each."""

    @property
    def field(self) -> Field:
        """The part of a shard sample that holds the prompts."""

    @property
    def max_tokens(self) -> int:
        """T: length of an encoded prompt."""

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size); 0 where prompts are no ids."""

    def check(self, prompt: Any) -> None:
        """Raise UserError for a prompt that :meth:`encode` refuses, without making a tensor of it."""

    def encode(self, prompts: Sequence[Any]) -> Tensor:
        """A row for each prompt; each encoder takes its own kind of prompts. Raises UserError for what it cannot encode."""


class LabelEncoder:
    """Class labels (numbers, or their digits on a command line) to int64 [B, 1]."""

    field: ClassVar[Field] = "label"
    max_tokens = 1

    def __init__(self, classes: int) -> None:
        self.vocab_size = classes

    def check(self, prompt: int | str) -> None:
        """Raise UserError for what is no label below the number of classes."""
        if not re.fullmatch("[0-9]{1,18}", str(prompt)) or int(prompt) >= self.vocab_size:
            raise UserError(f"{shown(prompt)} is no class label: this model knows the labels 0 to {self.vocab_size - 1}")

    def encode(self, prompts: Sequence[int | str]) -> Tensor:
        """Labels as int64 [B, 1]. Raises UserError as :meth:`check`."""
        for prompt in prompts:
            self.check(prompt)
        return torch.tensor([[int(prompt)] for prompt in prompts], dtype=torch.long)


class FeatureReader:
    """Precomputed features, arrays of at most T rows [t, F], to float32 [B, T, F]; missing rows at the end are zeros."""

    field: ClassVar[Field] = "features"
    vocab_size = 0

    def __init__(self, rows: int, width: int, tower: ClipTextSpec | None = None, tower_id: str | None = None) -> None:
        self.max_tokens, self.width = rows, width
        self.tower, self.tower_id = tower, tower_id
        """The text tower that computed the features, and the hash of its weights; None where the shards do not contain it."""

    def check(self, prompt: Prompt) -> None:
        """Raise UserError for features with more rows, another width, or values that are no finite numbers, and for captions."""
        self._float32(prompt)

    def encode(self, prompts: Sequence[Prompt]) -> Tensor:
        """Features as float32 [B, T, F]. Raises UserError as :meth:`check`."""
        encoded_BTF = torch.zeros(len(prompts), self.max_tokens, self.width)
        for row, prompt in enumerate(prompts):
            features_tF = self._float32(prompt)
            encoded_BTF[row, : len(features_tF)] = torch.from_numpy(features_tF)
        return encoded_BTF

    def _float32(self, prompt: Prompt) -> NDArray[np.float32]:
        """Features [t, F] as the model takes them. Raises UserError as :meth:`check`."""
        wanted = f"this model's prompts are precomputed features {(self.max_tokens, self.width)} (rows at most, width)"
        if isinstance(prompt, str):
            raise UserError(f"{wanted}, got the caption {shown(prompt)}")
        try:
            given = np.asarray(prompt)
            if given.ndim != 2 or len(given) > self.max_tokens or given.shape[1] != self.width:
                raise UserError(f"{wanted}, got features {given.shape}")
            with np.errstate(over="ignore"):  # what float32 does not hold is named below
                features_tF = given.astype(np.float32, copy=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{wanted}, got some that are no numbers, or rows of unequal length ({error})") from error
        finite_tF = np.isfinite(features_tF)
        if not finite_tF.all():  # the model would answer with NaN, as if its weights were damaged
            row, column = np.argwhere(~finite_tF)[0].tolist()
            raise UserError(
                f"{wanted}, got some with {features_tF[row, column]} in row {row}, column {column} (as float32). Compute them again, in "
                "float32: float16 overflows above 65,504"
            )
        return features_tF


def load_prompts(config: TextConfig, folder: str) -> PromptEncoder:
    """The encoder of the prompts in a run's shards, as ``tokenizer.text`` of the recipe describes.

    Where the shards hold a text tower's features (``precompute``), the encoder reads those and no tower is loaded; for prompts that
    are in no shard, see :func:`for_new_prompts`.

    Args:
        folder: of the run's tokenizers; holds the SentencePiece model, or the description of precomputed features.

    Raises:
        UserError: weights that are missing or of another kind.
    """
    match config:
        case SentencePieceConfig():
            return TextTokenizer.load(join(folder, TEXT_FILE), config.max_tokens)
        case ClipTextConfig() if config.precompute:
            made = _read_features_note(folder)
            return FeatureReader(
                made.rows, made.width, ClipTextSpec(architecture=config.architecture, features=config.features), made.tower_id
            )
        case ClipTextConfig():
            return ClipText.load(config.architecture, config.weights, features=config.features)
        case FeaturesConfig():
            return FeatureReader(config.rows, config.width)
        case LabelsConfig():
            return LabelEncoder(config.classes)


def for_new_prompts(config: TextConfig) -> TextConfig:
    """The section to load an encoder with for prompts that are in no shard: the tower runs, even if features were precomputed."""
    return config.model_copy(update={"precompute": False}) if isinstance(config, ClipTextConfig) else config


def features_of(text: ClipText) -> TextFeatures:
    """The description of the features that ``text`` computes, for a manifest."""
    return TextFeatures(tower_id=text.content_id, rows=text.rows, width=text.width)


def write_features_note(text: ClipText, folder: str) -> None:
    """Write the description of precomputed features into the folder of the tokenizers, so that readers need not load the tower."""
    write_json(join(folder, FEATURES_FILE), features_of(text).model_dump())


def check_features(stored: TextFeatures | None, prompts: PromptEncoder, where: str) -> None:
    """Check that shards hold the features that ``prompts`` reads.

    Args:
        stored: ``features`` of the shards' manifest.

    Raises:
        UserError: the shards hold no features, or those of another tower.
    """
    if not isinstance(prompts, FeatureReader) or prompts.tower_id is None:
        return
    if stored is None:
        raise UserError(
            f"{where}: these shards hold no text features. Run the stage tokens again, or set tokenizer.text.precompute: false."
        )
    if stored.tower_id != prompts.tower_id:
        raise UserError(
            f"{where}: the text features are of the tower {stored.tower_id}, tokenizer.text is the tower {prompts.tower_id}. "
            "Name the weights they were made with, or run the stage tokens again."
        )


def _read_features_note(folder: str) -> TextFeatures:
    uri = join(folder, FEATURES_FILE)
    try:
        return TextFeatures.model_validate(read_json(uri))
    except ValidationError as error:
        raise UserError(f"{uri}: not what the stage tokenizer writes. Run it again.") from error


def conditioning_inputs(encoder: PromptEncoder, encoded_prompts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The ``cond_inputs`` of ``AnyOrderModel.condition``: a frozen tower's features of the encoded prompts, else these themselves.

    Args:
        dtype: of the model that is conditioned. For one in bfloat16 on a GPU the tower's matrix products are in bfloat16 too, which it
            rounds the features to anyway; in float32 they would take about a tenth of its training step.
    """
    if isinstance(encoder, ClipText):
        device = encoded_prompts.device
        return encoder.to(device).features(encoded_prompts, half=dtype == torch.bfloat16 and device.type == "cuda")
    return encoded_prompts


PROMPTS_AT_ONCE = 256
"""That a text tower encodes in one call."""


def cond_inputs_of(encoder: PromptEncoder, prompts: Sequence[Prompt], device: torch.device) -> Tensor:
    """:func:`conditioning_inputs` of any number of prompts, in float32 on the CPU; a text tower takes them in batches, on ``device``."""
    starts = range(0, len(prompts), PROMPTS_AT_ONCE)
    encoded = (encoder.encode(prompts[start : start + PROMPTS_AT_ONCE]) for start in starts)
    return torch.cat([conditioning_inputs(encoder, each.to(device)).cpu() for each in encoded])
