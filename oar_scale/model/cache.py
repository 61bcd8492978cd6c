"""The KV cache behind which rows pass the blocks: what they write to it, and what they see of it.

    slices      rows in use are a number of the program        what is seen is a view of those rows, written are the rows behind it
    static      rows in use are a number on the device, or     all of the cache is seen, under a mask; rows are written by index
                one for each image

Slices compute nothing in vain, but every step is another program. Of static buffers nothing changes from step to step but numbers in
tensors, so what was compiled or recorded of one step serves all that place as many cells (``steps.py``). How several parts of
a cache are seen as one: ``packed.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.model.attention import attention_with_lse, merge_self_
from oar_scale.model.blocks import KVPlace, KVRows, KVSlice

STATIC_ROWS = {"cuda": 2**12}
"""Rows of a step, of all images, up to which static buffers pay: a GPU takes longer to be told of a step than to do it. A CPU is told by
itself, and gains nothing."""


def static_pays(rows: int, device: torch.device) -> bool:
    """Whether steps of at most so many rows are worth static buffers."""
    return 0 < rows <= STATIC_ROWS.get(device.type, 0)


def least_candidates(cells: int) -> int:
    """An eighth of the cells: numbers of candidates on static buffers are multiples of it, so that there are 8 kinds of steps at most."""
    return -(-cells // 8)


def padded_candidates(count: int, cells: int) -> int:
    """So many candidates are asked about on static buffers where ``count`` cells are left: at most an eighth of the cells for nothing."""
    least = least_candidates(cells)
    return min(-(-count // least) * least, cells)


class Pass(Protocol):
    """Rows on their way through the blocks."""

    def into(self, pair: int) -> KVPlace:
        """Where a pair of the cache takes the keys and values of these rows."""
        ...

    def attend(self, pair: int, q_BHLd: Tensor, own_BHL: Tensor | None = None) -> Tensor:
        """Attention [B, H, L, d] of these rows, once their keys and values are there; ``own_BHL`` as of ``merge_self_``."""
        ...


class CachePart(NamedTuple):
    """The KV cache of some images, as a view, by slices."""

    pairs: Tensor
    """[``spec.cached_pairs``, 2, B, kv_heads, capacity, head_dim]: keys and values."""
    rows: int
    """Rows in use."""

    def kv(self, pair: int, start: int, end: int) -> KVSlice:
        """Keys and values of rows ``start`` to ``end``, through which they are read and written."""
        return KVSlice(*self.pairs[pair, :, :, :, start:end])

    def entering(self, length: int, groups: Sequence[int] | None = None) -> Pass:
        """L rows that see the rows in use and, of themselves, those up to the end of their group; None: those up to themselves."""
        end = self.rows + length
        return _Entering(self, end, _behind(self.rows, end, groups, self.pairs.device))

    def asking(self, entering: int, count: int) -> Pass:
        """Rows that see the rows in use, those that enter (one at most), and themselves."""
        return _Asking(self, entering, count)

    def looking(self) -> Pass:
        """Rows that see the rows in use, and write nothing."""
        return _Looking(self)

    def behind(self, pair: int, length: int) -> KVSlice:
        """Where L rows of a pair are written."""
        return self.kv(pair, self.rows, self.rows + length)

    def alike_if(self, rows: int, x_BRD: Tensor) -> Tensor:
        """Rows of images; where just so many rows of the cache are in use, the first row of each image in place of all."""
        return x_BRD[:, :1].expand_as(x_BRD) if self.rows == rows else x_BRD


class _Entering(NamedTuple):
    cache: CachePart
    end: int
    mask_LC: Tensor | None

    def into(self, pair: int) -> KVSlice:
        return self.cache.kv(pair, self.cache.rows, self.end)

    def attend(self, pair: int, q_BHLd: Tensor, own_BHL: Tensor | None = None) -> Tensor:
        return attention_with_mask(q_BHLd, self.cache.kv(pair, 0, self.end), self.mask_LC)


class _Asking(NamedTuple):
    cache: CachePart
    entering: int
    candidates: int

    def into(self, pair: int) -> KVSlice:
        return self.cache.kv(pair, self.cache.rows, self.cache.rows + self.entering + self.candidates)

    def attend(self, pair: int, q_BHLd: Tensor, own_BHL: Tensor | None = None) -> Tensor:
        assert own_BHL is not None
        end, before = self.cache.rows + self.entering, self.entering
        seen, own_kv = self.cache.kv(pair, 0, end), self.cache.kv(pair, end, end + self.candidates)
        if end == 0:  # nothing but itself to see: a raster model's first row, when the condition has no other
            return own_kv.values.repeat_interleave(q_BHLd.shape[1] // own_kv.values.shape[1], dim=1)
        # The entering row is among the rows that are seen, its own key included, so only candidates need their own merged in.
        out_BHLd, lse_BHL = attention_with_lse(q_BHLd, seen.keys, seen.values)
        merge_self_(out_BHLd[:, :, before:], lse_BHL[:, :, before:], own_BHL[:, :, before:], own_kv.values)
        return out_BHLd


class _Looking(NamedTuple):
    cache: CachePart

    def into(self, pair: int) -> KVSlice:
        return self.cache.kv(pair, self.cache.rows, self.cache.rows)

    def attend(self, pair: int, q_BHLd: Tensor, own_BHL: Tensor | None = None) -> Tensor:
        seen = self.cache.kv(pair, 0, self.cache.rows)
        return attention_with_lse(q_BHLd, seen.keys, seen.values)[0]


class StaticPart(NamedTuple):
    """The KV cache of some images, as a view, by masks. Rows behind those in use must hold numbers: they count with weight 0."""

    pairs: Tensor
    """As of :class:`CachePart`."""
    rows: Tensor
    """Rows in use, int64 [], or [B] where each image has its own."""

    def entering(self, length: int, groups: Sequence[int] | None = None) -> Pass:
        """As of :class:`CachePart`."""
        at_L, column_C = self._at(length), self._columns()
        upto_L = at_L if groups is None else self.rows[..., None] - 1 + _ends(groups, self.pairs.device)
        return self._masked(at_L, column_C <= upto_L[..., None])

    def asking(self, entering: int, count: int) -> Pass:
        """As of :class:`CachePart`."""
        at_L, column_C = self._at(entering + count), self._columns()
        return self._masked(at_L, (column_C < self.rows[..., None, None] + entering) | (column_C == at_L[..., None]))

    def looking(self) -> Pass:
        """As of :class:`CachePart`."""
        return self._masked(self._at(0), self._columns() < self.rows[..., None, None])

    def behind(self, pair: int, length: int) -> KVRows:
        """As of :class:`CachePart`."""
        keys, values = self.pairs[pair]
        return KVRows(keys, values, self._at(length))

    def alike_if(self, rows: int, x_BRD: Tensor) -> Tensor:
        """As of :class:`CachePart`."""
        return torch.where(self.rows[..., None, None] == rows, x_BRD[:, :1], x_BRD)

    def _at(self, length: int) -> Tensor:
        return self.rows[..., None] + torch.arange(length, device=self.pairs.device)

    def _columns(self) -> Tensor:
        return torch.arange(self.pairs.shape[4], device=self.pairs.device)

    def _masked(self, at_L: Tensor, seen_LC: Tensor) -> Pass:
        # Numbers to add, once for all layers: of a bool mask attention would make them in each.
        bias_LC = torch.zeros(seen_LC.shape, dtype=self.pairs.dtype, device=at_L.device).masked_fill_(~seen_LC, -torch.inf)
        return _Masked(self.pairs, at_L, bias_LC if self.rows.ndim == 0 else bias_LC[:, None])


class _Masked(NamedTuple):
    pairs: Tensor
    at: Tensor
    """[L] or [B, L]."""
    bias: Tensor
    """[L, C] or [B, 1, L, C]."""

    def into(self, pair: int) -> KVRows:
        keys, values = self.pairs[pair]
        return KVRows(keys, values, self.at)

    def attend(self, pair: int, q_BHLd: Tensor, own_BHL: Tensor | None = None) -> Tensor:
        keys, values = self.pairs[pair]
        heads, groups = q_BHLd.shape[1], keys.shape[1]
        if heads == groups:
            return F.scaled_dot_product_attention(q_BHLd, keys, values, attn_mask=self.bias)
        # No kernel of a GPU takes a mask and fewer heads of keys: the queries of a group become rows of one head.
        bias = self.bias if self.bias.shape[-2] == 1 else torch.cat([self.bias] * (heads // groups), dim=-2)
        q_BGQd = q_BHLd.unflatten(1, (groups, -1)).flatten(2, 3)
        out_BGQd = F.scaled_dot_product_attention(q_BGQd, keys, values, attn_mask=bias)
        out_BHLd: Tensor = out_BGQd.unflatten(2, (heads // groups, -1)).flatten(1, 2)
        return out_BHLd


class Ahead(NamedTuple):
    """The KV cache of some images, as a view, in which the L new rows of each image lie at places of their own."""

    pairs: Tensor
    """As of :class:`CachePart`. Rows that nobody has written must hold numbers: they count with weight 0."""
    at_BL: Tensor
    """Where each row's keys and values go."""
    upto_BL: Tensor
    """A row sees what lies before this in the cache."""

    def rows(self, part: slice) -> Ahead:
        """Some of the L rows."""
        return Ahead(self.pairs, self.at_BL[:, part], self.upto_BL[:, part])

    def write(self, pair: int, new: KVSlice) -> None:
        """Take the rows' keys and values."""
        keys, values = self.pairs[pair]
        KVRows(keys, values, self.at_BL).write(*new)

    def seen(self, *, itself: bool) -> Tensor:
        """Which rows of the cache each row sees, bool [B, 1, L, C]: with ``itself`` its own, too."""
        column_C = torch.arange(self.pairs.shape[4], device=self.at_BL.device)
        seen_BLC = column_C < self.upto_BL[:, :, None]
        return (seen_BLC | (column_C == self.at_BL[:, :, None]) if itself else seen_BLC)[:, None]


def attention_with_mask(q_BHLd: Tensor, seen: KVSlice, mask: Tensor | None) -> Tensor:
    """Attention [B, H, L, d] of rows to keys and values in a cache."""
    return F.scaled_dot_product_attention(q_BHLd, *seen, attn_mask=mask, enable_gqa=q_BHLd.shape[1] != seen.keys.shape[1])


def _behind(start: int, end: int, groups: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """The mask of rows ``start`` to ``end``: each sees all before ``start``, and of the new ones those up to the end of its group."""
    seen = torch.ones(end - start, end, dtype=torch.bool, device=device)
    if groups is None:
        return seen.tril(diagonal=start)
    if max(groups) == end - start:
        return None
    first = start
    for size in groups:
        first += size
        seen[first - start - size : first - start, first:] = False
    return seen


def _ends(groups: Sequence[int], device: torch.device) -> Tensor:
    """The number of rows up to the end of each row's group [L], made on the device."""
    sizes = [size for size in groups if size]
    return torch.cat([torch.full((size,), end, device=device) for size, end in zip(sizes, accumulate(sizes), strict=True)])
