"""What a flexibility report measures: the models of arms, on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oar_scale.evaluation.eval_tasks import Ints
from oar_scale.evaluation.flexibility.pieces import Arrays, NetworkFile, Piece, floats, in_parts, piece_id

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


def values_of(sources: Sequence[Source], results: Mapping[str, Arrays]) -> list[NDArray[np.float64]]:
    """The values [S] of each source. Results that several of a kind rest on are read once; no more are held than one source needs."""
    needed = [(type(source).__name__, *map(piece_id, source.needed)) for source in sources]
    values, held = dict[int, NDArray[np.float64]](), dict[str, Arrays]()
    for at in sorted(range(len(sources)), key=needed.__getitem__):
        held = {key: held[key] if key in held else results[key] for key in needed[at][1:]}
        values[at] = sources[at].values(held)
    return [values[at] for at in range(len(sources))]


def by_measure(sources: Sequence[Source], values: Sequence[NDArray[np.float64]]) -> dict[str, dict[str, list[NDArray[np.float64]]]]:
    """Values of sources by measure and arm, of each of its models: what ``comparison`` takes."""
    ordered: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    for source, values_S in sorted(zip(sources, values, strict=True), key=lambda each: each[0].seed):
        ordered.setdefault(source.measure, {}).setdefault(source.label, []).append(values_S)
    return ordered
