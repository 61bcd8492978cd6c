"""One transformer block of the LlamaGen family: RMSNorm, rotary attention, RMSNorm, SwiGLU. Names equal the peers' keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oar_scale.model.rope import Rotation, rotate, rotate_fast


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm``; where no gradient is wanted, a CPU (which has no fused kernel for it) takes half the passes over memory."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        x32, mean_of = x.float(), x.shape[-1]
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(mean_of).add_(self.eps or 0.0).rsqrt_()
        scaled: Tensor = (x32 * scale).mul_(self.weight)
        return scaled.to(x.dtype)


class Heads(NamedTuple):
    """Queries, keys and values of L rows, each [B, H, L, head_dim]; queries and keys are rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


class DecodingHeads(NamedTuple):
    """:class:`Heads`, and the score of each row's own key under its own query, q.k / sqrt(head_dim): float32 [B, H, L]."""

    q: Tensor
    k: Tensor
    v: Tensor
    own: Tensor


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def project(self, x_BLD: Tensor, rotation: Rotation | None) -> Heads:
        """Project rows to heads; ``rotation`` [B or 1, L, head_dim / 2] turns queries and keys, None leaves them."""
        q, k, v = self.wqkv(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            per_head = Rotation(rotation.cos.unsqueeze(1), rotation.sin.unsqueeze(1))
            q, k = rotate(q, per_head), rotate(k, per_head)
        return Heads(q, k, v)

    def project_decoding(self, x_BLD: Tensor, turn_BLP: Tensor) -> DecodingHeads:
        """:meth:`project` for inference: the same numbers with a quarter of the passes over memory."""
        qkv_BL3Hd = self.wqkv(x_BLD).unflatten(-1, (3, self.heads, -1))
        rotated_BL2Hd = rotate_fast(qkv_BL3Hd[:, :, :2], turn_BLP[:, :, None, None])
        own_BLH = (rotated_BL2Hd[:, :, 0] * rotated_BL2Hd[:, :, 1]).sum(-1) / math.sqrt(qkv_BL3Hd.shape[-1])
        q, k = rotated_BL2Hd.to(x_BLD.dtype).permute(2, 0, 3, 1, 4)
        return DecodingHeads(q, k, qkv_BL3Hd[:, :, 2].transpose(1, 2), own_BLH.transpose(1, 2))

    def merge(self, out_BHLd: Tensor) -> Tensor:
        """Heads back to rows [B, L, D]."""
        return self.wo(out_BHLd.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """``forward`` is the training path; decoding calls :meth:`heads` and :meth:`finish` with its own attention between."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.feed_forward = FeedForward(dim, hidden)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)
        self.dropout = dropout

    def heads(self, x_BLD: Tensor, rotation: Rotation | None) -> Heads:
        return self.attention.project(self.attention_norm(x_BLD), rotation)

    def decoding_heads(self, x_BLD: Tensor, turn_BLP: Tensor) -> DecodingHeads:
        return self.attention.project_decoding(self.attention_norm(x_BLD), turn_BLP)

    def finish(self, x_BLD: Tensor, out_BHLd: Tensor) -> Tensor:
        """Residual connections around attention (already computed) and feed-forward."""
        x_BLD = x_BLD + F.dropout(self.attention.merge(out_BHLd), self.dropout, self.training)
        return x_BLD + F.dropout(self.feed_forward(self.ffn_norm(x_BLD)), self.dropout, self.training)

    def forward(self, x_BLD: Tensor, rotation: Rotation | None, *, causal: bool, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x_BLD, rotation)
        return self.finish(x_BLD, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal))
