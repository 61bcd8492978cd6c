"""Steps of drawings that are at different lengths and of different kinds (``continuous.py``).

A drawing under way is a few numbers (:class:`Course`) and its part of tensors that are allotted once (:class:`Slots`). In a step each asks
the model once: about the next cells of its order, about all empty cells, or about these for the rest of a late order.

    run     drawings in slots side by side that are in the same state, or follow an order     one attention, by masks where lengths differ
    pass    the rows of all runs, packed (``model.packed``)                                 one product with each matrix
    draw    all drawings with the same settings                                               cells and codes

So drawings that were added together go on as one batch, and all others share the products with matrices. Nothing of a course changes
before all of that is done.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.generation.drawing import Drawn, draw_most_confident, draw_next, guided_rows
from oar_scale.generation.sampling import Generated
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, Candidates, Decoder, Prefix
from oar_scale.model.row_layout import Placed, Tables
from oar_scale.orders.policies import LateOrder
from oar_scale.orders.selection import CounterRNG, empty_cells

BRANCHES = 2
"""Rows of the cache's batch that a slot has: under guidance the image with its caption, and without."""


class Slots(NamedTuple):
    """What S drawings know, on the device."""

    cache: Tensor
    """As ``Prefix.cache``, of a batch of S x 2."""
    tables: Tables
    """As ``Prefix.tables``."""
    codes_SN: Tensor
    order_SN: Tensor
    """The cells as they were placed, known ones first."""
    sequence_SN: Tensor
    """All cells in their order, as far as it is known."""
    score_SN: Tensor
    empty_SN: Tensor
    rng: CounterRNG

    @classmethod
    def of(cls, model: AnyOrderModel, slots: int) -> Slots:
        """Empty slots."""
        null_1TD, shape = model.null_condition(1).detach(), (slots, model.spec.cells)
        device = null_1TD.device
        codes_SN, order_SN, sequence_SN = torch.zeros(3, *shape, dtype=torch.long, device=device)
        score_SN, empty_SN = torch.zeros(shape, device=device), torch.ones(shape, dtype=torch.bool, device=device)
        cache, rng = Decoder(model).memory(null_1TD, slots * BRANCHES), CounterRNG.none(slots, model.spec.cells, device)
        return cls(cache, model.layout.tables(device), codes_SN, order_SN, sequence_SN, score_SN, empty_SN, rng)

    def begin(self, slot: int, cells_K: Tensor, codes_K: Tensor, seed: int, number: int) -> None:
        """Make a slot ready for a drawing of which K cells are known."""
        self.lanes(slice(slot, slot + 1), BRANCHES).zero_()  # rows that are not seen count with weight 0, which NaN would survive
        self.codes_SN[slot, cells_K] = codes_K
        self.order_SN[slot, : len(cells_K)] = cells_K
        self.score_SN[slot] = 0.0
        self.empty_SN[slot] = True
        self.empty_SN[slot, cells_K] = False
        self.rng.put(slot, seed, number)

    def lanes(self, slots: slice, branches: int) -> Tensor:
        """The cache of some slots: of both branches, or of the first alone."""
        return self.cache[:, :, slots.start * BRANCHES : slots.stop * BRANCHES : BRANCHES // branches]

    def keep(self, slot_B1: Tensor, count_B1: Tensor, drawn: Drawn) -> None:
        """Note down cells that were placed after the first ``count`` ones."""
        place_BM = count_B1 + torch.arange(drawn.cells_BM.shape[1], device=slot_B1.device)
        self.order_SN[slot_B1, place_BM] = drawn.cells_BM
        self.score_SN[slot_B1, place_BM] = drawn.score_BM
        self.codes_SN[slot_B1, drawn.cells_BM] = drawn.codes_BM
        self.empty_SN[slot_B1, drawn.cells_BM] = False

    def image(self, slot: int, passes: int) -> Generated:
        """A drawing that is done."""
        codes_1N, order_1N, score_1N = (each[slot : slot + 1].clone() for each in (self.codes_SN, self.order_SN, self.score_SN))
        return Generated(codes_1N, order_1N, score_1N, torch.tensor([passes], device=codes_1N.device))


class Want(NamedTuple):
    """What a drawing asks the model for in a step."""

    what: Literal["next", "best", "rest"]
    """Codes for the next cells of its order; the most confident cells and their codes; the rest of a late order."""
    size: int
    """Cells that are placed."""


@dataclass
class Course:
    """A drawing under way."""

    slot: int
    settings: SampleSettings
    condition_GTD: Tensor
    """Under guidance, with the null condition behind it."""
    stops: list[int]
    """How many cells are there after each step of an empty image."""
    follows: bool
    """It has an order; of a late one, the first cells or by now all."""
    late: LateOrder | None
    """The order of all cells is not known yet."""
    count: int
    """Cells that are there."""
    first: int = 0
    """So many are there before the rest of a late order is asked for."""
    rows: int | None = None
    """Rows of the cache in use; None: the condition is not there yet."""
    waiting: int = 0
    """Of the codes that are there, so many are not in the cache."""
    passes: int = 0

    @property
    def branches(self) -> int:
        """2 under guidance."""
        return len(self.condition_GTD)

    @property
    def want(self) -> Want:
        """What it asks for next."""
        if self.late is not None:
            return Want("next", 1) if self.count < self.first else Want("rest", 0)
        return Want("next" if self.follows else "best", self.stops[bisect_right(self.stops, self.count)] - self.count)

    @property
    def state(self) -> tuple[object, ...]:
        """Equal of drawings that can be one run."""
        want = self.want
        # Those that follow an order ask about equally many cells wherever they are.
        length = None if want.what == "next" and self.rows is not None else (self.rows, self.count)
        return want, self.settings, self.waiting, self.rows is None, self.count == 0, length


class Placing(NamedTuple):
    """What a step placed of a drawing."""

    cells: list[int]
    codes: list[int]
    scores: list[float]
    numbers: bool
    """The model's answers were numbers, none of them NaN."""


class Run:
    """Drawings in slots side by side that go through a step as one batch."""

    def __init__(self, courses: Sequence[Course], slots: Slots, decoder: Decoder) -> None:
        self.courses, self.slots, self.decoder = courses, slots, decoder
        self.want, self.settings, self.branches = courses[0].want, courses[0].settings, courses[0].branches
        self.at, device = slice(courses[0].slot, courses[-1].slot + 1), slots.codes_SN.device
        self.count_B1 = torch.tensor([[course.count] for course in courses], device=device)
        if self.want.what == "next":
            self.cells_BR = slots.sequence_SN[self.at].gather(1, self.count_B1 + torch.arange(self.want.size, device=device))
        else:
            self.cells_BR = empty_cells(slots.empty_SN[self.at], slots.empty_SN.shape[1] - courses[0].count)
        self.prefix = self._begun() if courses[0].rows is None else self._continued([course.rows or 0 for course in courses])
        self.candidates: Candidates | None = None
        self.rows_BRD = torch.empty(0)

    @property
    def parallel(self) -> bool:
        """Whether several cells of an order are placed together."""
        return self.want.what == "next" and self.want.size > 1

    def answer(self, rows_GRD: Tensor, candidates: Candidates | None) -> None:
        """Take the trunk's rows about the cells."""
        self.candidates = candidates
        if self.want.what == "rest":
            self.rows_BRD = rows_GRD[:: self.branches]  # late orders know no guidance
        elif self.settings.guided:
            scales = [self.settings.scale(course.count, self.slots.codes_SN.shape[1]) for course in self.courses]
            scale_B1 = torch.tensor(scales, device=rows_GRD.device)[:, None]
            self.rows_BRD = guided_rows(rows_GRD, scales[0] if min(scales) == max(scales) else scale_B1)
        else:
            self.rows_BRD = rows_GRD

    def find_rest(self) -> None:
        """Note down the rest of each late order."""
        for row, course in enumerate(self.courses):
            assert course.late is not None
            image = slice(row, row + 1)
            self.slots.sequence_SN[course.slot, course.count :] = course.late.rest(self.rows_BRD[image], self.cells_BR[image])[0]

    def commit(self, drawn: Drawn) -> None:
        """Take cells and codes into the cache, or let them wait for it."""
        cells_GM, codes_GM = self.both(drawn.cells_BM), self.both(drawn.codes_BM)
        if self.candidates is None:
            self.prefix = self.decoder.place_parallel(self.prefix, cells_GM, codes_GM)
        else:
            self.prefix = self.decoder.commit(self.prefix, self.candidates, self.both(drawn.candidate_BM[:, 0]), codes_GM[:, 0])
            # The rows of the others did not see the cells placed in the same step before them, so they are computed again, if anything is
            # to be asked behind them.
            if any(course.count + self.want.size < self.slots.codes_SN.shape[1] for course in self.courses):
                self.prefix = self.decoder.prefill(self.prefix, cells_GM[:, 1:], codes_GM[:, 1:])

    def advance(self) -> None:
        """The courses as they are after the step."""
        rows, waiting = self.prefix.rows, self.prefix.last.cells_BK.shape[1]
        of_each = [rows] * len(self.courses) if isinstance(rows, int) else rows[:: self.branches].tolist()
        for course, rows_now in zip(self.courses, of_each, strict=True):
            course.rows, course.waiting, course.passes, course.count = rows_now, waiting, course.passes + 1, course.count + self.want.size
            course.late = None if self.want.what == "rest" else course.late

    def both(self, rows: Tensor) -> Tensor:
        """Rows of images, under guidance each of them again for the same image without its caption."""
        return rows if self.branches == 1 else rows.repeat_interleave(self.branches, dim=0)

    def _begun(self) -> Prefix:
        """Images whose condition and known cells enter the cache now."""
        prefix = self.decoder.begin(self._conditions(), cache=self.slots.lanes(self.at, self.branches))
        cells_BK = self.slots.order_SN[self.at, : self.courses[0].count]
        return self.decoder.prefill(prefix, self.both(cells_BK), self.both(self.slots.codes_SN[self.at].gather(1, cells_BK)))

    def _continued(self, rows: list[int]) -> Prefix:
        """Images as the last step left them."""
        model, cache = self.decoder.model, self.slots.lanes(self.at, self.branches)
        if self.courses[0].count == 0:
            last = model.layout.start(self._conditions())
        else:
            waiting = self.courses[0].waiting
            place_BK = self.count_B1 - waiting + torch.arange(waiting, device=cache.device)
            cells_BK = self.slots.order_SN[self.at].gather(1, place_BK)
            codes_BK = self.slots.codes_SN[self.at].gather(1, cells_BK)
            last = Placed(self.both(cells_BK), self.both(model.code_rows(codes_BK).to(cache.dtype)))
        if min(rows) == max(rows):
            return Prefix(cache, rows[0], last, self.slots.tables)
        seen = max(rows) + model.layout.entering(last) + self.cells_BR.shape[1]
        columns = -(-seen // 8) * 8  # what masks of a GPU want
        return Prefix(cache[:, :, :, :, :columns], self.both(torch.tensor(rows, device=cache.device)), last, self.slots.tables)

    def _conditions(self) -> Tensor:
        return torch.cat([course.condition_GTD for course in self.courses])


def advance(model: AnyOrderModel, slots: Slots, courses: Sequence[Course]) -> dict[int, Placing]:
    """One step of drawings that have empty cells: what was placed, by slot."""
    decoder, in_slots = Decoder(model), sorted(courses, key=lambda course: course.slot)
    # Slots side by side differ from their places in the list by the same number.
    alike = groupby(enumerate(in_slots), key=lambda placed: (placed[1].slot - placed[0], placed[1].state))
    runs = [Run([course for _, course in each], slots, decoder) for _, each in alike]
    _ask(decoder, runs)
    by_settings = defaultdict[object, list[Run]](list)
    for run in runs:
        by_settings[run.want, run.settings].append(run)
    drawn = [_draw(model, slots, together) for together in by_settings.values()]
    for together, each in zip(by_settings.values(), drawn, strict=True):
        _commit(together, each)
    placings = dict[int, Placing]()
    for together, each in zip(by_settings.values(), drawn, strict=True):
        placings |= _keep(slots, together, each)
    for run in runs:
        run.advance()
    return placings


def _ask(decoder: Decoder, runs: Sequence[Run]) -> None:
    """One pass for all whose cells are placed together, one for all others."""
    together, others = [run for run in runs if run.parallel], [run for run in runs if not run.parallel]
    if together:
        rows = decoder.parallel_rows_of([run.prefix for run in together], [run.both(run.cells_BR) for run in together])
        for run, rows_GMD in zip(together, rows, strict=True):
            run.answer(rows_GMD, None)
    if others:
        asked = decoder.candidate_rows_of([run.prefix for run in others], [run.both(run.cells_BR) for run in others])
        for run, candidates in zip(others, asked, strict=True):
            run.answer(candidates.rows_BRD, candidates)


def _draw(model: AnyOrderModel, slots: Slots, runs: Sequence[Run]) -> Drawn | None:
    """Cells and codes of drawings that want the same by the same settings; None where that is the rest of a late order."""
    want, settings = runs[0].want, runs[0].settings
    if want.what == "rest":
        for run in runs:
            run.find_rest()
        return None
    slot_B, count_B1 = _slots_of(runs), torch.cat([run.count_B1 for run in runs])
    rng, asked = slots.rng.part(slot_B), [run.cells_BR.shape[1] for run in runs]
    most = max(asked)
    rows_BRD = torch.cat([F.pad(run.rows_BRD, (0, 0, 0, most - count)) for run, count in zip(runs, asked, strict=True)])
    if want.what == "next":
        return draw_next(model.output, rows_BRD, torch.cat([run.cells_BR for run in runs]), settings, rng)
    cells_BR = empty_cells(slots.empty_SN[slot_B], most)
    empty_BR = slots.empty_SN[slot_B].gather(1, cells_BR) if min(asked) < most else None
    blind_B1 = count_B1 == 0 if model.spec.blind_start else None
    return draw_most_confident(model.output, rows_BRD, cells_BR, want.size, settings, rng, count_B1, empty_BR, blind_B1)


def _commit(runs: Sequence[Run], drawn: Drawn | None) -> None:
    """Give each run its part of what was drawn."""
    if drawn is not None:
        images = [len(run.courses) for run in runs]
        for run, *part in zip(runs, *(each_BM.split(images) for each_BM in drawn), strict=True):
            run.commit(Drawn(*part))


def _keep(slots: Slots, runs: Sequence[Run], drawn: Drawn | None) -> dict[int, Placing]:
    """Note down what was drawn."""
    if drawn is None:
        rests = (zip(run.courses, run.rows_BRD.isnan().flatten(1).any(1).tolist(), strict=True) for run in runs)
        return {course.slot: Placing([], [], [], numbers=not no_number) for rest in rests for course, no_number in rest}
    slot_B = _slots_of(runs)
    slots.keep(slot_B[:, None], torch.cat([run.count_B1 for run in runs]), drawn)
    _, cells, codes, scores = (each_BM.tolist() for each_BM in drawn)
    numbers = (~drawn.score_BM.isnan().any(1)).tolist()
    return {slot: Placing(*each) for slot, *each in zip(slot_B.tolist(), cells, codes, scores, numbers, strict=True)}


def _slots_of(runs: Sequence[Run]) -> Tensor:
    return torch.tensor([course.slot for run in runs for course in run.courses], device=runs[0].count_B1.device)
