"""Continuous batching: drawings of different kinds join a running batch at any step and leave it when they are done.

    batch = ContinuousBatch(model, slots=8)
    cat, dog = (batch.add(Drawing(condition_TD, settings, seed=0, number=number)) for number, condition_TD in enumerate(conditions))
    while batch.busy:
        for progress in batch.step():          one step of every drawing: the cells that it placed, with their codes
            ...                                more drawings may be added here, others removed

A drawing's codes and order are those of :func:`oar_scale.generation.sampling.generate` for the same seed, number and settings, whatever
else is in the batch (up to the rounding of logits).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import numpy as np
from torch import Tensor

from oar_scale.generation.sampling import Generated, Known, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel
from oar_scale.orders.policies import LateOrder
from oar_scale.orders.step_sizes import cells_per_step


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One image that is to be drawn; the fields are those of one image of :func:`oar_scale.generation.sampling.generate`."""

    condition_TD: Tensor
    """A row of what ``model.condition`` returned."""
    settings: SampleSettings
    """``draft`` is of no use here: it changes no image, and passes of many drawings leave no machine idle."""
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
    """The model's logits were not numbers. The drawing has left, the others go on."""


class ContinuousBatch:
    """Drawings in at most so many slots. Not thread-safe: one thread calls all methods."""

    def __init__(self, model: AnyOrderModel, slots: int) -> None:
        """
        Raises:
            ValueError: no slot, or a model in training mode.
        """
        if slots < 1:
            raise ValueError(f"slots {slots} must be a whole number from 1")
        self.model, self.slots = model, slots
        self._ids, self._drawn = count(), dict[int, tuple[Generated, list[int]]]()

    @property
    def free(self) -> int:
        """Slots for drawings that may be added."""
        return self.slots - len(self._drawn)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._drawn)

    def add(self, drawing: Drawing) -> int:
        """Take a drawing in. It begins with the next step.

        Returns:
            Its id, which no other drawing of this batch has had.

        Raises:
            RuntimeError: no slot is free.
            ValueError: what :func:`generate` refuses.
        """
        if not self.free:
            raise RuntimeError(f"all {self.slots} slots are taken: a drawing can be added when one is done or removed")
        order, known = drawing.order, drawing.known
        drawn = generate(
            self.model,
            drawing.condition_TD[None],
            drawing.settings,
            drawing.seed,
            order[None] if isinstance(order, Tensor) else order,
            None if known is None else Known(known[0][None], known[1][None]),
            np.array([drawing.number]),
        )
        number, cells = next(self._ids), self.model.spec.cells
        known_cells = 0 if known is None else len(known[0])
        self._drawn[number] = drawn, [known_cells, *cells_per_step(cells, drawing.settings.steps, known_cells)]
        return number

    def remove(self, id: int) -> None:
        """Drop a drawing; its slot is free.

        Raises:
            KeyError: there is none of this id (any more).
        """
        del self._drawn[id]

    def step(self) -> list[Progress]:
        """One pass for each drawing: all place their next cells."""
        progress = []
        for id, (drawn, (placed, *sizes)) in list(self._drawn.items()):
            part = slice(placed, placed + (sizes[0] if sizes else 0))
            cells_M = drawn.order_BN[0, part]
            done = drawn if len(sizes) <= 1 else None
            progress.append(Progress(id, cells_M.tolist(), drawn.codes_BN[0, cells_M].tolist(), drawn.score_BN[0, part].tolist(), done))
            if done is not None:
                del self._drawn[id]
            else:
                self._drawn[id] = drawn, [part.stop, *sizes[1:]]
        return progress
