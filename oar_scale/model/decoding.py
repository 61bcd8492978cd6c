"""Placing cells one at a time: the KV cache, candidate rows, and why the winner's row is kept.

    cache        [c_1 .. c_T, p_1, x_1, ..., p_t | x_t, p_a, p_b, p_c, ... ]     keys and values of every layer, one copy
    candidates   rows x_t, p_a, p_b, p_c, ...                                      in one pass; a p row sees the cache up to x_t and
                                                                                   itself, and no other p row
    commit       [c_1 .. c_T, p_1, x_1, ..., p_t, x_t, p_b | ... ]                 the winner's keys and values move up

(layout instructed; raster and dual have no p rows, and their candidates are variants of the last code's row). In training the row
that predicts a code attends to what came before and to itself only, and stays in the cache. So a candidate row, which sees
exactly that, *is* the row the cache needs should its cell win: scoring all cells costs nothing twice, and the result equals a
full forward pass. There are never more candidates than cells left, so they fit into the part of the cache that the rest of the image needs
anyway: candidates take no memory beyond the activations of :data:`ROWS_AT_ONCE` rows.

In layouts decoupled and grouped, candidates leave nothing in the cache: what enters it is the row of the winner's code, with the next
candidates.

    decoder = Decoder(model)
    prefix = decoder.begin(condition_BTD)
    while cells are left:
        candidates = decoder.candidate_rows(prefix, empty_BR)
        winner_B   = the best candidate of each image, by any rule
        prefix     = decoder.commit(prefix, candidates, winner_B, codes_B)

Prefixes of different lengths go through the trunk together, too (``candidate_rows_of``, ``parallel_rows_of``; ``packed.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from oar_scale.model.cache import CachePart, StaticPart, least_candidates, static_pays
from oar_scale.model.packed import Packed, Segment
from oar_scale.model.row_layout import Placed, Rows, Tables, in_one_row, joined
from oar_scale.model.transformer import AnyOrderModel

Number = TypeVar("Number", int, float)
ROWS_AT_ONCE = {"cpu": 512, "cuda": 2**16}
"""Rows that go through the trunk together, as whole images: enough for matrix products at full speed, and few enough that what lies
between the products stays in a CPU's cache."""


@dataclass
class Prefix:
    """The placed codes and their KV cache. Methods of :class:`Decoder` update it in place: only the prefix that they return is valid."""

    cache: Tensor
    """[``spec.cached_pairs``, 2, B, kv_heads, capacity, head_dim]: keys and values, for all rows that a whole image takes."""
    rows: int | Tensor
    """Rows of the cache in use; on static buffers (``cache.py``) int64 [], or [B] of images at different lengths, which is overwritten."""
    last: Placed
    """What was placed last and is not in the cache yet."""
    tables: Tables
    """The layout's tables, made once: weights do not change while an image is placed."""
    version: int = 0
    """Counts writes behind the rows in use: :class:`Candidates` of an older version have been overwritten. Not on static buffers, where
    it would make each step another program."""

    @property
    def static(self) -> bool:
        """Whether steps are the same program, whatever the number of rows in use."""
        return isinstance(self.rows, Tensor)

    def on_static_buffers(self) -> Prefix:
        """The same, in the same memory, with the number of rows in use on the device."""
        if not self.static:
            self.cache[:, :, :, :, self.rows :] = 0  # what is not seen counts with weight 0, which NaN would survive
        return replace(self, rows=torch.full((), self.rows, device=self.cache.device) if isinstance(self.rows, int) else self.rows)

    def varying(self, number: Number) -> Number | Tensor:
        """A number that is another one in each step: as it is, or on static buffers a tensor []."""
        return torch.full((), number, device=self.cache.device) if self.static else number

    def part(self, images: slice) -> CachePart | StaticPart:
        """The cache of some images."""
        pairs = self.cache[:, :, images]
        if isinstance(self.rows, int):
            return CachePart(pairs, self.rows)
        return StaticPart(pairs, self.rows[images] if self.rows.ndim else self.rows)

    def keep(self, image_B: Tensor, row_B: Tensor) -> None:
        """Copy a row of each image, by its place behind the rows in use, to the first place there; the others are forgotten."""
        kept = self.cache[:, :, image_B, :, self.rows + row_B]
        if isinstance(self.rows, int):
            self.cache[:, :, :, :, self.rows] = kept.movedim(0, 2)
        elif self.rows.ndim:
            self.cache[:, :, image_B, :, self.rows] = kept
        else:
            self.cache.index_copy_(4, self.rows[None], kept.movedim(0, 2).unsqueeze(4))
        self.rows += 1

    def changed(self) -> int:
        """Rows behind those in use are overwritten: the new version."""
        self.version += not self.static
        return self.version


