"""Images at different lengths, or that ask about different numbers of cells, pass the blocks together.

    segment    images of one part of the cache, with equally many rows of each on their way
    packed     the rows of all segments, one after the other, are a batch of one image           [1, L, D]

Matrix products, norms and feed-forwards take all rows at once: nothing is padded, and few rows of each segment are many of all. Only
attention and the writing of keys and values go segment by segment, each behind its own part of the cache (``cache.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from oar_scale.model.blocks import KVPlace
from oar_scale.model.cache import CachePart, Pass, StaticPart


class Segment(NamedTuple):
    """Images of one part of a cache, and the rows of each of them that are on their way."""

    cache: CachePart | StaticPart
    images: int
    entering: int
    asking: int = 0
    groups: Sequence[int] | None = None
    """Of rows that enter, where none asks."""

    @property
    def rows(self) -> int:
        """Rows of each image."""
        return self.entering + self.asking


class Packed(NamedTuple):
    """Segments of images at different lengths, seen as the cache of one image whose rows are theirs, one segment after the other."""

    segments: Sequence[Segment]

    def entering(self, length: int, groups: Sequence[int] | None = None) -> Pass:
        """As of :class:`CachePart`, by the groups of each segment."""
        return self._pass([segment.cache.entering(segment.entering, segment.groups) for segment in self.segments])

    def asking(self, entering: int, count: int) -> Pass:
        """As of :class:`CachePart`; in each segment rows that enter come before those that ask."""
        return self._pass([segment.cache.asking(segment.entering, segment.asking) for segment in self.segments])

    def looking(self) -> Pass:
        """As of :class:`CachePart`."""
        return self._pass([segment.cache.looking() for segment in self.segments])

    def behind(self, pair: int, length: int) -> KVPlace:
        """As of :class:`CachePart`."""
        return _Places([segment.cache.behind(pair, segment.rows) for segment in self.segments], self._shapes())

    def alike_if(self, rows: int, x_1LD: Tensor) -> Tensor:
        """As of :class:`CachePart`."""
        unpacked = (segment.cache.alike_if(rows, x_BRD) for segment, x_BRD in zip(self.segments, self.unpacked(x_1LD), strict=True))
        return torch.cat([x_BRD.flatten(0, 1) for x_BRD in unpacked])[None]

    def unpacked(self, x_1LD: Tensor) -> list[Tensor]:
        """The rows [B, rows, D] of each segment."""
        return [x_LD.unflatten(0, shape) for x_LD, shape in zip(x_1LD[0].split(_sizes(self._shapes())), self._shapes(), strict=True)]

    def _shapes(self) -> list[tuple[int, int]]:
        return [(segment.images, segment.rows) for segment in self.segments]

    def _pass(self, passes: Sequence[Pass]) -> Pass:
        return _Passes(passes, self._shapes())


class _Passes(NamedTuple):
    passes: Sequence[Pass]
    shapes: Sequence[tuple[int, int]]
    """Images and rows of each."""

    def into(self, pair: int) -> KVPlace:
        return _Places([each.into(pair) for each in self.passes], self.shapes)

    def attend(self, pair: int, q_BHLd: Tensor, own_BHL: Tensor | None = None) -> Tensor:
        own = [None] * len(self.passes) if own_BHL is None else _unpacked(own_BHL, self.shapes)
        parts = zip(self.passes, _unpacked(q_BHLd, self.shapes), own, strict=True)
        attended = (each.attend(pair, q, own_q).transpose(1, 2).flatten(0, 1) for each, q, own_q in parts)
        return torch.cat(list(attended))[None].transpose(1, 2)


class _Places(NamedTuple):
    places: Sequence[KVPlace]
    shapes: Sequence[tuple[int, int]]

    def write(self, keys_BGLd: Tensor, values_BGLd: Tensor) -> None:
        for place, keys, values in zip(self.places, _unpacked(keys_BGLd, self.shapes), _unpacked(values_BGLd, self.shapes), strict=True):
            place.write(keys, values)


Cache = CachePart | StaticPart | Packed


def _unpacked(x_1GLd: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Heads [B, G, rows, ...] of each segment's rows, from those of all of them [1, G, L, ...]."""
    parts = zip(x_1GLd[0].split(_sizes(shapes), dim=1), shapes, strict=True)
    return [part_GLd.unflatten(1, shape).transpose(0, 1) for part_GLd, shape in parts]


def _sizes(shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [images * rows for images, rows in shapes]
