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
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from oar_scale.model.cache import CachePart, StaticPart, least_candidates, static_pays
from oar_scale.model.row_layout import Placed, Rows, Tables
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
    """Rows of the cache in use; on static buffers (``cache.py``) int64 [], which is overwritten."""
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
        return CachePart(pairs, self.rows) if isinstance(self.rows, int) else StaticPart(pairs, self.rows)

    def keep(self, image_B: Tensor, row_B: Tensor) -> None:
        """Copy a row of each image, by its place behind the rows in use, to the first place there; the others are forgotten."""
        kept = self.cache[:, :, image_B, :, self.rows + row_B].movedim(0, 2)
        if isinstance(self.rows, int):
            self.cache[:, :, :, :, self.rows] = kept
        else:
            self.cache.index_copy_(4, self.rows[None], kept.unsqueeze(4))
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


class Decoder:
    """Incremental inference with an :class:`AnyOrderModel`. It holds no state of its own: all of that is in :class:`Prefix`."""

    def __init__(self, model: AnyOrderModel) -> None:
        self.model = model

    @torch.no_grad()
    def begin(self, condition_BTD: Tensor, spare: int = 0) -> Prefix:
        """Start empty images: allocate the cache, with ``spare`` rows more than an image takes, and fill in the condition rows, which
        ``model.condition`` returned."""
        spec, layout, batch = self.model.spec, self.model.layout, len(condition_BTD)
        head = layout.head(condition_BTD)
        capacity = head.x_BLD.shape[1] + layout.stride * spec.cells + spare
        if static_pays(1, condition_BTD.device):  # candidates may be more than cells; a multiple of 8 is what masks of a GPU want
            capacity = (capacity + least_candidates(spec.cells) + 7) // 8 * 8
        cache = condition_BTD.new_empty(spec.cached_pairs, 2, batch, spec.kv_heads or spec.heads, capacity, spec.head_dim)
        prefix = Prefix(cache, 0, layout.start(condition_BTD), layout.tables(condition_BTD.device))
        self._append(prefix, head)
        return prefix

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

    @torch.no_grad()
    def candidate_rows(self, prefix: Prefix, cells_BR: Tensor) -> Candidates:
        """One row for each of R cells, all in one pass: each sees the prefix and itself, never another candidate.

        Raises:
            ValueError: more candidates than cells are left, or cells that a raster model cannot place next.
        """
        batch, count = cells_BR.shape
        enters = self.model.layout.entering(prefix.last)
        # Several rows that wait (after ``place_parallel``) must see one another, which candidates do not.
        if enters > 1 or (enters and not self.model.layout.joint):
            self.append_waiting(prefix)
            enters = 0
        if isinstance(prefix.rows, int) and prefix.rows + enters + count > prefix.cache.shape[4]:
            raise ValueError(f"{count} candidates are more than the cells that are left")
        rows_BRD = prefix.cache.new_empty(batch, count, self.model.spec.dim)
        for images in image_chunks(batch, enters + count, cells_BR.device):
            rows_BRD[images] = self._candidates_of(prefix, images, cells_BR[images])
        if enters:  # the waiting code row went through with the candidates, before them, and stays in the cache
            prefix.rows += 1
            prefix.last = self._nothing(prefix)
        return Candidates(cells_BR, rows_BRD, prefix.changed(), self.model.output)

    @torch.no_grad()
    def commit(self, prefix: Prefix, candidates: Candidates, winner_B: Tensor, codes_B: Tensor) -> Prefix:
        """Place ``codes_B`` at the cell of candidate ``winner_B`` (an index into the R candidates) of each image.

        Raises:
            ValueError: other candidates were computed, or one was committed, since these were: their rows are overwritten.
        """
        if candidates.version != prefix.version:
            raise ValueError("these candidates' rows are gone: other candidates were scored since, or one was committed to")
        image_B = torch.arange(len(winner_B), device=winner_B.device)
        if self.model.layout.keeps_questions:
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
        layout = self.model.layout
        if not layout.asks_jointly:
            return self.candidate_rows(prefix, cells_BM).rows_BRD
        count = cells_BM.shape[1]
        groups = (layout.entering(prefix.last), count) if self.model.spec.mutual_steps else None
        rows_BMD = self._append(prefix, layout.parallel(prefix.last, cells_BM, prefix.tables), leaving=count, groups=groups)
        prefix.last = self._nothing(prefix)
        # The first instruction row is what training would have there; the others lack the codes between, and are computed again.
        prefix.rows -= count - layout.keeps_questions
        return self.model.norm(rows_BMD)

    def place_parallel(self, prefix: Prefix, cells_BM: Tensor, codes_BM: Tensor) -> Prefix:
        """Place the codes of the cells that :meth:`parallel_rows` was called with last."""
        prefix.last = Placed(cells_BM, self._codes(prefix, codes_BM))
        return prefix

    @torch.no_grad()
    def append_waiting(self, prefix: Prefix) -> Prefix:
        """Let what was placed last enter the cache on its own, where the layout can write its rows before the next cell is known."""
        if self.model.layout.entering(prefix.last):
            waiting, _ = self.model.layout.candidates(prefix.last, prefix.last.cells_BK[:, :0], prefix.tables)
            assert waiting is not None
            self._append(prefix, waiting, groups=(waiting.cells_BL.shape[1],) if self._mutual(prefix) else None)
            prefix.last = self._nothing(prefix)
        return prefix

    def _nothing(self, prefix: Prefix) -> Placed:
        """Nothing waits to enter the cache: K = 0."""
        cells_BK, codes_BKD = prefix.last
        return Placed(cells_BK[:, :0], codes_BKD[:, :0])

    def _codes(self, prefix: Prefix, codes_BK: Tensor) -> Tensor:
        """Rows [B, K, D] of codes, in the cache's dtype."""
        return self.model.code_rows(codes_BK).to(prefix.cache.dtype)

    def _candidates_of(self, prefix: Prefix, images: slice, cells_bR: Tensor) -> Tensor:
        """Normalised candidate rows [b, R, D] of some images."""
        entering, candidates = self.model.layout.candidates(prefix.last.images(images), cells_bR, prefix.tables)
        return self.model.norm(self.model.layout.ask(self.model.layers, prefix.part(images), entering, candidates))

    def _mutual(self, prefix: Prefix) -> bool:
        """Whether what waits is a parallel step whose codes see one another all."""
        return self.model.spec.mutual_steps and self.model.layout.entering(prefix.last) > 1

    def _append(self, prefix: Prefix, rows: Rows, leaving: int = 0, groups: Sequence[int] | None = None) -> Tensor:
        """Run L rows that see the prefix and one another (:meth:`RowLayout.enter`), and add them to the cache.

        Returns:
            The last ``leaving`` rows, [B, leaving, D], as they leave the trunk.
        """
        batch, length = rows.cells_BL.shape
        last_BMD = rows.x_BLD.new_empty(batch, leaving, rows.x_BLD.shape[2])
        if length == 0:
            return last_BMD
        layout = self.model.layout
        for images in image_chunks(batch, length, rows.x_BLD.device):
            part = Rows(rows.x_BLD[images], rows.cells_BL[images])
            x_bLD = layout.enter(self.model.layers, prefix.part(images), part, groups)
            last_BMD[images] = x_bLD[:, length - leaving :]
        prefix.rows += length
        return last_BMD


def image_chunks(batch: int, rows: int, device: torch.device) -> Iterator[slice]:
    """Slices of the batch, so many images each that at most :data:`ROWS_AT_ONCE` rows (but one image at least) go through together."""
    images = max(1, ROWS_AT_ONCE.get(device.type, ROWS_AT_ONCE["cpu"]) // max(rows, 1))
    return (slice(start, start + images) for start in range(0, batch, images))
