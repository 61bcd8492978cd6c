"""Placing cells one at a time: the KV cache, candidate rows, and why the winner's row is kept.

    cache      [c_1 .. c_T, p_1, x_1, ..., p_t, x_t]       keys and values of every layer, one copy, shared
    step       rows [x_t, p_a, p_b, p_c, ...]               one pass: x_t enters the cache, every p row sees the cache and itself

(layout instructed; the others have no p rows, and their candidates are variants of the last code's row). In training the row
that predicts a code attends to what came before and to itself only, and stays in the cache. So a candidate row, which sees
exactly that, *is* the row the cache needs should its cell win: :func:`commit` keeps the winner's keys and values and drops the
rest. Scoring all cells costs nothing twice, and the result equals a full forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.model.attention import attention_with_lse, merge_self_
from oar_scale.model.layouts import Placed, Rows

if TYPE_CHECKING:
    from oar_scale.model.transformer import AnyOrderModel


@dataclass
class Prefix:
    """What has been placed so far. Updated in place: a prefix is spent once it was committed to."""

    keys: list[Tensor]
    """A tensor [B, kv_heads, room, head_dim] for each layer."""
    values: list[Tensor]
    rows: int
    """Rows of the cache in use."""
    last: Placed
    """What was placed last and is not in the cache yet."""


@dataclass(frozen=True)
class Candidates:
    """R scored cells of each image."""

    cells_BR: Tensor
    logits_BRV: Tensor
    """float32."""
    keys: list[Tensor]
    """A tensor [B, kv_heads, R, head_dim] for each layer."""
    values: list[Tensor]


class Decoding:
    """The incremental half of :class:`AnyOrderModel`; holds no state of its own."""

    def __init__(self, model: AnyOrderModel) -> None:
        # A plain object, kept out of the module's registry: the model owns this, not the other way round.
        self.model = model

    def begin(self, condition_BTD: Tensor) -> Prefix:
        spec, layout, batch = self.model.spec, self.model.layout, len(condition_BTD)
        shape = (batch, spec.kv_heads or spec.heads, condition_BTD.shape[1] + 2 * spec.cells, spec.head_dim)
        room = [torch.empty(shape, dtype=condition_BTD.dtype, device=condition_BTD.device) for _ in range(2 * spec.layers)]
        prefix = Prefix(room[: spec.layers], room[spec.layers :], 0, layout.start(condition_BTD))
        head_BTD = condition_BTD[:, : condition_BTD.shape[1] - layout.held]
        self._append(prefix, Rows(head_BTD, layout.no_cell(batch, head_BTD.shape[1], head_BTD.device)))
        return prefix

    def prefill(self, prefix: Prefix, cells_BK: Tensor, codes_BK: Tensor) -> Prefix:
        if cells_BK.shape[1] == 0:
            return prefix
        codes_BKD = self._codes(prefix, codes_BK)
        self._append(prefix, self.model.layout(prefix.last, cells_BK, codes_BKD))
        prefix.last = Placed(cells_BK[:, -1:], codes_BKD[:, -1:])
        return prefix

    def candidate_rows(self, prefix: Prefix, cells_BR: Tensor) -> Candidates:
        entering, asking = self.model.layout.candidates(prefix.last, cells_BR)
        if entering is not None and entering.x_BLD.shape[1] > 1:  # several rows must see one another causally
            self._append(prefix, entering)
            entering, prefix.last = None, self._nothing(prefix)
        before = 0 if entering is None else 1
        x, cells = asking if entering is None else (torch.cat(pair, dim=1) for pair in zip(entering, asking, strict=True))
        turn_BLP2 = self.model.rotations(x.device)[cells]
        end = prefix.rows + before
        keys, values = [], []
        for index, layer in enumerate(self.model.layers):
            q, k, v, own = layer.decoding_heads(x, turn_BLP2)  # type: ignore[operator]
            key_cache, value_cache = prefix.keys[index][:, :, :end], prefix.values[index][:, :, :end]
            key_cache[:, :, prefix.rows :] = k[:, :, :before]
            value_cache[:, :, prefix.rows :] = v[:, :, :before]
            keys.append(k[:, :, before:])  # the entering row's own key is in the cache already
            values.append(v[:, :, before:])
            if end == 0:  # nothing but itself to see: a raster model's first row, when the condition has no other
                out = values[-1].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            else:
                out, lse = attention_with_lse(q, key_cache, value_cache)
                merge_self_(out[:, :, before:], lse[:, :, before:], own[:, :, before:], values[-1])
            x = layer.finish(x, out)  # type: ignore[operator]
        prefix.rows = end
        if entering is not None:
            prefix.last = self._nothing(prefix)
        return Candidates(cells_BR, self.model.head(x[:, before:]).float(), keys, values)

    def commit(self, prefix: Prefix, candidates: Candidates, winner_B: Tensor, codes_B: Tensor) -> Prefix:
        image_B = torch.arange(len(winner_B), device=winner_B.device)
        for cache, rows in ((prefix.keys, candidates.keys), (prefix.values, candidates.values)):
            for layer, row in zip(cache, rows, strict=True):
                layer[:, :, prefix.rows] = row[image_B, :, winner_B]
        prefix.rows += 1
        prefix.last = Placed(candidates.cells_BR[image_B, winner_B, None], self._codes(prefix, codes_B[:, None]))
        return prefix

    def ask_in_turn(self, prefix: Prefix, cells_BM: Tensor) -> Tensor:
        rows = self._append(prefix, self.model.layout.in_turn(prefix.last, cells_BM))
        prefix.last = self._nothing(prefix)
        # The first question's row is what training would have there; the others lack the codes between, and are asked again.
        prefix.rows -= cells_BM.shape[1] - 1
        return self.model.head(rows[:, -cells_BM.shape[1] :]).float()

    def place(self, prefix: Prefix, cells_BM: Tensor, codes_BM: Tensor) -> Prefix:
        prefix.last = Placed(cells_BM, self._codes(prefix, codes_BM))
        return prefix

    def _nothing(self, prefix: Prefix) -> Placed:
        """Nothing waits to enter the cache (after an instructed model's code rows have)."""
        cells_BK, codes_BKD = prefix.last
        return Placed(cells_BK[:, :0], codes_BKD[:, :0])

    def _codes(self, prefix: Prefix, codes_BK: Tensor) -> Tensor:
        return self.model.code_rows(codes_BK).to(prefix.keys[0].dtype)

    def _append(self, prefix: Prefix, rows: Rows) -> Tensor:
        """Run L rows that see the prefix and one another causally, and add them to the cache; returns them as they leave the trunk."""
        x_BLD, cells_BL = rows
        start, end = prefix.rows, prefix.rows + x_BLD.shape[1]
        if end == start:
            return x_BLD
        turn_BLP2 = self.model.rotations(x_BLD.device)[cells_BL]
        mask = torch.ones(end - start, end, dtype=torch.bool, device=x_BLD.device).tril(diagonal=start)
        for index, layer in enumerate(self.model.layers):
            q, k, v, _ = layer.decoding_heads(x_BLD, turn_BLP2)  # type: ignore[operator]
            prefix.keys[index][:, :, start:end] = k
            prefix.values[index][:, :, start:end] = v
            keys, values = prefix.keys[index][:, :, :end], prefix.values[index][:, :, :end]
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
            x_BLD = layer.finish(x_BLD, out)  # type: ignore[operator]
        prefix.rows = end
        return x_BLD
