"""Placing cells one at a time: the KV cache, candidate rows, and why the winner's row is kept.

    cache    [c_1 .. c_T, p_1, x_1, ..., p_t | x_t, p_a, p_b, p_c, ... ]     keys and values of every layer, one copy
    ask      rows x_t, p_a, p_b, p_c, ...                                      in one pass; a p row sees the cache up to x_t and itself,
                                                                               and no other p row
    commit   [c_1 .. c_T, p_1, x_1, ..., p_t, x_t, p_b | ... ]                 the winner's keys and values move up

(layout instructed; the others have no p rows, and their candidates are variants of the last code's row). In training the row
that predicts a code attends to what came before and to itself only, and stays in the cache. So a candidate row, which sees
exactly that, *is* the row the cache needs should its cell win: scoring all cells costs nothing twice, and the result equals a
full forward pass. There are never more candidates than cells left, so they fit into the room that the rest of the image needs
anyway: asking takes no memory beyond the activations of :data:`ROWS_AT_ONCE` rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.model.attention import attention_with_lse, merge_self_
from oar_scale.model.blocks import Block, Room
from oar_scale.model.layouts import Placed, Rows, Tables

if TYPE_CHECKING:
    from oar_scale.model.transformer import AnyOrderModel

ROWS_AT_ONCE = {"cpu": 512, "cuda": 2**16}
"""Rows that go through the trunk together, as whole images: enough for matrix products at full speed, and few enough that what lies
between the products stays in a CPU's cache."""


@dataclass
class Prefix:
    """What has been placed so far. Updated in place: a prefix is spent once it was committed to."""

    cache: Tensor
    """[layers, 2, B, kv_heads, room, head_dim]: keys and values."""
    rows: int
    """Rows of the cache in use."""
    last: Placed
    """What was placed last and is not in the cache yet."""
    tables: Tables
    asked: int = 0
    """How many times candidates were asked for: those of the last time are in the cache, behind the rows in use."""

    def room(self, layer: int, images: slice, start: int, end: int) -> Room:
        """Keys and values of some images' rows."""
        return Room(*self.cache[layer, :, images, :, start:end])


@dataclass(frozen=True)
class Candidates:
    """R cells of each image that were asked about."""

    cells_BR: Tensor
    rows_BRD: Tensor
    """Normalised rows, ready for the output head."""
    asked: int
    """``Prefix.asked`` when they were."""
    head: torch.nn.Module

    @property
    def logits_BRV(self) -> Tensor:
        """All logits at once, float32. Where there are many, ``orders.scores.score_rows`` takes them in parts."""
        return cast(Tensor, self.head(self.rows_BRD)).float()


