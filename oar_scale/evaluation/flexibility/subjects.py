"""What a flexibility report measures: the models of arms, on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oar_scale.evaluation.eval_tasks import Ints
from oar_scale.evaluation.flexibility.pieces import Arrays, NetworkFile, Piece, floats, in_parts

PART_IMAGES = 64
"""Images of a piece."""


@dataclass(frozen=True)
class ArmModel:
    """A model of an arm."""

    label: str
    seed: int
    """Its place among the models of its arm, from 0."""
    file: NetworkFile
    cond_inputs_S: NDArray[np.generic]
    """What it is conditioned on for each image, as ``model.condition`` takes it."""
    drawn_from: int | None = None
    """The seed of its training in its run; None where it is of no run."""


@dataclass(frozen=True)
class Arm:
    """Models that were trained alike; they differ in their seed."""

    label: str
    models: tuple[ArmModel, ...]


@dataclass(frozen=True)
class MeasuredImages:
    """Held-out images."""

    codes_SN: Ints
    """Raster order."""
    pictures: NDArray[np.uint8]
    """[S, H, W, 3]."""
    families_S: NDArray[np.int64]
    """The same number for images of one family; one without a family is its own."""
    vq: NetworkFile
    grid: int

    @property
    def parts(self) -> list[slice]:
        """The images of one piece after the other."""
        count = len(self.codes_SN)
        return [slice(start, min(start + PART_IMAGES, count)) for start in range(0, count, PART_IMAGES)]


@dataclass(frozen=True)
class Source:
    """Where the values of one measure of one model are: an array of some pieces."""

    measure: str
    label: str
    seed: int
    pieces: tuple[Piece, ...]
    array: str

    @property
    def needed(self) -> tuple[Piece, ...]:
        """All pieces that the values rest on."""
        return self.pieces

    def values(self, results: Mapping[str, Arrays]) -> NDArray[np.float64]:
        """One value for each image, [S]."""
        return floats(in_parts(results, self.pieces)[self.array])


def by_measure(sources: Sequence[Source], results: Mapping[str, Arrays]) -> dict[str, dict[str, list[NDArray[np.float64]]]]:
    """Values by measure and arm, of each of its models: what ``comparison`` takes."""
    values: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    for source in sorted(sources, key=lambda source: source.seed):
        values.setdefault(source.measure, {}).setdefault(source.label, []).append(source.values(results))
    return values
