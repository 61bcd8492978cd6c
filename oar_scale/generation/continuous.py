"""Continuous batching: drawings of different kinds join a running batch at any step and leave it when they are done.

    batch = ContinuousBatch(model, slots=8)
    for number, condition_TD in enumerate(condition_BTD):
        batch.add(Drawing(condition_TD=condition_TD, settings=settings, seed=0, number=number))
    while batch.busy:
        for progress in batch.step():          one step of every drawing: the cells that it placed, with their codes
            ...                                others may be added here, or removed

A drawing's codes and order are those of :func:`oar_scale.generation.sampling.generate` for the same seed, number and settings, whatever
else is in the batch (up to the rounding of logits).

A step asks the model once for every drawing: nobody waits for others to finish or to catch up, and the condition and the known cells of a
newcomer enter in its first step. The drawings may be at different lengths, and ask about one cell, about several or about all that are
empty; how their rows go through the model together is in ``slots.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, count

import torch
from torch import Tensor

from oar_scale.generation.known_cells import Known, known_counts, sequence
from oar_scale.generation.sampling import Generated, check_eval
from oar_scale.generation.settings import SampleSettings
from oar_scale.generation.slots import Course, Placing, Slots, advance
from oar_scale.model import AnyOrderModel
from oar_scale.model.row_layout import Placed, Tables
from oar_scale.model.window import check_drafts
from oar_scale.orders.policies import LateOrder
from oar_scale.orders.selection import no_numbers
from oar_scale.orders.step_sizes import cells_per_step


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One image that is to be drawn; the fields are those of one image of :func:`oar_scale.generation.sampling.generate`."""

    condition_TD: Tensor
    """A row of what ``model.condition`` returned."""
    settings: SampleSettings
    """``draft`` is not used: it changes no image, and many drawings keep the machine busy without."""
    seed: int
    number: int = 0
    """With the seed, of all noise of the image."""
    order: Tensor | LateOrder | None = None
    """A permutation of the cells [N], or a late order of one image; None: the model chooses."""
    known: tuple[Tensor, Tensor] | None = None
    """Cells and codes, int64 [K] each, that are there before the first step, in the order the model is shown them."""


@dataclass(frozen=True)
class Progress:
    """What one step did for one drawing."""

    id: int
    cells: list[int]
    """The cells that were placed; none in a step that only asked for a late order, or where all were known."""
    codes: list[int]
    scores: list[float]
    """As ``Generated.score_BN``."""
    done: Generated | None = None
    """The image, as a batch of one, with the step that finishes it. Its slot is free."""
    failed: ArithmeticError | None = None
    """The model's scores were not numbers. The drawing has left, the others go on."""


class ContinuousBatch:
    """Drawings in at most so many slots. One thread calls all methods.

    A step that raises leaves all drawings as they were.
    """

    def __init__(self, model: AnyOrderModel, slots: int) -> None:
        """
        Raises:
            ValueError: no slot, or a model in training mode.
        """
        check_eval(model)
        if slots < 1:
            raise ValueError(f"slots {slots} must be a whole number from 1")
        self.model, self.slots = model, slots
        self._slots, self._courses, self._ids = Slots.of(model, slots), dict[int, Course](), count()

    @property
    def memory_bytes(self) -> int:
        """Bytes of the cache: allotted once, for images with and without guidance in all slots. A step's own rows come on top."""
        return self._slots.cache.nbytes

    @property
    def free(self) -> int:
        """Slots for drawings that may be added."""
        return self.slots - len(self._courses)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._courses)

    @torch.no_grad()
    def add(self, drawing: Drawing) -> int:
        """Take a drawing in. It begins with the next step.

        Returns:
            Its id, which no other drawing of this batch has had.

        Raises:
            RuntimeError: no slot is free.
            ValueError: what :func:`generate` refuses, and a condition or a late order of another shape.
        """
        if not self.free:
            raise RuntimeError(f"all {self.slots} slots are taken: a drawing can be added when one is done or removed")
        slot = min(set(range(self.slots)) - {course.slot for course in self._courses.values()})
        course = _course(self.model, self._slots, slot, drawing)
        id = next(self._ids)
        self._courses[id] = course
        return id

    def remove(self, id: int) -> None:
        """Drop a drawing; its slot is free.

        Raises:
            KeyError: there is none of this id (any more).
        """
        del self._courses[id]

    @torch.no_grad()
    def step(self) -> list[Progress]:
        """One step of every drawing, in the order in which they were added."""
        unfinished = [course for course in self._courses.values() if course.count < self.model.spec.cells]
        placings = advance(self.model, self._slots, unfinished)
        nothing = Placing([], [], [], numbers=True)
        return [self._progress(id, placings.get(course.slot, nothing)) for id, course in list(self._courses.items())]

    def _progress(self, id: int, placing: Placing) -> Progress:
        course, image, failed = self._courses[id], None, None
        if not placing.numbers:
            failed = no_numbers()
        elif course.count == self.model.spec.cells:
            image = self._slots.image(course.slot, course.passes)
        if failed or image:
            self.remove(id)
        return Progress(id, placing.cells, placing.codes, placing.scores, image, failed)