class Decoding:
    """The incremental half of :class:`AnyOrderModel`; holds no state of its own."""

    def __init__(self, model: AnyOrderModel) -> None:
        # A plain object, kept out of the module's registry: the model owns this, not the other way round.
        self.model = model

    @torch.no_grad()
    def begin(self, condition_BTD: Tensor) -> Prefix:
        spec, layout, batch = self.model.spec, self.model.layout, len(condition_BTD)
        head_BTD = condition_BTD[:, : condition_BTD.shape[1] - layout.held]
        room = head_BTD.shape[1] + layout.stride * spec.cells
        cache = condition_BTD.new_empty(spec.layers, 2, batch, spec.kv_heads or spec.heads, room, spec.head_dim)
        prefix = Prefix(cache, 0, layout.start(condition_BTD), layout.tables(condition_BTD.device))
        self._append(prefix, Rows(head_BTD, layout.no_cell(batch, head_BTD.shape[1], head_BTD.device)))
        return prefix

    @torch.no_grad()
    def prefill(self, prefix: Prefix, cells_BK: Tensor, codes_BK: Tensor) -> Prefix:
        if cells_BK.shape[1] == 0:
            return prefix
        codes_BKD = self._codes(prefix, codes_BK)
        self._append(prefix, self.model.layout(prefix.last, cells_BK, codes_BKD, prefix.tables))
        prefix.last = Placed(cells_BK[:, -1:], codes_BKD[:, -1:])
        return prefix

    @torch.no_grad()
    def candidate_rows(self, prefix: Prefix, cells_BR: Tensor) -> Candidates:
        batch, count = cells_BR.shape
        enters = self.model.layout.entering(prefix.last)
        if enters > 1:  # they must see one another causally
            waiting, _ = self.model.layout.candidates(prefix.last, cells_BR[:, :0], prefix.tables)
            assert waiting is not None
            self._append(prefix, waiting)
            enters, prefix.last = 0, self._nothing(prefix)
        if prefix.rows + enters + count > prefix.cache.shape[4]:
            raise ValueError(f"{count} candidates are more than the cells that are left")
        rows_BRD = prefix.cache.new_empty(batch, count, self.model.spec.dim)
        for images in _parts(batch, enters + count, cells_BR.device):
            rows_BRD[images] = self._ask(prefix, images, cells_BR[images])
        if enters:
            prefix.rows += 1
            prefix.last = self._nothing(prefix)
        prefix.asked += 1
        return Candidates(cells_BR, rows_BRD, prefix.asked, self.model.output)

    @torch.no_grad()
    def commit(self, prefix: Prefix, candidates: Candidates, winner_B: Tensor, codes_B: Tensor) -> Prefix:
        if candidates.asked != prefix.asked:
            raise ValueError("these candidates' rows are gone: others were asked for, or one was committed to, since")
        image_B = torch.arange(len(winner_B), device=winner_B.device)
        prefix.cache[:, :, :, :, prefix.rows] = prefix.cache[:, :, image_B, :, prefix.rows + winner_B].movedim(0, 2)
        prefix.rows += 1
        prefix.asked += 1
        prefix.last = Placed(candidates.cells_BR[image_B, winner_B, None], self._codes(prefix, codes_B[:, None]))
        return prefix

    @torch.no_grad()
    def ask_in_turn(self, prefix: Prefix, cells_BM: Tensor) -> Tensor:
        asked = cells_BM.shape[1]
        rows_BMD = self._append(prefix, self.model.layout.in_turn(prefix.last, cells_BM, prefix.tables), leaving=asked)
        prefix.last = self._nothing(prefix)
        # The first question's row is what training would have there; the others lack the codes between, and are asked again.
        prefix.rows -= asked - 1
        return self.model.head(rows_BMD).float()

    def place(self, prefix: Prefix, cells_BM: Tensor, codes_BM: Tensor) -> Prefix:
        prefix.last = Placed(cells_BM, self._codes(prefix, codes_BM))
        return prefix

    def _nothing(self, prefix: Prefix) -> Placed:
        """Nothing waits to enter the cache (after an instructed model's code rows have)."""
        cells_BK, codes_BKD = prefix.last
        return Placed(cells_BK[:, :0], codes_BKD[:, :0])

    def _codes(self, prefix: Prefix, codes_BK: Tensor) -> Tensor:
        return self.model.code_rows(codes_BK).to(prefix.cache.dtype)

    def _ask(self, prefix: Prefix, images: slice, cells_bR: Tensor) -> Tensor:
        """Normalised rows of some images' candidates. Their keys and values lie behind those of the prefix and of the row that enters."""
        entering, asking = self.model.layout.candidates(prefix.last.images(images), cells_bR, prefix.tables)
        x, cells = asking if entering is None else (torch.cat(pair, dim=1) for pair in zip(entering, asking, strict=True))
        before = x.shape[1] - cells_bR.shape[1]
        end = prefix.rows + before
        turn_bLP2 = self.model.rotations(x.device)[cells]
        for index, layer in enumerate(cast("list[Block]", self.model.layers)):
            q, own = layer.project_into(prefix.room(index, images, prefix.rows, prefix.rows + x.shape[1]), x, turn_bLP2)
            seen, asked = prefix.room(index, images, 0, end), prefix.room(index, images, end, end + cells_bR.shape[1])
            if end == 0:  # nothing but itself to see: a raster model's first row, when the condition has no other
                out = asked.values.repeat_interleave(q.shape[1] // asked.values.shape[1], dim=1)
            else:
                out, lse = attention_with_lse(q, seen.keys, seen.values)
                merge_self_(out[:, :, before:], lse[:, :, before:], own[:, :, before:], asked.values)
            x = layer.finish(x, out)
        return cast(Tensor, self.model.norm(x[:, before:]))

    def _append(self, prefix: Prefix, rows: Rows, leaving: int = 0) -> Tensor:
        """Run L rows that see the prefix and one another causally, and add them to the cache.

        Returns:
            The last ``leaving`` rows, [B, leaving, D], as they leave the trunk.
        """
        batch, length = rows.cells_BL.shape
        start, end = prefix.rows, prefix.rows + length
        last_BMD = rows.x_BLD.new_empty(batch, leaving, rows.x_BLD.shape[2])
        if length == 0:
            return last_BMD
        mask = torch.ones(length, end, dtype=torch.bool, device=rows.x_BLD.device).tril(diagonal=start)
        for images in _parts(batch, length, rows.x_BLD.device):
            x, turn_bLP2 = rows.x_BLD[images], self.model.rotations(rows.x_BLD.device)[rows.cells_BL[images]]
            for index, layer in enumerate(cast("list[Block]", self.model.layers)):
                q, _ = layer.project_into(prefix.room(index, images, start, end), x, turn_bLP2)
                keys, values = prefix.room(index, images, 0, end)
                out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != keys.shape[1])
                x = layer.finish(x, out)
            last_BMD[images] = x[:, length - leaving :]
        prefix.rows = end
        return last_BMD


def _parts(batch: int, rows: int, device: torch.device) -> Iterator[slice]:
    """Images whose rows go through the trunk together."""
    images = max(1, ROWS_AT_ONCE.get(device.type, ROWS_AT_ONCE["cpu"]) // max(rows, 1))
    return (slice(start, start + images) for start in range(0, batch, images))
