"""One transformer block: norm, attention, norm, feed-forward. Names equal the peers' keys.

    family   norm        feed-forward         matrices                     positions
    llama    RMSNorm     SwiGLU               no biases, Normal(0, 0.02)   rotations of queries and keys         LlamaGen, RandAR, ARPG
    vit      LayerNorm   GELU, one matrix in  biases, Xavier-uniform       added to the rows before the blocks   LPD

Every module initialises its own parameters where it is made, which is what ``deepspeed.zero.Init`` needs: it takes a module's
parameters away as soon as its constructor returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oar_scale.model import memory_efficient
from oar_scale.model.rope import rotate_, rotate_heads
from oar_scale.model.spec import ModelSpec


def in_few_shapes(x_RD: Tensor) -> Tensor:
    """Rows for a matrix product without gradients, with rows of zeros behind them where their number would be one of many.

    For bfloat16 on a CPU oneDNN keeps a packed copy of the other matrix for every number of rows it has met. Cells that are placed one by
    one make as many numbers as there are cells, and the copies take more memory than model and cache.
    """
    rows = len(x_RD)
    if x_RD.dtype != torch.bfloat16 or x_RD.device.type != "cpu" or torch.is_grad_enabled():
        return x_RD
    missing = -rows % (8 if rows < 64 else 64)
    return F.pad(x_RD, (0, 0, 0, missing)) if missing else x_RD


class Linear(nn.Linear):
    """``nn.Linear``, without bias unless asked for, that starts as Normal(0, 0.02)."""

    __call__: Callable[..., Tensor]

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` [..., outputs] of x [..., inputs]."""
        rows = x.shape[:-1].numel()
        x_RD = in_few_shapes(x.reshape(rows, -1))
        if len(x_RD) == rows:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x_RD, self.weight, self.bias)[:rows].view(*x.shape[:-1], -1)


class BiasedLinear(Linear):
    """With a bias that starts at zero, and a weight that starts Xavier-uniform."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=True)

    def reset_parameters(self) -> None:
        """Draw the weight anew, and set the bias to zero."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm``, on a CPU with :func:`memory_efficient.rms_norm`."""

    __call__: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """RMSNorm over the last dimension of x [..., D]."""
        if memory_efficient.worthwhile(x):
            return memory_efficient.rms_norm(x, self.weight, self.eps or 0.0)
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm``, which has a fused kernel on CPUs, too."""

    __call__: Callable[..., Tensor]


class GatedLinear(Linear):
    """The output layer of a SwiGLU feed-forward: ``(silu(gate) * up) W^T``."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        """Rows [..., D] of gate and up [..., F]."""
        if torch.is_grad_enabled():
            return memory_efficient.gated_linear(gate, up, self.weight)
        return super().forward(F.silu(gate).mul_(up))


class GELULinear(BiasedLinear):
    """The output layer of a feed-forward with GELU: ``gelu(x) W^T + b``, with the exact GELU (of the error function)."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows [..., D] of rows [..., F]."""
        if torch.is_grad_enabled():
            return memory_efficient.gelu_linear(x, self.weight, self.bias)
        return super().forward(F.gelu(x))


