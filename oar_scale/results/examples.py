"""The vocabulary of pictures: samples, edits and orders as a report shows them. Pictures are uint8 ``[H, W, 3]`` arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from oar_scale.registry import ModelName

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class TokenizerMetadata:
    """The image and text tokenizers, measured on held-out images."""

    origin: str
    """E.g. "weights shipped with the recipe" or "trained in this run"."""
    grid: int
    codebook_size: int
    codebook_use: float
    """Share of the codebook that occurs in the training images, 0 to 1."""
    psnr_db: float
    prompts: str
    """What the models are conditioned on, as a phrase."""
    originals: tuple[Picture, ...] = ()
    reconstructions: tuple[Picture, ...] = ()
    reconstruction_fd_efflite0: float | None = None
    """Frechet distance of all held-out images to their reconstructions; None where it was not measured."""


@dataclass(frozen=True)
class NearestPicture:
    """The training image that looks most like a sample."""

    picture: Picture
    rms: float
    """Root of the mean squared difference of their pixels when both are small (``evaluation/nearest.py``), in levels of 0 .. 255."""


@dataclass(frozen=True)
class SampleRow:
    """Samples for one caption beside the original image."""

    caption: str
    original: Picture
    samples: tuple[Picture, ...]
    """One for each column of the grid."""
    novel: bool | None = None
    """Whether training has no variant of the original; None where it was not looked for."""
    nearest: NearestPicture | None = None
    """To the ordered model's sample; None where it was not looked for."""


@dataclass(frozen=True)
class SampleGrid:
    """Samples of several models for the same captions."""

    columns: tuple[ModelName, ...]
    """The models, e.g. ("any_order", "control", "ordered")."""
    settings: str
    """E.g. "guidance 2, temperature 1, own confidence order"."""
    rows: tuple[SampleRow, ...]
    compared: int = 0
    """Training images that the nearest ones were found among."""


@dataclass(frozen=True)
class EditExample:
    """Completions of one picture."""

    kind: Literal["inpainting", "outpainting"]
    caption: str
    model: ModelName
    original: Picture
    known: NDArray[np.bool_]
    """[G, G], True where the pixels were given."""
    completions: tuple[Picture, ...]


@dataclass(frozen=True)
class GalleryRow:
    """Completions of one picture by several models."""

    caption: str
    original: Picture
    known: NDArray[np.bool_]
    """[G, G], True where the pixels were given."""
    edits: tuple[Picture, ...]
    """One for each column of the gallery."""


@dataclass(frozen=True)
class EditGallery:
    """The same edits by several models."""

    columns: tuple[ModelName, ...]
    rows: tuple[GalleryRow, ...]


@dataclass(frozen=True)
class DrawingExample:
    """A sample and the way it was drawn."""

    caption: str
    model: ModelName
    picture: Picture
    order_N: NDArray[np.int64]
    """The cells as they were placed."""


@dataclass(frozen=True)
class OrderExample:
    """The extracted order of one image."""

    caption: str
    image: Picture
    step_of_cell: NDArray[np.int64]
    """[G, G]: when the cell was placed, 0 first."""


@dataclass(frozen=True)
class OrderSummary:
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
    """Outcome of the comparison with brute force, as a sentence; empty when it was not made."""
