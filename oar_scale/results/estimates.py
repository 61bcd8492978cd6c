"""The vocabulary of figures: estimates with their errors, likelihoods by model and order, distances between sets of images.

Sciences compute these values and reports show them; neither imports the other. NLL is in nats per code, averaged over the cells of
an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oar_scale.registry import ModelName
from oar_scale.results.statistics import clustered_error

OrderName = Literal["random", "raster", "own max_prob", "own gt_logprob"]
"""``own max_prob``: each model's own orders, chosen as in generation by the codes placed before alone: the generator's likelihood.

``own gt_logprob``: its own orders, chosen by the image's codes. That a cell is chosen tells of its code, so codes leak into the order, up
to ln(N!) / N nats each: a diagnosis of the selection, not a likelihood.
"""


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error, for which images of one family count as one (:func:`estimate`)."""

    mean: float
    standard_error: float


def estimate(values: NDArray[np.floating] | list[float], families_S: ArrayLike | None = None) -> Estimate:
    """Mean and standard error of one value an image.

    Args:
        families_S: the same number for images that are not independent (the same thing in other styles or colours): the error is that of
            the mean over families. None: all are independent. So are those of a single family taken, for nothing tells of others.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a standard error needs at least 2 images, got {len(values)}")
    array = np.asarray(values, dtype=np.float64)
    if families_S is not None and 1 < len(np.unique(families_S)) < len(array):
        error = clustered_error(array, families_S)
        assert error is not None
        return Estimate(float(array.mean()), error)
    return Estimate(float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array))))


@dataclass(frozen=True)
class PretrainEffect:
    """Held-out NLL in random orders around the pretraining stage, over the same images and orders."""

    images: int
    before: Estimate
    after: Estimate
    difference: Estimate
    """after - before, paired by image."""


@dataclass(frozen=True)
class LeakEffect:
    """NLL of the hidden codes of edits where the codes around the hole have seen it (leaky), and where nothing has (honest)."""

    kind: Literal["inpainting", "outpainting"]
    model: ModelName
    images: int
    leaky: Estimate
    honest: Estimate
    difference: Estimate
    """honest - leaky, paired by image."""


@dataclass(frozen=True)
class NllEntry:
    """The NLL of one model under one kind of orders."""

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
    """The NLL of models under several kinds of orders, over the same images."""

    images: int
    entries: tuple[NllEntry, ...]
    differences: tuple[NllDifference, ...] = ()
    """At least ordered - control and ordered - any-order, each along the models' own ``max_prob`` orders."""
    families: int | None = None
    """So many groups of the images are independent of each other. None: of an evaluation that took every image to be."""


@dataclass(frozen=True)
class Calibration:
    """Does a model know how sure it can be? Along its own ``max_prob`` orders, over the cells of all images."""

    model: ModelName
    images: int
    gap: Estimate
    """NLL minus the entropy of the predictions, nats per code: 0 is calibrated, above 0 over-confident."""
    top_probability: Estimate
    """Of the most likely code; equal to ``top_accuracy`` if calibrated."""
    top_accuracy: Estimate
    """Share of the cells whose most likely code is the image's own."""


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
    """The label of a model, e.g. "any-order", or a reference such as "training images"."""
    samples: int
    kid: float
    kid_std: float
    """Between random subsets."""
    fd: float
    """Frechet distance."""
    features: str = "efflite0"
    """What both are measured on: they are called ``kid_FEATURES`` and ``fd_FEATURES``."""


@dataclass(frozen=True)
class DistanceDifference:
    """``first - second`` of two models' distances to the same held-out images, paired by caption: negative where ``first`` is closer."""

    first: ModelName
    second: ModelName
    samples: int
    kid: Estimate
    """Standard error by the jackknife: two samples for a caption and its held-out image are left out together."""
    features: str = "efflite0"
    """What it is measured on: it is called ``kid_FEATURES``."""


GroupName = Literal["novel", "near-duplicate"]


@dataclass(frozen=True)
class ImageGroup:
    """The figures over some of the held-out images only."""

    name: GroupName
    """``near-duplicate``: training has a variant of the image, e.g. the same drawing in another skin tone. ``novel``: all others."""
    nll: NllTable
    pretrain: PretrainEffect | None = None
    calibration: tuple[Calibration, ...] = ()
    captions: tuple[CaptionDependence, ...] = ()
    distances: tuple[DistanceRow, ...] = ()
    """Of this group's samples to this group's images; empty where the group is too small."""
    distance_differences: tuple[DistanceDifference, ...] = ()
