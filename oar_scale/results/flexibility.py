"""The vocabulary of the flexibility report (``flexibility.json``): arms, measures, figures and differences.

An *arm* is one way to train; its models differ in their seed alone. All figures are of the same images for all models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from oar_scale.results.statistics import Comparison, Figure

FORMAT = 2
"""Of ``flexibility.json``: raised where a measure of the same name is another figure, so that reports of both are not compared."""
Better = Literal["lower", "higher", "zero", ""]
Chapter = Literal["likelihood", "calibration", "samples", "diversity", "edits"]
Role = Literal["primary", "exploratory", "descriptive"]
"""What the differences of a measure are for: the few questions that were asked beforehand, a look at all else, or no test at all."""


@dataclass(frozen=True)
class Measure:
    """What is measured of each image (or as the share that it has in a figure of all images)."""

    name: str
    """Its key in ``arrays/*.npz``: ``nll/random``."""
    title: str
    """For people: "random orders"."""
    unit: str
    better: Better
    chapter: Chapter
    role: Role = "exploratory"
    """Primary differences are corrected for their own number, exploratory ones for the number of those in their chapter."""


@dataclass(frozen=True)
class MeasuredModel:
    """A model of the report."""

    label: str
    """Of its arm."""
    seed: int
    """Its place among the models of its arm, from 0."""
    drawn_from: int | None
    """The seed of its training in its run, by which seeds are paired; None where it is of no run."""
    where: str
    id: str
    arrays: str
    """The file, in the report's folder, with an array [images] for each measure."""


def unpaired_arms(models: Iterable[MeasuredModel], against: str) -> list[str]:
    """The arms of as many seeds as ``against``, and of several, whose seeds are known to be others."""
    seeds = dict[str, list[int | None]]()
    for model in models:
        seeds.setdefault(model.label, []).append(model.drawn_from)
    second = seeds[against]
    known = {label: first for label, first in seeds.items() if None not in (*first, *second)}
    return [label for label, first in known.items() if 1 < len(first) == len(second) and first != second]


@dataclass(frozen=True)
class ArmFigure:
    """A figure of all models of an arm."""

    label: str
    measure: str
    figure: Figure


@dataclass(frozen=True)
class ArmDifference:
    """``first - second`` of a measure, paired by image."""

    first: str
    second: str
    measure: str
    comparison: Comparison
    p_images_holm: float | None = None
    """Corrected (Holm) for all primary differences, or for all exploratory ones of the chapter. None of a descriptive one."""
    p_seeds_holm: float | None = None
    p_holm: float | None = None
    """The one that counts: over images and seeds together, and of one seed each over images alone; corrected likewise."""
    unstable: tuple[str, ...] = ()
    """Which of the two arms vary more from seed to seed than the others: how much this difference varies, the two tell alone."""


@dataclass(frozen=True)
class SweepRow:
    """The distance of an arm's samples with one temperature and guidance, to images that no figure is of."""

    label: str
    temperature: float
    guidance: float
    distance: float
    """The mean over its seeds."""
    error: float
    """Its standard error over images."""
    above: float
    """How much larger it is than that of the chosen setting; 0 of that one itself."""
    above_error: float
    """The standard error of that, paired by image: a choice among distances that are nearer than this is one of chance."""
    chosen: bool
    """Whether it is the arm's best, with which the figures of ``samples/best`` were made."""
    edges: tuple[str, ...] = ()
    """Of the chosen one: the settings whose value is the smallest or the largest that was tried."""


@dataclass(frozen=True)
class FlexibilityResults:
    """All numbers of a report."""

    run: str
    """The run whose images these are."""
    split: str
    images: int
    against: str
    """The arm that the others are compared with."""
    models: tuple[MeasuredModel, ...]
    measures: tuple[Measure, ...]
    figures: tuple[ArmFigure, ...]
    differences: tuple[ArmDifference, ...]
    sampling: str
    """How samples and edits are drawn where nothing else is said."""
    features: str
    """The network whose features are compared."""
    sweep: tuple[SweepRow, ...] = ()
    sweep_images: str = ""
    """Which ones settings were chosen on."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""
