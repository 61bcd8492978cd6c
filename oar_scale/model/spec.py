"""What fixes the shape of a model; stored with its weights. Imports no torch: sizes and costs are answered at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from oar_scale.config.schema import Layout, ModelConfig
from oar_scale.errors import UserError
from oar_scale.tokenizers.clip_spec import ClipTextSpec

if TYPE_CHECKING:
    from oar_scale.tokenizers.prompts import PromptEncoder

STRIDE: dict[Layout, int] = {"raster": 1, "instructed": 2, "dual": 1, "decoupled": 1, "grouped": 1}
"""Rows of the cache for each cell (``layouts.py``)."""
HELD: dict[Layout, int] = {"raster": 1, "instructed": 0, "dual": 0, "decoupled": 0, "grouped": 0}
"""Condition rows that wait for the first cell with the codes, instead of entering the cache first."""


_MOST_LAYERS = 2**12
_Size = Annotated[int, Field(ge=1, le=2**24)]
"""A file may say anything: tensors of such sizes have a number of bytes, and a model without values is made of them to compare shapes."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClassSpec(_Spec):
    """One condition row: the embedding of a class label; the last row of the table is the null."""

    type: Literal["class"] = "class"
    classes: _Size

    @property
    def rows(self) -> int:
        """Rows of the condition: one, the class's embedding."""
        return 1


class TextSpec(_Spec):
    """SentencePiece ids through a small bidirectional encoder that is trained along."""

    type: Literal["text"] = "text"
    vocab: _Size
    rows: _Size
    """T: condition rows; a caption's ids are cut to as many."""
    encoder_layers: int = Field(1, ge=0, le=_MOST_LAYERS)


class FeatureSpec(_Spec):
    """Features of a frozen text encoder through a two-layer MLP (LlamaGen's ``cap_proj``)."""

    type: Literal["features"] = "features"
    width: _Size
    """F: channels of a feature row."""
    rows: _Size
    """T: condition rows."""
    null_rows: _Size | None = None
    """Rows of the stored null, where more than T (LlamaGen stores 120 whatever T is)."""
    absent: Literal["null", "zero"] = "null"
    """What stands for a row without a token: the null's row, or zeros (the peers)."""
    tower: ClipTextSpec | None = None
    """The open_clip text tower that makes the features; None: somebody else computes them."""
    tower_id: str | None = None
    """Content hash of the tower's weights, which are not stored with the model."""

    @model_validator(mode="after")
    def _enough_null_rows(self) -> FeatureSpec:
        if self.null_rows is not None and self.null_rows < self.rows:
            raise ValueError(f"null_rows {self.null_rows} must not be fewer than rows {self.rows}")
        return self


ConditionSpec = Annotated[ClassSpec | TextSpec | FeatureSpec, Field(discriminator="type")]