def _course(model: AnyOrderModel, slots: Slots, slot: int, drawing: Drawing) -> Course:
    """Begin a drawing in a slot. Raises ValueError as :meth:`ContinuousBatch.add`."""
    check_eval(model)
    spec, settings, order, device = model.spec, drawing.settings, drawing.order, slots.cache.device
    shape = (spec.condition.rows, spec.dim)
    if drawing.condition_TD.shape != shape:
        raise ValueError(f"condition_TD {list(drawing.condition_TD.shape)} must be {list(shape)}: a row of what model.condition returns")
    nothing = torch.empty(0, dtype=torch.long)
    known = Known(*(each.to(device)[None] for each in drawing.known or (nothing, nothing)))
    order_1N = order.to(device)[None] if isinstance(order, Tensor) else None
    counts_1 = known_counts(model, 1, order_1N, known)
    placed = int(counts_1[0])
    cells_K, codes_K = (each_1K[0, :placed] for each_1K in known)
    condition_GTD = drawing.condition_TD.to(slots.cache)[None]
    sequence_1K: Tensor | None
    if isinstance(order, LateOrder):
        sequence_1K = _first_cells(order, spec.cells).to(device) if placed == 0 else cells_K[None]
    else:
        sequence_1K = None if order_1N is None else sequence(order_1N, known, counts_1)
    _check_layout(model, slots.tables, drawing, cells_K if sequence_1K is None else sequence_1K[0], spec.cells - placed)
    slots.begin(slot, cells_K, codes_K, drawing.seed, drawing.number)
    if sequence_1K is not None:
        slots.sequence_SN[slot, : sequence_1K.shape[1]] = sequence_1K[0]
    if settings.guided:
        condition_GTD = torch.cat([condition_GTD, model.null_condition(1).to(condition_GTD)])
    late, first = (order, sequence_1K.shape[1]) if isinstance(order, LateOrder) and sequence_1K is not None else (None, 0)
    stops = list(accumulate(cells_per_step(spec.cells, settings.steps), initial=0))
    return Course(slot, settings, condition_GTD, stops, sequence_1K is not None, late, placed, first)


def _first_cells(order: LateOrder, cells: int) -> Tensor:
    """The first cells [1, K] of a late order of one image."""
    first_1K = order.first_BK
    if first_1K.ndim != 2 or len(first_1K) != 1 or len(set(first_1K[0].tolist()) & set(range(cells))) != first_1K.shape[1]:
        raise ValueError(f"a late order's first cells {first_1K.tolist()} must be one row of different cells of 0..{cells - 1}")
    return first_1K


def _check_layout(model: AnyOrderModel, tables: Tables, drawing: Drawing, given_K: Tensor, left: int) -> None:
    """Raises ValueError for what the layout cannot do: it is asked for such rows, on the CPU.

    Args:
        given_K: the cells whose order is given, known ones first.
        left: cells that are not known.
    """
    layout, cells, settings = model.layout, model.spec.cells, drawing.settings
    if settings.draft and drawing.order is not None:
        check_drafts(model)
    last = layout.start(drawing.condition_TD[None].cpu())
    if drawing.order is not None and layout.asks_jointly and max(cells_per_step(cells, settings.steps, cells - left), default=0) > 1:
        layout.parallel(last, torch.arange(2)[None], tuple(table.cpu() for table in tables))
    if model.spec.layout == "raster":
        given_1K = given_K.cpu()[None]
        if len(given_K):
            layout(last, given_1K, last.codes_BKD.expand(-1, len(given_K), -1))
            last = Placed(given_1K[:, -1:], last.codes_BKD)
        if len(given_K) < cells:
            layout.candidates(last, torch.arange(len(given_K), cells)[None], ())
