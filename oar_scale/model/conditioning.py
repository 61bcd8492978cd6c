"""The condition: T rows before the first cell.

A caption's SentencePiece ids go through a small bidirectional encoder trained along. Rows without a token, and all rows
of a dropped caption, are the *trainable* null rows: every condition has exactly T rows, so the trunk needs no padding
mask, and guidance needs no second code path.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oar_scale.model.blocks import Block, RMSNorm
from oar_scale.model.spec import ModelSpec


class TextCondition(nn.Module):
    """Text ids [B, T] (0 = no token) to condition rows [B, T, D]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.text_vocab, spec.dim)
        self.positions = nn.Parameter(torch.empty(spec.max_tokens, spec.dim))
        self.null = nn.Parameter(torch.empty(spec.max_tokens, spec.dim))
        self.layers = nn.ModuleList(
            Block(spec.dim, spec.heads, spec.ffn_hidden, spec.norm_eps, spec.dropout) for _ in range(spec.text_encoder_layers)
        )
        self.norm = RMSNorm(spec.dim, spec.norm_eps)

    def forward(self, text_BT: Tensor, drop_B: Tensor | None = None) -> Tensor:
        present_BT = text_BT != 0
        mask = present_BT.clone()
        mask[:, 0] = True  # a row of the softmax needs one key, even where there is no caption
        x = self.embedding(text_BT) + self.positions
        for layer in self.layers:
            x = layer(x, None, causal=False, mask=mask[:, None, None, :])
        if drop_B is not None:
            present_BT = present_BT & ~drop_B[:, None]
        return torch.where(present_BT[..., None], self.norm(x), self.null.to(x.dtype))
