"""Many pictures for many prompts, drawn in batches: which are wanted, what their files are called, and each with its record.

    prompt 12, drawings 0 and 3   ->   000012-a-red-apple.png   000012_3-a-red-apple.png

A picture depends on its prompt, the seed and its number alone, the number being that of the prompt and of the drawing. So the first drawing
of a prompt stays the same however many are wanted, and whatever prompts are added.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oar_scale.data.prompt_files import GivenPrompt
from oar_scale.errors import UserError
from oar_scale.generation.continuous import ContinuousBatch, Drawing
from oar_scale.generation.editing import VARIATION_SHIFT
from oar_scale.generation.picture_files import DrawingRecord
from oar_scale.generation.pretrained import Pretrained
from oar_scale.tokenizers.prompts import Prompt

_SLUG = 40
_CHECKED = 1024


@dataclass(frozen=True)
class WantedPicture:
    """One drawing of one prompt."""

    prompt: Prompt
    number: int
    """Of the prompt."""
    variation: int
    """Which drawing of the prompt it is, from 0."""
    seed: int

    @property
    def noise(self) -> int:
        """The picture's number, on which its noise depends."""
        return self.number + (self.variation << VARIATION_SHIFT)

    @property
    def key(self) -> str:
        """Names the picture among all of its folder."""
        return f"{self.number:06d}" + (f"_{self.variation}" if self.variation else "")

    @property
    def file(self) -> str:
        """The name of its file: key and prompt, in letters that every file system has."""
        letters = unicodedata.normalize("NFKD", str(self.prompt)).encode("ascii", "ignore").decode() if isinstance(self.prompt, str) else ""
        slug = re.sub("[^a-z0-9]+", "-", letters.lower())[:_SLUG].strip("-")
        return f"{self.key}-{slug}.png" if slug else f"{self.key}.png"


class DrawnPicture(NamedTuple):
    """A picture and how it was drawn."""

    wanted: WantedPicture
    picture: Image.Image
    record: DrawingRecord
    order_N: Tensor
    """int64: the cells as they were placed."""


def wanted_pictures(given: Iterable[GivenPrompt], count: int) -> list[WantedPicture]:
    """``count`` drawings of each prompt."""
    return [WantedPicture(each.prompt, each.number, variation, each.seed) for each in given for variation in range(count)]


def check_given(drawer: Pretrained, given: Sequence[GivenPrompt]) -> None:
    """Raise UserError that names the first prompt which the model cannot take, and where it is."""
    for start in range(0, len(given), _CHECKED):
        few = given[start : start + _CHECKED]
        if (problem := prompt_problem(drawer, few)) is None:
            continue
        each, problem = next((each, found) for each in few if (found := prompt_problem(drawer, [each])) is not None)
        raise UserError(f"{each.where}: {problem}") from problem


def prompt_problem(drawer: Pretrained, given: Sequence[GivenPrompt]) -> UserError | None:
    """Why the model cannot take these prompts; None where it can."""
    try:
        drawer.encode([each.prompt for each in given])
    except UserError as error:
        return error
    return None


def record_of(drawer: Pretrained, wanted: WantedPicture, order: str | None) -> DrawingRecord:
    """What the file of a picture says, before or after it is drawn."""
    return drawer.record(wanted.prompt, wanted.noise, drawer.settings(), seed=wanted.seed, order=order)


def draw_wanted(drawer: Pretrained, wanted: Sequence[WantedPicture], batch: int, order: str | None = None) -> Iterator[DrawnPicture]:
    """Draw pictures, at most ``batch`` at once, in any order.

    Raises:
        UserError: prompts or settings that the model cannot take; a GPU without the memory for a batch.
        ArithmeticError: the model's scores are not numbers.
    """
    try:
        if len({each.seed for each in wanted}) > 1:
            yield from _draw_running(drawer, wanted, batch, order)
            return
        for start in range(0, len(wanted), batch):
            yield from _draw_batch(drawer, wanted[start : start + batch], order)
    except ValueError as error:
        raise UserError(f"{drawer.where}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU has no memory for {batch} pictures at once, or others use it: take a smaller --batch") from error


def _draw_batch(drawer: Pretrained, wanted: Sequence[WantedPicture], order: str | None) -> list[DrawnPicture]:
    """Pictures of one seed: they begin and end together."""
    numbers = [each.noise for each in wanted]
    drawn = drawer.draw([each.prompt for each in wanted], seed=wanted[0].seed, images=numbers, order=order)
    parts = zip(wanted, drawer.decode(drawn.codes_BN), drawn.order_BN.cpu(), strict=True)
    return [DrawnPicture(each, picture, record_of(drawer, each, order), order_N) for each, picture, order_N in parts]


def _draw_running(drawer: Pretrained, wanted: Sequence[WantedPicture], slots: int, order: str | None) -> Iterator[DrawnPicture]:
    """Pictures with seeds of their own: each joins when another one is done."""
    todo, drawings, running = deque(wanted), ContinuousBatch(drawer.model, min(slots, len(wanted))), dict[int, WantedPicture]()
    while todo or drawings.busy:
        while todo and drawings.free:
            each = todo.popleft()
            running[drawings.add(_drawing(drawer, each, order))] = each
        for progress in drawings.step():
            if progress.failed is not None:
                raise progress.failed
            if progress.done is not None:
                each = running.pop(progress.id)
                [picture] = drawer.decode(progress.done.codes_BN)
                yield DrawnPicture(each, picture, record_of(drawer, each, order), progress.done.order_BN[0].cpu())


def _drawing(drawer: Pretrained, wanted: WantedPicture, order: str | None) -> Drawing:
    settings = drawer.settings()
    own = drawer.orders(order, np.array([wanted.noise]), wanted.seed, settings.steps)
    return Drawing(
        condition_TD=drawer.condition(drawer.encode([wanted.prompt]))[0],
        settings=settings,
        seed=wanted.seed,
        number=wanted.noise,
        order=own[0] if isinstance(own, Tensor) else own,
    )