class ModelSpec(_Spec):
    """Sizes of the trunk (from the recipe) and of what surrounds it (from the tokenizers)."""

    layout: Layout = "instructed"
    dim: _Size
    layers: int = Field(ge=1, le=_MOST_LAYERS)
    heads: _Size
    kv_heads: _Size | None = None
    """Heads of keys and values (grouped-query attention); None: as many as ``heads``."""
    ffn_hidden: _Size
    vocab_size: _Size
    """V: codes of the image tokenizer."""
    grid: int = Field(ge=1, le=2**12)
    condition: ConditionSpec
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    dropout: float = 0.0
    condition_rotation: Literal["identity", "zero"] = "identity"
    """``zero`` multiplies queries and keys of condition rows by 0, as the RandAR and LlamaGen code does: for their weights only."""
    step_attention: Literal["causal", "mutual"] = Field("causal", exclude_if=lambda value: value == "causal")
    """What the codes of one parallel step see of one another once they are placed: those before, as in training, or all, as in ARPG's
    sampler (for its weights only). Not stored where it is the default, so that files are those of versions that did not have it."""
    trainable_null: bool = True
    """False for LlamaGen's text models, whose null condition is a buffer that was never trained."""

    @property
    def cells(self) -> int:
        """N = grid x grid."""
        return self.grid * self.grid

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.heads

    @property
    def decoupled(self) -> bool:
        """Whether questions pass a half of the blocks of their own, and see what the other half made of the codes."""
        return self.layout == "decoupled"

    @property
    def grouped(self) -> bool:
        """Whether questions are rows behind the codes' rows, in the same blocks, and the cells of a step are asked for together."""
        return self.layout == "grouped"

    @property
    def mutual_steps(self) -> bool:
        """Whether the codes of a parallel step see one another all once they are placed, or each those before it."""
        return self.grouped or self.step_attention == "mutual"

    @property
    def block(self) -> Literal["llama", "vit"]:
        """The family of the trunk's blocks (``blocks.FAMILIES``)."""
        return "vit" if self.grouped else "llama"

    @property
    def rows(self) -> int:
        """L: rows of an image in the trunk when it is trained; the N questions of a decoupled model come on top."""
        return self.rows_of(self.cells)

    def rows_of(self, cells: int) -> int:
        """The same of the first cells of an order, whose last code is asked for."""
        asking = {"decoupled": 0, "grouped": cells}.get(self.layout, 1)  # beside the rows of all codes but the last
        return self.condition.rows - HELD[self.layout] + STRIDE[self.layout] * (cells - 1) + asking

    @property
    def cached_pairs(self) -> int:
        """Pairs of keys and values that a row leaves in the cache: one a layer, or of half of the layers and one that questions share."""
        return self.layers // 2 + 1 if self.decoupled else self.layers

    @property
    def blind_start(self) -> bool:
        """Whether all cells of an empty image have the same prediction: questions then see one key, or keys that are zero."""
        return self.decoupled and (self.condition.rows == 1 or self.condition_rotation == "zero")

    @model_validator(mode="after")
    def _head_sizes(self) -> ModelSpec:
        if self.dim % self.heads or (self.block == "llama" and self.head_dim % 4):
            raise ValueError(f"dim {self.dim} / heads {self.heads} must be a whole number and a multiple of 4 (rotations take two pairs)")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if self.decoupled and self.layers % 2:
            raise ValueError(f"layers {self.layers} must be even: layout decoupled has half of them for codes, half for questions")
        return self

    @classmethod
    def from_recipe(cls, model: ModelConfig, *, vocab_size: int, grid: int, condition: ClassSpec | TextSpec | FeatureSpec) -> ModelSpec:
        """The spec of a recipe's model, once the tokenizers are known."""
        return cls(
            layout=model.layout,
            dim=model.dim,
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.kv_heads,
            ffn_hidden=model.ffn_hidden,
            vocab_size=vocab_size,
            grid=grid,
            condition=condition,
            norm_eps=model.norm_eps,
            rope_base=model.rope_base,
            dropout=model.dropout,
        )


def condition_spec(prompts: PromptEncoder, *, encoder_layers: int) -> ClassSpec | TextSpec | FeatureSpec:
    """The condition of a model that takes what ``prompts`` encodes; ``encoder_layers`` is that of a text encoder trained along."""
    from oar_scale.tokenizers.clip_text import ClipText
    from oar_scale.tokenizers.prompts import FeatureReader, LabelEncoder

    if isinstance(prompts, ClipText):
        return FeatureSpec(width=prompts.width, rows=prompts.rows, tower=prompts.spec, tower_id=prompts.content_id)
    if isinstance(prompts, FeatureReader):
        return FeatureSpec(width=prompts.width, rows=prompts.max_tokens, tower=prompts.tower, tower_id=prompts.tower_id)
    if isinstance(prompts, LabelEncoder):
        return ClassSpec(classes=prompts.vocab_size)
    return TextSpec(vocab=prompts.vocab_size, rows=prompts.max_tokens, encoder_layers=encoder_layers)


def check_prompts(spec: ModelSpec, prompts: PromptEncoder, where: str) -> None:
    """Check that a model can be conditioned on what ``prompts`` encodes.

    Raises:
        UserError: another kind of condition, another vocabulary or length, or other weights of a text tower.
    """
    trained, given = spec.condition.model_dump(), condition_spec(prompts, encoder_layers=0).model_dump()
    for field in ("type", "classes", "vocab", "width", "rows", "tower", "tower_id"):
        here, there = trained.get(field), given.get(field)
        if here != there and not (field.startswith("tower") and there is None):  # features may have been computed beforehand
            raise UserError(
                f"{where}: its condition has {field} {here}, the prompt encoder of tokenizer.text makes {there}. "
                "Use the tokenizer.text that the model was trained with."
            )