@dataclass(frozen=True)
class Candidates:
    """Candidate rows for R cells of each image."""

    cells_BR: Tensor
    rows_BRD: Tensor
    """Normalised rows, ready for the output head."""
    version: int
    """``Prefix.version`` when they were computed."""
    head: torch.nn.Module
    """The model's output head."""

    @property
    def logits_BRV(self) -> Tensor:
        """All logits at once, float32. Where there are many, ``orders.scores.score_rows`` takes them in parts."""
        return cast(Tensor, self.head(self.rows_BRD)).float()


class Entering(NamedTuple):
    """Rows on their way into the cache of a prefix."""

    prefix: Prefix
    rows: Rows
    groups: Sequence[int] | None = None
    """As of :meth:`RowLayout.enter`."""


class Decoder:
    """Incremental inference with an :class:`AnyOrderModel`. It holds no state of its own: all of that is in :class:`Prefix`."""

    def __init__(self, model: AnyOrderModel) -> None:
        self.model = model

    @torch.no_grad()
    def begin(self, condition_BTD: Tensor, spare: int = 0, cache: Tensor | None = None) -> Prefix:
        """Start empty images: fill in the condition rows, which ``model.condition`` returned.

        Args:
            spare: rows that the cache has more than an image takes.
            cache: what :meth:`memory` returned, or a part of it for so many images; None allocates it.
        """
        layout = self.model.layout
        cache = self.memory(condition_BTD, len(condition_BTD), spare) if cache is None else cache
        prefix = Prefix(cache, 0, layout.start(condition_BTD), layout.tables(condition_BTD.device))
        self._append(prefix, layout.head(condition_BTD))
        return prefix

    def memory(self, condition_BTD: Tensor, images: int, spare: int = 0) -> Tensor:
        """The cache of so many images (``Prefix.cache``), uninitialised: for conditions like this, on its device and in its dtype."""
        spec, layout = self.model.spec, self.model.layout
        capacity = layout.head(condition_BTD).x_BLD.shape[1] + layout.stride * spec.cells + spare
        if static_pays(1, condition_BTD.device):  # candidates may be more than cells; a multiple of 8 is what masks of a GPU want
            capacity = (capacity + least_candidates(spec.cells) + 7) // 8 * 8
        return condition_BTD.new_empty(spec.cached_pairs, 2, images, spec.kv_heads or spec.heads, capacity, spec.head_dim)

    def image_bytes(self, condition_BTD: Tensor) -> int:
        """Bytes of the cache for each image."""
        shape = self.memory(condition_BTD[:1], 0).shape
        return math.prod(size for dim, size in enumerate(shape) if dim != 2) * condition_BTD.element_size()

    @torch.no_grad()
    def prefill(self, prefix: Prefix, cells_BK: Tensor, codes_BK: Tensor) -> Prefix:
        """Place K known cells in the given order, in one pass; int64 [B, K] both."""
        if cells_BK.shape[1] == 0:
            return prefix
        codes_BKD = self._codes(prefix, codes_BK)
        if self._mutual(prefix):
            self.append_waiting(prefix)  # they see one another all, those that are placed here do not
        self._append(prefix, self.model.layout(prefix.last, cells_BK, codes_BKD, prefix.tables))
        # The layouts write the row of the last code together with the next cell's: until then it waits here.
        prefix.last = Placed(cells_BK[:, -1:], codes_BKD[:, -1:])
        return prefix

    def candidate_rows(self, prefix: Prefix, cells_BR: Tensor) -> Candidates:
        """One row for each of R cells, all in one pass: each sees the prefix and itself, never another candidate.

        Raises:
            ValueError: more candidates than cells are left, or cells that a raster model cannot place next.
        """
        return self.candidate_rows_of([prefix], [cells_BR])[0]

    @torch.no_grad()
    def candidate_rows_of(self, prefixes: Sequence[Prefix], cells: Sequence[Tensor]) -> list[Candidates]:
        """:meth:`candidate_rows` of several prefixes that go through the trunk together."""
        layout = self.model.layout
        # Several rows that wait (after ``place_parallel``) must see one another, which candidates do not.
        self._append_waiting([prefix for prefix in prefixes if layout.entering(prefix.last) > (1 if layout.joint else 0)])
        enters = [layout.entering(prefix.last) for prefix in prefixes]
        shapes = [(len(cells_BR), before + cells_BR.shape[1]) for before, cells_BR in zip(enters, cells, strict=True)]
        for prefix, (_, rows), cells_BR in zip(prefixes, shapes, cells, strict=True):
            if isinstance(prefix.rows, int) and prefix.rows + rows > prefix.cache.shape[4]:
                raise ValueError(f"{cells_BR.shape[1]} candidates are more than the cells that are left")
        leaving = [prefix.cache.new_empty(*cells_BR.shape, self.model.spec.dim) for prefix, cells_BR in zip(prefixes, cells, strict=True)]
        for load in trunk_loads(shapes, cells[0].device):
            asked = self._ask([(prefixes[at], images, cells[at][images]) for at, images in load])
            for (at, images), rows_bRD in zip(load, asked, strict=True):
                leaving[at][images] = rows_bRD
        for prefix, before in zip(prefixes, enters, strict=True):
            if before:  # the waiting code row went through with the candidates, before them, and stays in the cache
                prefix.rows += 1
                prefix.last = self._nothing(prefix)
        parts = zip(prefixes, cells, leaving, strict=True)
        return [Candidates(cells_BR, rows_BRD, prefix.changed(), self.model.output) for prefix, cells_BR, rows_BRD in parts]

    @torch.no_grad()
    def commit(self, prefix: Prefix, candidates: Candidates, winner_B: Tensor, codes_B: Tensor) -> Prefix:
        """Place ``codes_B`` at the cell of candidate ``winner_B`` (an index into the R candidates) of each image.

        Raises:
            ValueError: other candidates were computed, or one was committed, since these were: their rows are overwritten.
        """
        if candidates.version != prefix.version:
            raise ValueError("these candidates' rows are gone: other candidates were scored since, or one was committed to")
        image_B = torch.arange(len(winner_B), device=winner_B.device)
        if self.model.layout.keeps_questions and candidates.cells_BR.shape[1] == 1:
            prefix.rows += 1  # it lies where the winner's row is kept
        elif self.model.layout.keeps_questions:
            prefix.keep(image_B, winner_B)
        prefix.changed()
        prefix.last = Placed(candidates.cells_BR[image_B, winner_B, None], self._codes(prefix, codes_B[:, None]))
        return prefix

    @torch.no_grad()
    def parallel_rows(self, prefix: Prefix, cells_BM: Tensor) -> Tensor:
        """Normalised rows [B, M, D] about M cells in one pass. :meth:`place_parallel` must follow, with a code for each of the cells.

        Each question of an instructed model sees those before it, as in RandAR's parallel decoding; those of a grouped model see one
        another all. Those of a decoupled model are candidates.

        Raises:
            ValueError: a layout that cannot.
        """
        return self.parallel_rows_of([prefix], [cells_BM])[0]

    @torch.no_grad()
    def parallel_rows_of(self, prefixes: Sequence[Prefix], cells: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`parallel_rows` of several prefixes that go through the trunk together."""
        layout = self.model.layout
        if not layout.asks_jointly:
            return [candidates.rows_BRD for candidates in self.candidate_rows_of(prefixes, cells)]
        asking = []
        for prefix, cells_BM in zip(prefixes, cells, strict=True):
            groups = (layout.entering(prefix.last), cells_BM.shape[1]) if self.model.spec.mutual_steps else None
            asking.append(Entering(prefix, layout.parallel(prefix.last, cells_BM, prefix.tables), groups))
        leaving = self._enter(asking, [cells_BM.shape[1] for cells_BM in cells])
        for prefix, cells_BM in zip(prefixes, cells, strict=True):
            prefix.last = self._nothing(prefix)
            # The first instruction row is what training would have there; the others lack the codes between, and are computed again.
            prefix.rows -= cells_BM.shape[1] - layout.keeps_questions
        return [self.model.norm(rows_BMD) for rows_BMD in leaving]

    def place_parallel(self, prefix: Prefix, cells_BM: Tensor, codes_BM: Tensor) -> Prefix:
        """Place the codes of the cells that :meth:`parallel_rows` was called with last."""
        prefix.last = Placed(cells_BM, self._codes(prefix, codes_BM))
        return prefix

    @torch.no_grad()
    def append_waiting(self, prefix: Prefix) -> Prefix:
        """Let what was placed last enter the cache on its own, where the layout can write its rows before the next cell is known."""
        if self.model.layout.entering(prefix.last):
            self._append_waiting([prefix])
        return prefix

    def _append_waiting(self, prefixes: Sequence[Prefix]) -> None:
        """:meth:`append_waiting` where something waits."""
        entering = []
        for prefix in prefixes:
            waiting, _ = self.model.layout.candidates(prefix.last, prefix.last.cells_BK[:, :0], prefix.tables)
            assert waiting is not None
            entering.append(Entering(prefix, waiting, (waiting.cells_BL.shape[1],) if self._mutual(prefix) else None))
        self._enter(entering, [0] * len(entering))
        for prefix in prefixes:
            prefix.last = self._nothing(prefix)

    def _nothing(self, prefix: Prefix) -> Placed:
        """Nothing waits to enter the cache: K = 0."""
        cells_BK, codes_BKD = prefix.last
        return Placed(cells_BK[:, :0], codes_BKD[:, :0])

    def _codes(self, prefix: Prefix, codes_BK: Tensor) -> Tensor:
        """Rows [B, K, D] of codes, in the cache's dtype."""
        return self.model.code_rows(codes_BK).to(prefix.cache.dtype)

    def _ask(self, load: Sequence[tuple[Prefix, slice, Tensor]]) -> list[Tensor]:
        """Normalised candidate rows [b, R, D] of some images of each prefix."""
        layout, layers = self.model.layout, self.model.layers
        made = [layout.candidates(prefix.last.images(images), cells_bR, prefix.tables) for prefix, images, cells_bR in load]
        parts = [prefix.part(images) for prefix, images, _ in load]
        if len(load) == 1:
            return [self.model.norm(layout.ask(layers, parts[0], *made[0]))]
        segments, rows = [], []
        for part, (entering, candidates) in zip(parts, made, strict=True):
            before = 0 if entering is None else entering.cells_BL.shape[1]
            segments.append(Segment(part, len(candidates.cells_BL), before, candidates.cells_BL.shape[1]))
            rows.append(candidates if entering is None else joined([entering, candidates], dim=1))
        packed = Packed(segments)
        unpacked_rows = packed.unpacked(self.model.norm(layout.ask(layers, packed, None, in_one_row(rows))))
        return [rows_bLD[:, segment.entering :] for segment, rows_bLD in zip(segments, unpacked_rows, strict=True)]

    def _mutual(self, prefix: Prefix) -> bool:
        """Whether what waits is a parallel step whose codes see one another all."""
        return self.model.spec.mutual_steps and self.model.layout.entering(prefix.last) > 1

    def _append(self, prefix: Prefix, rows: Rows) -> None:
        """Run L rows that see the prefix and those of themselves before them, and add them to the cache."""
        if rows.cells_BL.shape[1]:
            self._enter([Entering(prefix, rows)], [0])

    def _enter(self, entering: Sequence[Entering], leaving: Sequence[int]) -> list[Tensor]:
        """Run rows that see their prefix and one another (:meth:`RowLayout.enter`), and add them to its cache.

        Returns:
            The last rows of each, as many as are ``leaving``: [B, leaving, D], as they leave the trunk.
        """
        if not entering:
            return []
        shapes = [(rows.cells_BL.shape[0], rows.cells_BL.shape[1]) for _, rows, _ in entering]
        last = [
            each.rows.x_BLD.new_empty(len(each.rows.x_BLD), count, self.model.spec.dim)
            for each, count in zip(entering, leaving, strict=True)
        ]
        for load in trunk_loads(shapes, entering[0].rows.x_BLD.device):
            for (at, images), x_bLD in zip(load, self._entered([(entering[at], images) for at, images in load]), strict=True):
                last[at][images] = x_bLD[:, x_bLD.shape[1] - leaving[at] :]
        for (prefix, _, _), (_, length) in zip(entering, shapes, strict=True):
            prefix.rows += length
        return last

    def _entered(self, load: Sequence[tuple[Entering, slice]]) -> list[Tensor]:
        """The rows [b, L, D] of some images of each, as they leave the trunk."""
        layout, layers = self.model.layout, self.model.layers
        rows = [Rows(each.rows.x_BLD[images], each.rows.cells_BL[images]) for each, images in load]
        parts = [each.prefix.part(images) for each, images in load]
        if len(load) == 1:
            return [layout.enter(layers, parts[0], rows[0], load[0][0].groups)]
        shapes, groups = (each.cells_BL.shape for each in rows), (each.groups for each, _ in load)
        segments = [Segment(part, images, length, groups=of) for part, (images, length), of in zip(parts, shapes, groups, strict=True)]
        packed = Packed(segments)
        return packed.unpacked(layout.enter(layers, packed, in_one_row(rows)))


def trunk_loads(shapes: Sequence[tuple[int, int]], device: torch.device) -> Iterator[list[tuple[int, slice]]]:
    """Which images of several batches go through the trunk together: whole images with at most :data:`ROWS_AT_ONCE` rows, but one image
    at least.

    Args:
        shapes: images, and rows of each image.

    Returns:
        The batches, by their index, and images of each.
    """
    most = ROWS_AT_ONCE.get(device.type, ROWS_AT_ONCE["cpu"])
    load: list[tuple[int, slice]] = []
    room = most
    for at, (images, rows) in enumerate(shapes):
        start = 0
        while start < images:
            fitting = max(room // max(rows, 1), 0 if load else 1)
            if not fitting:
                yield load
                load, room = [], most
                continue
            stop = min(images, start + fitting)
            load.append((at, slice(start, stop)))
            start, room = stop, room - (stop - start) * rows
    if load:
        yield load


def image_chunks(batch: int, rows: int, device: torch.device) -> Iterator[slice]:
    """:func:`trunk_loads` of one batch."""
    return (images for load in trunk_loads([(batch, rows)], device) for _, images in load)
