"""What a model is told about an image, as tensors: its caption, its class label, or features somebody computed.

    shard sample --field--> prompt --encode--> tensor of the batch --model_inputs--> what ``AnyOrderModel.condition`` takes

``encode`` is cheap and runs where the batch is made; ``model_inputs`` runs on the model's device, and only a frozen text tower
has something to do there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from oar_scale.config.schema import ClipTextConfig, FeaturesConfig, LabelsConfig, SentencePieceConfig, TextConfig
from oar_scale.errors import UserError
from oar_scale.storage import join
from oar_scale.tokenizers.clip_text import ClipText
from oar_scale.tokenizers.text import TextTokenizer

Field = Literal["txt", "label", "features"]
"""Which part of a shard sample the prompts are: ``KEY.txt``, ``label`` of ``KEY.json``, or ``KEY.features.npy``."""

TEXT_FILE = "text.model"


class PromptEncoder(Protocol):
    """Prompts to a tensor with a row for each."""

    @property
    def field(self) -> Field: ...

    @property
    def max_tokens(self) -> int:
        """T: length of an encoded prompt."""

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size); 0 where prompts are no ids."""

    def encode(self, prompts: Sequence[Any]) -> Tensor: ...


class LabelEncoder:
    """Class labels (numbers, or their digits on a command line) to int64 [B, 1]."""

    field: ClassVar[Field] = "label"
    max_tokens = 1

    def __init__(self, classes: int) -> None:
        self.vocab_size = classes

    def encode(self, prompts: Sequence[int | str]) -> Tensor:
        """Raises UserError for what is no label."""
        for prompt in prompts:
            if not str(prompt).isdecimal() or int(prompt) >= self.vocab_size:
                raise UserError(f"{prompt!r} is no class label: this model knows the labels 0 to {self.vocab_size - 1}")
        return torch.tensor([[int(prompt)] for prompt in prompts], dtype=torch.long)


class FeatureReader:
    """Features that are there already, arrays [T, F], to float32 [B, T, F]."""

    field: ClassVar[Field] = "features"
    vocab_size = 0

    def __init__(self, rows: int, width: int) -> None:
        self.max_tokens, self.width = rows, width

    def encode(self, prompts: Sequence[Any]) -> Tensor:
        """Raises UserError for features of another shape, or captions."""
        wanted = (self.max_tokens, self.width)
        for prompt in prompts:
            if isinstance(prompt, str) or np.shape(prompt) != wanted:
                given = f"the caption {prompt!r}" if isinstance(prompt, str) else f"features {np.shape(prompt)}"
                raise UserError(f"this model's prompts are precomputed features {wanted} (rows, width), got {given}")
        return torch.from_numpy(np.stack([np.asarray(prompt, dtype=np.float32) for prompt in prompts]))


def load_prompts(config: TextConfig, folder: str) -> PromptEncoder:
    """The prompt encoder of a recipe's ``tokenizer.text``; a SentencePiece model lies in ``folder``.

    Raises:
        UserError: weights that are missing or of another kind.
    """
    match config:
        case SentencePieceConfig():
            return TextTokenizer.load(join(folder, TEXT_FILE), config.max_tokens)
        case ClipTextConfig():
            return ClipText.load(config.architecture, config.weights, features=config.features)
        case FeaturesConfig():
            return FeatureReader(config.rows, config.width)
        case LabelsConfig():
            return LabelEncoder(config.classes)


def model_inputs(encoder: PromptEncoder, encoded: Tensor) -> Tensor:
    """What ``AnyOrderModel.condition`` takes of an encoded batch: a frozen tower's features, else the batch as it is."""
    if isinstance(encoder, ClipText):
        return encoder.to(encoded.device).features(encoded)
    return encoded
