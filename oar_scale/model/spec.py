"""What fixes the shape of an any-order model; stored with its weights."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from oar_scale.config.schema import ModelConfig


class ModelSpec(BaseModel):
    """Sizes of the trunk (from the recipe) and of what surrounds it (from the tokenizers)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["instructed"] = "instructed"
    dim: int
    layers: int
    heads: int
    ffn_hidden: int
    vocab_size: int
    """V: codes of the image tokenizer."""
    grid: int
    text_vocab: int
    max_tokens: int
    """T: condition rows."""
    text_encoder_layers: int = 1
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    dropout: float = 0.0

    @property
    def cells(self) -> int:
        """N = grid x grid."""
        return self.grid * self.grid

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @classmethod
    def from_recipe(cls, model: ModelConfig, *, vocab_size: int, grid: int, text_vocab: int, max_tokens: int) -> ModelSpec:
        """The spec of a recipe's model, once the tokenizers are known."""
        multiple = model.ffn_multiple_of
        return cls(
            layout=model.layout,
            dim=model.dim,
            layers=model.layers,
            heads=model.heads,
            ffn_hidden=-(-int(8 * model.dim / 3) // multiple) * multiple,
            vocab_size=vocab_size,
            grid=grid,
            text_vocab=text_vocab,
            max_tokens=max_tokens,
            text_encoder_layers=model.text_encoder_layers,
            norm_eps=model.norm_eps,
            rope_base=model.rope_base,
            dropout=model.dropout,
        )
