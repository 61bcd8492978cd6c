"""The condition: T rows before the first cell, and their trainable null.

    class       the embedding of a label; the null is one more row of the table
    text        SentencePiece ids through a small bidirectional encoder trained along
    features    rows of a frozen text encoder through a two-layer MLP

Rows without a token, and all rows of a dropped caption, are the null rows: every condition has exactly T rows, so the trunk
needs no padding mask, and guidance needs no second code path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oar_scale.model.blocks import FAMILIES, Block, Linear
from oar_scale.model.spec import ClassSpec, FeatureSpec, ModelSpec, TextSpec


class Conditioner(nn.Module):
    """Base: inputs of the model's kind to condition rows [B, T, D]."""

    __call__: Callable[..., Tensor]

    def forward(self, inputs: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Condition rows; samples marked in ``drop_B`` (bool) become the null condition."""
        raise NotImplementedError

    def null(self) -> Tensor:
        """The null condition's rows [T, D]."""
        raise NotImplementedError


class ClassCondition(Conditioner):
    """Labels [B] or [B, 1] to one row each."""

    def __init__(self, spec: ModelSpec, kind: ClassSpec) -> None:
        super().__init__()
        self.classes = kind.classes
        self.embedding_table = Embedding(kind.classes + 1, spec.dim)

    def forward(self, inputs: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """One condition row [B, 1, D] for each label."""
        labels_B1 = inputs.view(-1, 1)
        if drop_B is not None:
            labels_B1 = labels_B1.masked_fill(drop_B[:, None], self.classes)
        return self.embedding_table(labels_B1)

    def null(self) -> Tensor:
        """The table's last row [1, D]."""
        return self.embedding_table.weight[-1:]


class TextCondition(Conditioner):
    """Text ids [B, T] (0 = no token)."""

    def __init__(self, spec: ModelSpec, kind: TextSpec) -> None:
        super().__init__()
        self.embedding = Embedding(kind.vocab, spec.dim)
        self.positions = nn.Parameter(torch.empty(kind.rows, spec.dim))
        self.null_rows = nn.Parameter(torch.empty(kind.rows, spec.dim))
        self.layers = nn.ModuleList(Block(spec) for _ in range(kind.encoder_layers))
        self.norm = FAMILIES[spec.block].norm(spec.dim, spec.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw positions and null rows anew."""
        nn.init.normal_(self.positions, 0.0, 0.02)
        nn.init.normal_(self.null_rows, 0.0, 0.02)

    def forward(self, inputs: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Condition rows [B, T, D]: the encoder's where there is a token, null rows elsewhere."""
        present_BT = inputs != 0
        mask = present_BT.clone()
        mask[:, 0] = True  # a row of the softmax needs one key, even where there is no caption
        x = self.embedding(inputs) + self.positions
        for layer in self.layers:
            x = layer(x, None, causal=False, mask=mask[:, None, None, :])
        if drop_B is not None:
            present_BT = present_BT & ~drop_B[:, None]
        return torch.where(present_BT[..., None], self.norm(x), self.null_rows.to(x.dtype))

    def null(self) -> Tensor:
        """The null rows [T, D]."""
        return self.null_rows


class FeatureCondition(Conditioner):
    """Features [B, T, F]; a row of zeros is no token.

    The null lives in feature space, and goes through the MLP like any feature.
    """

    def __init__(self, spec: ModelSpec, kind: FeatureSpec) -> None:
        super().__init__()
        self.kind = kind
        self.cap_proj = FeatureMLP(kind.width, spec.dim)
        self.uncond_embedding = nn.Parameter(torch.empty(kind.null_rows or kind.rows, kind.width), requires_grad=spec.trainable_null)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the null features anew."""
        nn.init.normal_(self.uncond_embedding, 0.0, self.kind.width**-0.5)

    def forward(self, inputs: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Condition rows [B, T, D] of features. Raises ValueError for features of another shape."""
        wanted = (self.kind.rows, self.kind.width)
        if tuple(inputs.shape[1:]) != wanted:
            raise ValueError(f"condition features are {list(inputs.shape)}, the model takes [B, {wanted[0]}, {wanted[1]}]")
        features_BTF = inputs.to(self.uncond_embedding.dtype)
        null_TF = self.uncond_embedding[: self.kind.rows]
        replaced_BT = features_BTF.new_zeros(features_BTF.shape[:2], dtype=torch.bool)
        if self.kind.absent == "null":
            replaced_BT = (features_BTF == 0).all(-1)
        if drop_B is not None:
            replaced_BT = replaced_BT | drop_B[:, None]
        return self.cap_proj(torch.where(replaced_BT[..., None], null_TF, features_BTF))

    def null(self) -> Tensor:
        """The null features through the MLP, [T, D]."""
        return self.cap_proj(self.uncond_embedding[: self.kind.rows])


class FeatureMLP(nn.Module):
    """Two linear layers without bias, GELU (tanh form) between."""

    __call__: Callable[..., Tensor]

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, dim)
        self.fc2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [..., D] of features [..., F]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Embedding(nn.Embedding):
    """``nn.Embedding`` that starts as Normal(0, 0.02)."""

    __call__: Callable[..., Tensor]

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.normal_(self.weight, 0.0, 0.02)


def conditioner(spec: ModelSpec) -> Conditioner:
    """The conditioner of a spec."""
    kind = spec.condition
    if isinstance(kind, ClassSpec):
        return ClassCondition(spec, kind)
    if isinstance(kind, TextSpec):
        return TextCondition(spec, kind)
    return FeatureCondition(spec, kind)
