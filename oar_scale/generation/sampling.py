"""Sampling images: the model chooses the next cell and its code.

    repeat until no cell is empty
        one candidate row per empty cell           p(code | caption, placed codes, cell) for all of them, in one pass
        cell  = best over cells of score                         most confident cell   (+ order_temperature * Gumbel)
        code ~ p( . | cell)                                      temperature, top-k, top-p, min-p (``drawing``)

The score of a cell is by default the largest log-probability of its distribution, before a code is drawn: choosing by the probability of
drawn codes (score ``sampled``) favours cells that happened to draw their likely code. In the first steps this tends to pick background.
What is best among cells, and when two are equal, is as in extraction (``orders.selection``). The first cell of a blind start
(``ModelSpec.blind_start``), where all are equal, is chosen by the seed, as there; later the first of equals in raster order is placed.
With a given order there is one candidate per step, the next cell of the order, and everything else is the same. A late order
(``orders.policies``) is given for the first cells; when those are placed, all others are scored once, which gives their order.

Fewer steps than cells place several cells in one pass: the next ones of the order, as RandAR does, or the most confident ones. The
same images in fewer passes, along a given order, are what ``drafting`` makes.

Images of a batch may have different numbers of known cells. Those with the fewest begin, and another joins when they have come to
the number of cells that it was given (:class:`_Group`): all images of a pass have as many rows in the cache, and each is drawn as
if it were alone.

Under guidance every image goes through the model with its caption and without, in one batch, and cells are compared by the guided
distribution, too.

A step is a function of the model's prefix and of tensors. Where static buffers pay (``model.cache``), steps are recorded and replayed
(``model.steps``) once all images of the batch have joined.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.generation.drafting import Placing, draw_drafted
from oar_scale.generation.drawing import draw_most_confident, draw_next, guided_rows
from oar_scale.generation.known_cells import Known, known_counts, sequence
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, Decoder, Prefix
from oar_scale.model.cache import padded_candidates, static_pays
from oar_scale.model.row_layout import Placed
from oar_scale.model.steps import Outputs, Steps
from oar_scale.orders.policies import LateOrder
from oar_scale.orders.selection import CounterRNG, Images, check_numbers, empty_cells
from oar_scale.orders.step_sizes import cells_per_step

__all__ = ["Generated", "Known", "check_eval", "generate"]


class Generated(NamedTuple):
    """Sampled images: codes, and the order in which their cells were placed."""

    codes_BN: Tensor
    """int64, raster order."""
    order_BN: Tensor
    """int64: the cells as they were placed, known ones first."""
    score_BN: Tensor
    """float32 nats: log of the largest guided probability at the cell of that step; 0 for known cells."""
    passes_B: Tensor
    """int64: how often the model was asked about cells of that image. One by one, it is the number of cells drawn."""


@torch.no_grad()  # not inference mode: the model keeps its table of rotations, and may be trained afterwards
def generate(
    model: AnyOrderModel,
    condition_BTD: Tensor,
    settings: SampleSettings,
    seed: int,
    order_BN: Tensor | LateOrder | None = None,
    known: Known | None = None,
    images_B: Images | None = None,
) -> Generated:
    """Draw one image for each condition.

    Args:
        condition_BTD: what ``model.condition`` returned. Under guidance the model sees a batch of 2B.
        seed: with an image's number, of all its noise: the same image comes of it in any batch and on any device (up to the
            roundings of its logits).
        order_BN: a permutation of the cells for each image, to be followed; None: the model chooses. Known cells are
            passed over; beside them a late order has no first cells of its own.
        known: cells whose codes are given.
        images_B: a number for each image; default 0 .. B - 1.

    Raises:
        ValueError: the model is in training mode; an order that is no permutation of the cells; known cells that repeat
            or lie outside the grid, or codes outside the vocabulary; a layout that cannot do what the settings want.
        ArithmeticError: the model's logits are not numbers.
    """
    check_eval(model)
    batch, device, cells = len(condition_BTD), condition_BTD.device, model.spec.cells
    if known is None:
        nothing = torch.empty(batch, 0, dtype=torch.long, device=device)
        known = Known(nothing, nothing)
    counts_B = known_counts(model, batch, order_BN if isinstance(order_BN, Tensor) else None, known)
    images_B = np.arange(batch) if images_B is None else images_B
    if len(images_B) != batch:
        raise ValueError(f"images_B has {len(images_B)} numbers for {batch} images")
    # From here on, the images with the fewest known cells come first.
    by_count = np.argsort(counts_B, kind="stable")
    at_B = torch.from_numpy(by_count).to(device)
    rng = CounterRNG.of(seed, np.asarray(images_B)[by_count], 0, cells, device)
    if isinstance(order_BN, LateOrder):
        order_BN = order_BN.part(at_B)
    elif order_BN is not None:
        order_BN = order_BN[at_B]
    known = Known(known.cells_BK[at_B], known.codes_BK[at_B])
    counts_B, condition_BTD = counts_B[by_count], condition_BTD[at_B]
    parts = []
    for part in _parts(model, condition_BTD, settings):
        order = order_BN.part(part) if isinstance(order_BN, LateOrder) else order_BN
        order = order[part] if isinstance(order, Tensor) else order
        of_part = Known(*(each_BK[part] for each_BK in known))
        parts.append(_Drawing(model, condition_BTD[part], settings, rng.part(part), order, of_part, counts_B[part]).run())
    drawn = Generated(*(torch.cat(each) for each in zip(*parts, strict=True)))
    check_numbers(drawn.score_BN)
    back_B = at_B.argsort()
    return Generated(*(each_B[back_B] for each_B in drawn))


CACHE_BYTES = {"cpu": 4 << 30, "cuda": 32 << 30}
"""Of the KV cache of the images that are drawn together."""


def _parts(model: AnyOrderModel, condition_BTD: Tensor, settings: SampleSettings) -> list[slice]:
    """The images that are drawn together: all of them, or as many as fit into the memory that they may take."""
    of_image = Decoder(model).image_bytes(condition_BTD) * (2 if settings.guided else 1)
    most = max(1, CACHE_BYTES.get(condition_BTD.device.type, CACHE_BYTES["cpu"]) // of_image)
    return [slice(start, start + most) for start in range(0, len(condition_BTD), most)]


class _Drawing:
    """Images that are being sampled, those with the fewest known cells first."""

    def __init__(
        self,
        model: AnyOrderModel,
        condition_BTD: Tensor,
        settings: SampleSettings,
        rng: CounterRNG,
        order: Tensor | LateOrder | None,
        known: Known,
        counts_B: NDArray[np.int64],
    ) -> None:
        self.model, self.settings, self.rng, self.order, self.known, self.counts_B = model, settings, rng, order, known, counts_B
        self.batch, self.cells, device = len(counts_B), model.spec.cells, condition_BTD.device
        self.condition_GTD = condition_BTD
        if settings.guided:
            self.condition_GTD = torch.stack([condition_BTD, model.null_condition(self.batch).to(condition_BTD)], dim=1).flatten(0, 1)
        self.drawn = Generated(
            torch.zeros(self.batch, self.cells, dtype=torch.long, device=device),
            torch.zeros(self.batch, self.cells, dtype=torch.long, device=device),
            torch.zeros(self.batch, self.cells, device=device),
            torch.zeros(self.batch, dtype=torch.long, device=device),
        )
        for images in self.same_count():
            self.keep(images, 0, *(each_BK[images, : int(counts_B[images.start])] for each_BK in known))
        self.sequence_BN = sequence(order, known, counts_B) if isinstance(order, Tensor) else None
        """All cells as they are placed; of a late order, what is known of it by now."""
        if isinstance(order, LateOrder):
            self.sequence_BN = torch.zeros_like(self.drawn.order_BN)

    def run(self) -> Generated:
        """Draw all of them."""
        drafts = self.settings.draft and self.sequence_BN is not None  # cells that the model has yet to choose cannot be drafted
        if drafts and not isinstance(self.order, LateOrder):
            return self._drafted(self.counts_B)
        self.decoder = Decoder(self.model)
        self.prefix = self.decoder.begin(self.condition_GTD)
        groups = [_Group(self, images) for images in self.same_count()]
        if drafts:
            counts_B = np.concatenate([np.full(group.images.stop - group.images.start, group.count) for group in groups])
            del groups, self.prefix  # drafts have a cache of their own, with room for a window: never both at once
            return self._drafted(counts_B)
        first, *others = groups
        stops = list(accumulate(cells_per_step(self.cells, self.settings.steps), initial=0))
        for other in others:
            stop = stops[bisect_left(stops, max(first.count, other.count))]
            for group in (first, other):
                group.advance(stops, stop)
            if stop < self.cells:
                first.join(other)
        first.advance(stops, self.cells, joined=True)
        return self.drawn

    def _drafted(self, counts_B: NDArray[np.int64]) -> Generated:
        assert self.sequence_BN is not None
        before = Placing(self.sequence_BN, self.drawn.codes_BN.gather(1, self.sequence_BN), self.drawn.score_BN, self.drawn.passes_B)
        settled_B = torch.from_numpy(counts_B).to(self.sequence_BN.device)
        after = draw_drafted(self.model, self.condition_GTD, self.settings, self.rng, before, settled_B)
        return Generated(after.codes_BN.gather(1, self.sequence_BN.argsort(1)), self.sequence_BN, after.score_BN, after.passes_B)

    def same_count(self) -> list[slice]:
        """The images with the same number of known cells, for each such number."""
        starts = [0, *(np.flatnonzero(np.diff(self.counts_B)) + 1).tolist(), self.batch]
        return [slice(start, end) for start, end in pairwise(starts)]

    def part(self, images: slice) -> Prefix:
        """The beginning of some images, in the memory of all."""
        rows = slice(images.start * self.branches, images.stop * self.branches)
        return replace(self.prefix, cache=self.prefix.cache[:, :, rows], last=self.prefix.last.images(rows))

    @property
    def branches(self) -> int:
        """2 under guidance: after each image comes the same one without its caption."""
        return 2 if self.settings.guided else 1

    def keep(self, images: slice, count: int, cells_BM: Tensor, codes_BM: Tensor, scores_BM: Tensor | None = None) -> None:
        """Note down the cells of some images after the first ``count`` ones."""
        places = slice(count, count + cells_BM.shape[1])
        self.drawn.codes_BN[images].scatter_(1, cells_BM, codes_BM)
        self.drawn.order_BN[images, places] = cells_BM
        if scores_BM is not None:
            self.drawn.score_BN[images, places] = scores_BM


_Step = tuple[Prefix, Outputs]
"""What a step returns: the prefix behind it, and what it placed."""


class _Group:
    """Images that have the same number of cells, and the model's cache of them."""

    def __init__(self, drawing: _Drawing, images: slice) -> None:
        self.drawing, self.decoder, self.settings, self.images = drawing, drawing.decoder, drawing.settings, images
        self.rng, self.count, self.steps = drawing.rng.part(images), int(drawing.counts_B[images.start]), Steps()
        known_bK = (self._branches(each_BK[images, : self.count]) for each_BK in drawing.known)
        self.prefix = self.decoder.prefill(drawing.part(images), *known_bK)
        if isinstance(drawing.order, LateOrder):
            self._begin(drawing.order)

    def advance(self, stops: list[int], end: int, *, joined: bool = False) -> None:
        """Place cells until there are ``end``; each pass goes to the next one of ``stops``.

        Args:
            joined: no other images have yet to.
        """
        most = max(after - before for before, after in pairwise(stops) if after > self.count) if self.count < end else 0
        while self.count < end:
            stop = stops[bisect_right(stops, self.count)]
            asked = self.drawing.cells - self.count if self.drawing.sequence_BN is None else most
            if joined and static_pays(asked * len(self.prefix.last.cells_BK), self.prefix.cache.device):
                self.prefix = self.prefix.on_static_buffers()
            if self.drawing.sequence_BN is None:
                self._place_most_confident(stop - self.count)
            else:
                self._place_next(self.drawing.sequence_BN[self.images, self.count : stop])

    def join(self, other: _Group) -> None:
        """Take in the images behind these, which have as many cells."""
        first, second = (self.decoder.append_waiting(group.prefix) for group in (self, other))
        assert (self.count, first.rows) == (other.count, second.rows)
        self.images = slice(self.images.start, other.images.stop)
        last = Placed(*(torch.cat(pair) for pair in zip(first.last, second.last, strict=True)))
        self.prefix, self.rng = replace(self.drawing.part(self.images), rows=first.rows, last=last), self.drawing.rng.part(self.images)

    def _begin(self, order: LateOrder) -> None:
        """Place the first cells of a late order, where none are known; then note down the order of the others, which is known now."""
        if self.count == 0:
            for cell_B in order.first_BK[self.images].unbind(1):
                self._place_next(cell_B[:, None])
        assert self.drawing.sequence_BN is not None
        self.drawing.sequence_BN[self.images] = self.drawing.drawn.order_BN[self.images]
        if self.count < self.drawing.cells:
            empty_BR = empty_cells(self._empty_cells(), self.drawing.cells - self.count)
            rows_GRD = self.decoder.candidate_rows(self.prefix, self._branches(empty_BR)).rows_BRD
            self.drawing.sequence_BN[self.images, self.count :] = order.rest(rows_GRD[:: self.drawing.branches], empty_BR)
            self.drawing.drawn.passes_B[self.images] += 1

    def _place_most_confident(self, size: int) -> None:
        """Place the ``size`` most confident of the empty cells."""
        count, cells = self.drawing.cells - self.count, self.drawing.cells
        asked = padded_candidates(count, cells) if self.prefix.static else count
        number = self.prefix.varying(self.count) if self.settings.order_temperature else 0
        blind = self.count == 0 and self.drawing.model.spec.blind_start
        # Nothing is asked behind the last cells, so they need not enter the cache. One cell alone takes no pass to be committed: that
        # step stays of the kind of the steps before it.
        last = 1 < size == count
        arguments = self._empty_cells(), number, self._scale(), asked, size, blind, last
        self.prefix, placed = self.steps(self._most_confident, self.prefix, *arguments)
        self._keep(*placed)

    def _most_confident(
        self, prefix: Prefix, empty_BN: Tensor, number: int | Tensor, scale: float | Tensor, asked: int, size: int, blind: bool, last: bool
    ) -> _Step:
        """The step of :meth:`_place_most_confident`, which asks about at least all empty cells."""
        cells_BR = empty_cells(empty_BN, asked)
        candidates = self.decoder.candidate_rows(prefix, self._branches(cells_BR))
        rows_BRD, head = self._guide(candidates.rows_BRD, scale), self.drawing.model.output
        empty_BR = empty_BN.gather(1, cells_BR) if prefix.static else None  # behind the empty cells come others, to fill up
        blind_B1 = torch.ones_like(self.rng.image_B1, dtype=torch.bool) if blind else None
        drawn = draw_most_confident(head, rows_BRD, cells_BR, size, self.settings, self.rng, number, empty_BR, blind_B1)
        if last:
            return prefix, drawn[1:]
        winner_B, cells_BM, codes_BM = drawn.candidate_BM[:, 0], drawn.cells_BM, drawn.codes_BM
        prefix = self.decoder.commit(prefix, candidates, self._branches(winner_B), self._branches(codes_BM[:, 0]))
        # The rows of the others did not see the cells placed in the same step before them, so they are computed again.
        prefix = self.decoder.prefill(prefix, self._branches(cells_BM[:, 1:]), self._branches(codes_BM[:, 1:]))
        return prefix, drawn[1:]

    def _place_next(self, cells_BM: Tensor) -> None:
        """Place the next M cells of the order in one pass."""
        self.prefix, placed = self.steps(self._next, self.prefix, cells_BM, self._scale())
        self._keep(cells_BM, *placed)

    def _next(self, prefix: Prefix, cells_BM: Tensor, scale: float | Tensor) -> _Step:
        """The step of :meth:`_place_next`."""
        if cells_BM.shape[1] == 1:  # its candidate row may stay in the cache; parallel decoding computes rows twice
            candidates = self.decoder.candidate_rows(prefix, self._branches(cells_BM))
            rows_GMD = candidates.rows_BRD
        else:
            candidates = None
            rows_GMD = self.decoder.parallel_rows(prefix, self._branches(cells_BM))
        drawn = draw_next(self.drawing.model.output, self._guide(rows_GMD, scale), cells_BM, self.settings, self.rng)
        if candidates:
            code_G = self._branches(drawn.codes_BM[:, 0])
            prefix = self.decoder.commit(prefix, candidates, torch.zeros_like(code_G), code_G)
        else:
            prefix = self.decoder.place_parallel(prefix, self._branches(cells_BM), self._branches(drawn.codes_BM))
        return prefix, (drawn.codes_BM, drawn.score_BM)

    def _empty_cells(self) -> Tensor:
        """The empty cells, bool [B, N]."""
        order_BN = self.drawing.drawn.order_BN[self.images]
        return torch.ones_like(order_BN, dtype=torch.bool).scatter(1, order_BN[:, : self.count], False)

    def _keep(self, cells_BM: Tensor, codes_BM: Tensor, scores_BM: Tensor) -> None:
        self.drawing.keep(self.images, self.count, cells_BM, codes_BM, scores_BM)
        self.drawing.drawn.passes_B[self.images] += 1
        self.count += cells_BM.shape[1]

    def _branches(self, rows: Tensor) -> Tensor:
        """Rows of images, each of them again for the same image without its caption."""
        return rows.repeat_interleave(self.drawing.branches, dim=0)

    def _scale(self) -> float | Tensor:
        """The guidance scale of the next step; on static buffers a tensor [1, 1], where it changes."""
        scale = self.settings.scale(self.count, self.drawing.cells)
        varying = scale if self.settings.guidance_schedule == "constant" else self.prefix.varying(scale)
        return varying.expand(1, 1) if isinstance(varying, Tensor) else varying

    def _guide(self, rows_GRD: Tensor, scale: float | Tensor) -> Tensor:
        return guided_rows(rows_GRD, scale) if self.settings.guided else rows_GRD


def check_eval(model: AnyOrderModel) -> None:
    """Raises ValueError for a model in training mode."""
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes its answers: call model.eval() first")
