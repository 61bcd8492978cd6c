"""Placing cells one at a time: the KV cache, candidate rows, and why the winner's row is kept.

    cache      [c_1 .. c_T, p_1, x_1, ..., p_t, x_t]       keys and values of every layer, one copy, shared
    step       rows [x_t, p_a, p_b, p_c, ...]               one pass: x_t enters the cache, every p row sees the cache and itself

In training each p row attends to what came before and to itself only, and stays in the cache. So a candidate row, which
sees exactly that, *is* the row the cache needs should its cell win: :func:`commit` keeps the winner's keys and values and
drops the rest. Scoring all cells costs nothing twice, and the result equals a full forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.model.attention import attention_with_lse, merge_self_

if TYPE_CHECKING:
    from oar_scale.model.transformer import AnyOrderModel


@dataclass
class Prefix:
    """What has been placed so far. Updated in place: a prefix is spent once it was committed to."""

    keys: list[Tensor]
    """A tensor [B, H, room, head_dim] for each layer."""
    values: list[Tensor]
    rows: int
    """Rows of the cache in use."""
    waiting: tuple[Tensor, Tensor] | None = None
    """Cells [B] and codes [B] of the code row that enters the cache with the next pass."""


@dataclass(frozen=True)
class Candidates:
    """R scored cells of each image."""

    cells_BR: Tensor
    logits_BRV: Tensor
    """float32."""
    keys: list[Tensor]
    """A tensor [B, H, R, head_dim] for each layer."""
    values: list[Tensor]


class Decoding:
    """The incremental half of :class:`AnyOrderModel`; holds no state of its own."""

    def __init__(self, model: AnyOrderModel) -> None:
        # A plain object, kept out of the module's registry: the model owns this, not the other way round.
        self.model = model

    def begin(self, condition_BTD: Tensor) -> Prefix:
        spec, batch = self.model.spec, len(condition_BTD)
        shape = (batch, spec.heads, condition_BTD.shape[1] + 2 * spec.cells, spec.head_dim)
        room = [torch.empty(shape, dtype=condition_BTD.dtype, device=condition_BTD.device) for _ in range(2 * spec.layers)]
        prefix = Prefix(room[: spec.layers], room[spec.layers :], rows=0)
        self._append(prefix, condition_BTD, self.model.no_cell(condition_BTD))
        return prefix

    def prefill(self, prefix: Prefix, cells_BK: Tensor, codes_BK: Tensor) -> Prefix:
        if cells_BK.shape[1] == 0:
            return prefix
        model = self.model
        pairs = torch.stack([model.ask_rows(cells_BK), model.code_rows(codes_BK)], dim=2).flatten(1, 2)[:, :-1]
        rows, cells = self._with_waiting(prefix, pairs, cells_BK.repeat_interleave(2, dim=1)[:, :-1])
        self._append(prefix, rows, cells)
        prefix.waiting = (cells_BK[:, -1], codes_BK[:, -1])
        return prefix

    def candidate_rows(self, prefix: Prefix, cells_BR: Tensor) -> Candidates:
        model = self.model
        entering = 0 if prefix.waiting is None else 1
        x, cells = self._with_waiting(prefix, model.ask_rows(cells_BR), cells_BR)
        turn_BLP = model.turns(x.device)[cells]
        end = prefix.rows + entering
        keys, values = [], []
        for index, layer in enumerate(model.layers):
            q, k, v, own = layer.decoding_heads(x, turn_BLP)  # type: ignore[operator]
            key_cache, value_cache = prefix.keys[index][:, :, :end], prefix.values[index][:, :, :end]
            key_cache[:, :, prefix.rows :] = k[:, :, :entering]
            value_cache[:, :, prefix.rows :] = v[:, :, :entering]
            out, lse = attention_with_lse(q, key_cache, value_cache)
            keys.append(k[:, :, entering:])  # the entering row's own key is in the cache already
            values.append(v[:, :, entering:])
            merge_self_(out[:, :, entering:], lse[:, :, entering:], own[:, :, entering:], values[-1])
            x = layer.finish(x, out)  # type: ignore[operator]
        prefix.rows, prefix.waiting = end, None
        return Candidates(cells_BR, model.head(x[:, entering:]).float(), keys, values)

    def commit(self, prefix: Prefix, candidates: Candidates, winner_B: Tensor, codes_B: Tensor) -> Prefix:
        image_B = torch.arange(len(winner_B), device=winner_B.device)
        for cache, rows in ((prefix.keys, candidates.keys), (prefix.values, candidates.values)):
            for layer, row in zip(cache, rows, strict=True):
                layer[:, :, prefix.rows] = row[image_B, :, winner_B]
        prefix.rows += 1
        prefix.waiting = (candidates.cells_BR[image_B, winner_B], codes_B)
        return prefix

    def _with_waiting(self, prefix: Prefix, rows_BLD: Tensor, cells_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Put the waiting code row, if there is one, in front of new rows."""
        if prefix.waiting is None:
            return rows_BLD, cells_BL
        cell_B, code_B = prefix.waiting
        code_B1D = self.model.code_rows(code_B[:, None]).to(rows_BLD.dtype)
        return torch.cat([code_B1D, rows_BLD], dim=1), torch.cat([cell_B[:, None], cells_BL], dim=1)

    def _append(self, prefix: Prefix, x_BLD: Tensor, cells_BL: Tensor) -> None:
        """Run L rows that see the prefix and one another causally, and add them to the cache."""
        start, end = prefix.rows, prefix.rows + x_BLD.shape[1]
        turn_BLP = self.model.turns(x_BLD.device)[cells_BL]
        mask = torch.ones(end - start, end, dtype=torch.bool, device=x_BLD.device).tril(diagonal=start)
        for index, layer in enumerate(self.model.layers):
            q, k, v, _ = layer.decoding_heads(x_BLD, turn_BLP)  # type: ignore[operator]
            prefix.keys[index][:, :, start:end] = k
            prefix.values[index][:, :, start:end] = v
            out = F.scaled_dot_product_attention(q, prefix.keys[index][:, :, :end], prefix.values[index][:, :, :end], attn_mask=mask)
            x_BLD = layer.finish(x_BLD, out)  # type: ignore[operator]
        prefix.rows, prefix.waiting = end, None