class Heads(NamedTuple):
    """Queries [B, H, L, head_dim], keys and values [B, kv_heads, L, head_dim] of L rows; queries and keys are rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


class KVPlace(Protocol):
    """Where keys and values of rows go."""

    def write(self, keys_BGLd: Tensor, values_BGLd: Tensor) -> None:
        """Take the keys and values of these rows, [B, kv_heads, L, head_dim] each."""
        ...


class KVSlice(NamedTuple):
    """Keys and values of some rows, [B, kv_heads, L, head_dim] each: views into the cache, through which it is written and read."""

    keys: Tensor
    values: Tensor

    def write(self, keys_BGLd: Tensor, values_BGLd: Tensor) -> None:
        """As :meth:`KVPlace.write`."""
        self.keys.copy_(keys_BGLd)
        self.values.copy_(values_BGLd)


class KVRows(NamedTuple):
    """Some rows of keys and values [B, kv_heads, capacity, head_dim], by their indices."""

    keys: Tensor
    values: Tensor
    at: Tensor
    """[L], or [B, L] where each image has its own."""

    def write(self, keys_BGLd: Tensor, values_BGLd: Tensor) -> None:
        """As :meth:`KVPlace.write`."""
        for old_BGCd, new_BGLd in ((self.keys, keys_BGLd), (self.values, values_BGLd)):
            if self.at.ndim == 1:
                old_BGCd.index_copy_(2, self.at, new_BGLd.to(old_BGCd.dtype))
            else:
                image_B1 = torch.arange(len(self.at), device=self.at.device)[:, None]
                old_BGCd[image_B1, :, self.at] = new_BGLd.transpose(1, 2).to(old_BGCd.dtype)


class Attention(nn.Module):
    """Multi-head attention, in family llama with rotary positions; with ``kv_heads`` below ``heads``, grouped-query attention."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads or spec.heads, spec.head_dim
        linear = FAMILIES[spec.block].linear
        self.wqkv = linear(spec.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.wo = linear(spec.dim, spec.dim)

    def project(self, x_BLD: Tensor, rotation_BLP2: Tensor | None) -> Heads:
        """Project rows to heads; ``rotation_BLP2`` rotates queries and keys, None leaves them as they are."""
        qkv_BLHd = self.wqkv(x_BLD).unflatten(-1, (-1, self.head_dim))
        if rotation_BLP2 is None:
            q, k, v = qkv_BLHd.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        else:
            q, k, v = rotate_heads(qkv_BLHd, rotation_BLP2, self.kv_heads)
        return Heads(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    def project_into(self, into: KVPlace, x_BLD: Tensor, rotation_BLP2: Tensor | None) -> tuple[Tensor, Tensor]:
        """:meth:`project` for inference: keys and values go into the cache.

        Returns:
            Queries [B, H, L, head_dim], and the score of each row's own key under its own query, q.k / sqrt(head_dim): float32 [B, H, L].
        """
        qk_BLHd, v_BLGd = self.wqkv(x_BLD).unflatten(-1, (-1, self.head_dim)).split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        # Rotated and scored in float32: a candidate's own score is compared with the log-sum-exp over the whole prefix.
        qk32_BLHd = qk_BLHd.float() if rotation_BLP2 is None else rotate_(qk_BLHd.float(), rotation_BLP2[:, :, None])
        q32, k32 = qk32_BLHd.split([self.heads, self.kv_heads], dim=2)
        into.write(k32.transpose(1, 2), v_BLGd.transpose(1, 2))
        own_BLH = (q32.unflatten(2, (self.kv_heads, -1)) * k32.unsqueeze(3)).sum(-1).flatten(2) / math.sqrt(self.head_dim)
        return q32.to(x_BLD.dtype).transpose(1, 2), own_BLH.transpose(1, 2)

    def merge(self, out_BHLd: Tensor) -> Tensor:
        """Heads back to rows [B, L, D]."""
        return self.wo(out_BHLd.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention to keys and values that :class:`SharedKV` made; it has only queries of its own."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads or spec.heads, spec.head_dim
        self.wq = Linear(spec.dim, spec.dim)
        self.wo = Linear(spec.dim, spec.dim)

    def project(self, x_BQD: Tensor, rotation_BQP2: Tensor) -> Tensor:
        """Rotated queries [B, H, Q, head_dim] of rows."""
        q_BQHd, _, _ = rotate_heads(self.wq(x_BQD).unflatten(-1, (-1, self.head_dim)), rotation_BQP2, 0)
        return q_BQHd.transpose(1, 2)

    def merge(self, out_BHQd: Tensor) -> Tensor:
        """Heads back to rows [B, Q, D]."""
        return self.wo(out_BHQd.transpose(1, 2).flatten(2))


class SharedKV(nn.Module):
    """A norm, then one projection to the keys and values that all cross-attention blocks see."""

    __call__: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = spec.kv_heads or spec.heads, spec.head_dim
        self.norm = RMSNorm(spec.dim, spec.norm_eps)
        self.wkv = Linear(spec.dim, 2 * self.kv_heads * self.head_dim)

    def forward(self, x_BLD: Tensor, rotation_BLP2: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, [B, kv_heads, L, head_dim] each."""
        kv_BLGd = self.wkv(self.norm(x_BLD)).unflatten(-1, (-1, self.head_dim))
        _, k_BLGd, v_BLGd = rotate_heads(kv_BLGd, rotation_BLP2, self.kv_heads)
        return k_BLGd.transpose(1, 2), v_BLGd.transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: ``W2 (silu(W1 x) * W3 x)``."""

    __call__: Callable[..., Tensor]

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden)
        self.w3 = Linear(dim, hidden)
        self.w2 = GatedLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [..., D] of rows [..., D]."""
        return self.w2(self.w1(x), self.w3(x))


class MLP(nn.Module):
    """``W2 gelu(W1 x + b1) + b2``."""

    __call__: Callable[..., Tensor]

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = BiasedLinear(dim, hidden)
        self.w2 = GELULinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [..., D] of rows [..., D]."""
        return self.w2(self.w1(x))


class Family(NamedTuple):
    """What the blocks of a family are made of."""

    linear: type[Linear]
    norm: type[RMSNorm] | type[LayerNorm]
    feed_forward: type[FeedForward] | type[MLP]


FAMILIES: dict[Literal["llama", "vit"], Family] = {
    "llama": Family(Linear, RMSNorm, FeedForward),
    "vit": Family(BiasedLinear, LayerNorm, MLP),
}


class TrunkBlock(nn.Module):
    """What every block of a trunk has: attention of some kind between a norm and ``finish``."""

    __call__: Callable[..., Tensor]

    def __init__(self, spec: ModelSpec, attention: Attention | CrossAttention) -> None:
        super().__init__()
        self.attention = attention
        family = FAMILIES[spec.block]
        self.feed_forward = family.feed_forward(spec.dim, spec.ffn_hidden)
        self.attention_norm = family.norm(spec.dim, spec.norm_eps)
        self.ffn_norm = family.norm(spec.dim, spec.norm_eps)
        self.dropout = spec.dropout
        self.grouped = attention.kv_heads != attention.heads

    def finish(self, x_BLD: Tensor, out_BHLd: Tensor) -> Tensor:
        """Residual connections around attention (already computed) and feed-forward."""
        x_BLD = self._add(x_BLD, self.attention.merge(out_BHLd))
        return self._add(x_BLD, self.feed_forward(self.ffn_norm(x_BLD)))

    def _add(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        if self.training and self.dropout and memory_efficient.worthwhile(x_BLD):
            return memory_efficient.add_dropped(x_BLD, y_BLD, self.dropout)
        return x_BLD + F.dropout(y_BLD, self.dropout, self.training)


class Block(TrunkBlock):
    """``forward`` is the training path; decoding calls :meth:`project_into` and :meth:`finish` with its own attention between."""

    attention: Attention

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, Attention(spec))

    def project_into(self, into: KVPlace, x_BLD: Tensor, rotation_BLP2: Tensor | None) -> tuple[Tensor, Tensor]:
        """:meth:`Attention.project_into` of the normalised rows."""
        return self.attention.project_into(into, self.attention_norm(x_BLD), rotation_BLP2)

    def forward(
        self, x_BLD: Tensor, rotation_BLP2: Tensor | None, *, causal: bool, mask: Tensor | None = None, leaving: slice = slice(None)
    ) -> Tensor:
        """The rows ``leaving`` the block: the last block of a trunk need not finish rows that predict nothing."""
        q, k, v = self.attention.project(self.attention_norm(x_BLD), rotation_BLP2)
        out_BHLd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.finish(x_BLD[:, leaving], out_BHLd[:, :, leaving])


class CrossBlock(TrunkBlock):
    """A block of rows that see the same keys and values in all layers, and nothing of one another.

    ``forward`` is the training path; decoding calls :meth:`project` and :meth:`finish` with its own attention between.
    """

    attention: CrossAttention

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, CrossAttention(spec))

    def project(self, x_BQD: Tensor, rotation_BQP2: Tensor) -> Tensor:
        """Rotated queries [B, H, Q, head_dim] of the normalised rows."""
        return self.attention.project(self.attention_norm(x_BQD), rotation_BQP2)

    def forward(self, x_BQD: Tensor, rotation_BQP2: Tensor, keys_BGKd: Tensor, values_BGKd: Tensor) -> Tensor:
        """The rows after the block: the last row sees all K keys, each row before it one less."""
        q_BHQd = self.project(x_BQD, rotation_BQP2)
        # Rows of zeros in front make a square of queries and keys, which a kernel takes as plainly causal and without a mask.
        before = keys_BGKd.shape[2] - q_BHQd.shape[2]
        q_BHKd = F.pad(q_BHQd, (0, 0, before, 0)) if before else q_BHQd
        out_BHKd = F.scaled_dot_product_attention(q_BHKd, keys_BGKd, values_BGKd, is_causal=True, enable_gqa=self.grouped)
        return self.finish(x_BQD, out_BHKd[:, :, before:])
