"""What a report can say: plain numbers, texts and pictures, gathered by whoever ran the stages.

Every section of :class:`ReportData` may be None: a run that has not come that far still has a report, which names what
is missing. Pictures are uint8 ``[H, W, 3]`` arrays. NLL is in nats per code, averaged over the cells of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from oar_scale.observe.events import read_events

Picture = NDArray[np.uint8]
ModelName = Literal["base", "any-order", "control", "ordered"]
"""``base``: before pretraining; ``any-order``: after it; ``control`` and ``ordered``: fine-tuned on random and on extracted orders."""
OrderName = Literal["random", "raster", "own confidence"]


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class RunFacts:
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
    """A few words on the outcome, e.g. "14 shards" or "2 attempts, went on from step 50"."""


@dataclass(frozen=True)
class DataFacts:
    source: str
    train_images: int
    heldout_images: int
    image_size: int
    split: str
    """How images were held out, in words."""
    attribution: str
    """Who made the pictures and under which licence, as the licence wants it said."""
    bad_samples: int = 0
    bad_examples: tuple[str, ...] = ()
    """A few of them: "name: reason"."""


@dataclass(frozen=True)
class TokenizerFacts:
    """The image and text tokenizers, measured on held-out images."""

    origin: str
    """E.g. "weights shipped with the recipe" or "trained in this run"."""
    grid: int
    codebook_size: int
    codebook_use: float
    """Share of the codebook that occurs in the training images, 0 to 1."""
    psnr_db: float
    prompts: str
    """What the models are told, in words."""
    originals: tuple[Picture, ...] = ()
    reconstructions: tuple[Picture, ...] = ()
    reconstruction_fd_efflite0: float | None = None
    """Frechet distance of all held-out images to their reconstructions; None where it was not measured."""


@dataclass(frozen=True)
class ModelFacts:
    parameters: int
    layers: int
    dim: int
    heads: int
    origin: str
    """Where the weights before pretraining come from; "random initialisation" for a run from scratch."""


@dataclass(frozen=True)
class Series:
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
class PretrainEffect:
    """Held-out NLL in random orders around the pretraining stage, over the same images and orders."""

    images: int
    before: Estimate
    after: Estimate
    difference: Estimate
    """after - before, paired by image."""


@dataclass(frozen=True)
class NllEntry:
    model: ModelName
    order: OrderName
    nll: Estimate


@dataclass(frozen=True)
class NllDifference:
    """``first - second``, paired by image: negative where ``first`` is better."""

    first: ModelName
    second: ModelName
    order: OrderName
    difference: Estimate


@dataclass(frozen=True)
class NllTable:
    images: int
    entries: tuple[NllEntry, ...]
    differences: tuple[NllDifference, ...] = ()
    """At least ordered - control and ordered - any-order, each in the models' own confidence orders."""


@dataclass(frozen=True)
class CaptionDependence:
    """NLL with the right captions and with captions of other images, in random orders."""

    model: ModelName
    images: int
    own: Estimate
    shuffled: Estimate
    difference: Estimate
    """shuffled - own, paired by image: positive where the model uses its captions."""


@dataclass(frozen=True)
class DistanceRow:
    """Distance of a set of images to as many held-out ones."""

    name: str
    """A model, or a reference such as "reconstructions"."""
    samples: int
    kid_efflite0: float
    kid_efflite0_std: float
    fd_efflite0: float


@dataclass(frozen=True)
class SampleRow:
    caption: str
    original: Picture
    samples: tuple[Picture, ...]
    """One for each column of the grid."""


@dataclass(frozen=True)
class SampleGrid:
    columns: tuple[str, ...]
    """Names of the models, e.g. ("any-order", "control", "ordered")."""
    settings: str
    """E.g. "guidance 2, temperature 1, own confidence order"."""
    rows: tuple[SampleRow, ...]


@dataclass(frozen=True)
class EditExample:
    """Known cells first, unknown cells after."""

    kind: Literal["inpainting", "outpainting"]
    caption: str
    model: ModelName
    original: Picture
    known: NDArray[np.bool_]
    """[G, G], True where the code was given."""
    completions: tuple[Picture, ...]


@dataclass(frozen=True)
class OrderExample:
    caption: str
    image: Picture
    step_of_cell: NDArray[np.int64]
    """[G, G]: when the cell was placed, 0 first."""


@dataclass(frozen=True)
class OrderFacts:
    """The orders extracted for the training images."""

    score: str
    images: int
    distinct: int
    """Number of different orders among them."""
    mean_step_of_cell: NDArray[np.float64]
    """[G, G]: mean over the images of when the cell was placed, 0 first."""
    kendall_to_raster: float
    """Share of the pairs of cells that raster order would have placed the other way round: 0 raster, 0.5 random, 1 reversed."""
    neighbour_share: float
    """Share of the steps that go to one of the four neighbours of the cell placed just before."""
    seconds: float
    """Time of the extraction; 0 where it is not known."""
    examples: tuple[OrderExample, ...] = ()
    brute_force: str = ""
    """Outcome of the comparison with brute force, in words; empty when it was not made."""


@dataclass(frozen=True)
class ReportData:
    run: RunFacts
    recipe_yaml: str
    """The resolved recipe."""
    stages: tuple[StageRow, ...] = ()
    data: DataFacts | None = None
    tokenizer: TokenizerFacts | None = None
    model: ModelFacts | None = None
    curves: tuple[TrainingCurve, ...] = ()
    pretrain: PretrainEffect | None = None
    nll: NllTable | None = None
    nll_new: NllTable | None = None
    """As ``nll``, over the held-out images without a variant in training."""
    captions: tuple[CaptionDependence, ...] = ()
    distances: tuple[DistanceRow, ...] = ()
    samples: SampleGrid | None = None
    edits: tuple[EditExample, ...] = ()
    orders: OrderFacts | None = None
    notes: tuple[str, ...] = ()
    """Limits and oddities a reader must know."""


def estimate(values: NDArray[np.floating] | list[float]) -> Estimate:
    """Mean and standard error of one value an image.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a standard error needs at least 2 images, got {len(values)}")
    array = np.asarray(values, dtype=np.float64)
    return Estimate(float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array))))


def training_curve(events_folder: str, stage: str, title: str) -> TrainingCurve | None:
    """The curves of a stage from its event files (``train`` or ``vq``, and ``heldout``); None when it logged no loss."""
    events = read_events(events_folder, stage)

    def series(kinds: tuple[str, ...], name: str) -> Series:
        points = [(int(e["step"]), float(e[name])) for e in events if e["kind"] in kinds and e.get(name) is not None]
        return Series(tuple(step for step, _ in points), tuple(value for _, value in points))

    loss, heldout = series(("train", "vq"), "loss"), series(("heldout",), "nll_random")
    return TrainingCurve(title, loss, heldout=heldout if heldout.steps else None) if loss.steps else None
