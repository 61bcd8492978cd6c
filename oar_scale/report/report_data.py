"""The data of a report: plain numbers, texts and pictures, gathered from the stages.

Every section of :class:`ReportData` may be None: a run that has not come that far still has a report, which names what
is missing. Pictures are uint8 ``[H, W, 3]`` arrays. NLL is in nats per code, averaged over the cells of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from oar_scale.observe.events import read_events
from oar_scale.results.estimates import (
    Calibration,
    CaptionDependence,
    DistanceDifference,
    DistanceRow,
    ImageGroup,
    LeakEffect,
    NllTable,
    PretrainEffect,
)
from oar_scale.results.examples import DrawingExample, EditExample, EditGallery, OrderSummary, SampleGrid, TokenizerMetadata


@dataclass(frozen=True)
class RunMetadata:
    """The head of the report."""

    recipe_name: str
    seed: int
    started: datetime
    duration_s: float
    """All stages together; stages taken over from an earlier call count with the time they took then."""
    machine: str
    """E.g. "2 CPU cores, 8 GB memory, no GPU"."""
    software: str
    """E.g. "oar_scale 0.1.0, torch 2.15.0, Python 3.11.7"."""
    command: str
    """What to type to do it again."""


@dataclass(frozen=True)
class StageRow:
    """One stage of the pipeline."""

    name: str
    what: str
    seconds: float
    detail: str = ""
    """A short text on the outcome, e.g. "14 shards" or "2 attempts, resumed from step 50"."""


@dataclass(frozen=True)
class DataMetadata:
    """The images of a run."""

    source: str
    train_images: int
    heldout_images: int
    image_size: int
    split: str
    """How images were held out, as text."""
    attribution: str
    """Who made the pictures and under which licence, as the licence requires."""
    bad_samples: int = 0
    bad_examples: tuple[str, ...] = ()
    """A few of them: "name: reason"."""


@dataclass(frozen=True)
class ModelMetadata:
    """The size of the models, and what they started from."""

    parameters: int
    layers: int
    dim: int
    heads: int
    origin: str
    """Where the weights before pretraining come from; "random initialisation" for a run from scratch."""


@dataclass(frozen=True)
class Series:
    """A curve: a value at each of some steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class TrainingCurve:
    """Curves of one training stage."""

    title: str
    loss: Series
    loss_name: str = "training loss"
    heldout: Series | None = None
    """NLL of held-out images in random orders, nats per code."""


@dataclass(frozen=True)
class ReportData:
    """Everything that the report of a run shows."""

    run: RunMetadata
    recipe_yaml: str
    """The resolved recipe."""
    stages: tuple[StageRow, ...] = ()
    data: DataMetadata | None = None
    tokenizer: TokenizerMetadata | None = None
    model: ModelMetadata | None = None
    curves: tuple[TrainingCurve, ...] = ()
    pretrain: PretrainEffect | None = None
    nll: NllTable | None = None
    calibration: tuple[Calibration, ...] = ()
    captions: tuple[CaptionDependence, ...] = ()
    distances: tuple[DistanceRow, ...] = ()
    distance_differences: tuple[DistanceDifference, ...] = ()
    groups: tuple[ImageGroup, ...] = ()
    """The figures over novel and over near-duplicate held-out images apart; empty where all are novel."""
    samples: SampleGrid | None = None
    drawing: DrawingExample | None = None
    edits: tuple[EditExample, ...] = ()
    gallery: EditGallery | None = None
    leaks: tuple[LeakEffect, ...] = ()
    orders: OrderSummary | None = None
    trained_on: str = "the extracted orders"
    """What the ordered model was fine-tuned on."""
    notes: tuple[str, ...] = ()
    """Limits and oddities a reader must know."""


def training_curve(events_folder: str, stage: str, title: str) -> TrainingCurve | None:
    """The curves of a stage from its event files (``train`` or ``vq``, and ``heldout``); None when it logged no loss."""
    events = read_events(events_folder, stage)

    def series(kinds: tuple[str, ...], name: str) -> Series:
        points = [(int(e["step"]), float(e[name])) for e in events if e["kind"] in kinds and e.get(name) is not None]
        return Series(tuple(step for step, _ in points), tuple(value for _, value in points))

    loss, heldout = series(("train", "vq"), "loss"), series(("heldout",), "nll_random")
    return TrainingCurve(title, loss, heldout=heldout if heldout.steps else None) if loss.steps else None
