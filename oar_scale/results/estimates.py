"""The vocabulary of figures: estimates with their errors, likelihoods by model and order, distances between sets of images.

Sciences compute these values and reports show them; neither imports the other. NLL is in nats per code, averaged over the cells of
an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from oar_scale.registry import ModelName

OrderName = Literal["random", "raster", "own confidence"]


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error."""

    mean: float
    standard_error: float


def estimate(values: NDArray[np.floating] | list[float]) -> Estimate:
    """Mean and standard error of one value an image.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a standard error needs at least 2 images, got {len(values)}")
    array = np.asarray(values, dtype=np.float64)
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
    """The label of a model, e.g. "any-order", or a reference such as "training images"."""
    samples: int
    kid_efflite0: float
    kid_efflite0_std: float
    fd_efflite0: float
