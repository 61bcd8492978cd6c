"""The features of a set of images on a disk or in S3, a file for each part, from which statistics and samples are read in turn.

    FOLDER/00000.npz    pooled float32 [n, F], and spatial, logits, captions where the extractor has them; marks uint64 [n, 3]

For 50,000 images of InceptionV3 that is 1 GB; in memory are one part, the sums, and the rows that were asked for.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.errors import UserError
from oar_scale.evaluation.extractors import LAYERS, Extractor, Layer
from oar_scale.evaluation.image_marks import Marks, marks_of
from oar_scale.evaluation.image_sets import ImageSet, SetImage, SetPart
from oar_scale.evaluation.moments import Moments, merge_moments
from oar_scale.storage import Missing, join, open_storage

Rows = NDArray[np.float32]
FILE_FORMAT = 2
"""Of the files; those of format 1 had no marks."""


@dataclass(frozen=True)
class PartFeatures:
    """What was computed of a part."""

    data: bytes
    """The file."""
    images: int
    side: tuple[int, int] | None
    """Height and width of the images; None of an empty part."""
    layers: tuple[Layer, ...]


def part_features(images: ImageSet, part: SetPart, extractor: Extractor, batch: int, on_batch: object = None) -> PartFeatures:
    """The features of a part of a set.

    Args:
        batch: images that go through the network at once.
        on_batch: called without arguments after each batch.

    Raises:
        UserError: an image that cannot be read, images of several sizes, or features that are no numbers; names the image.
    """
    found: dict[Layer, list[Rows]] = {}
    side, captioned, marks = None, True, list[Marks]()
    for some in _batches(images.read(part), batch):
        for image in some:
            side = side or (image.pixels.shape[0], image.pixels.shape[1])
            if image.pixels.shape[:2] != side:
                raise UserError(
                    f"{images.where}: {image.name} is {image.pixels.shape[1]} x {image.pixels.shape[0]} pixels, others are "
                    f"{side[1]} x {side[0]}. Sets are compared at one size: --size N brings every image to its middle square of N x N."
                )
        layers = extractor.images(torch.from_numpy(np.stack([image.pixels for image in some])))
        captions = [image.caption for image in some if image.caption is not None]
        captioned = captioned and len(captions) == len(some)
        if captioned and (embedded := extractor.captions(captions)) is not None:
            layers["captions"] = embedded
        for layer, values in layers.items():
            broken = (~torch.isfinite(values).all(1)).nonzero()
            if len(broken):
                raise UserError(f"{images.where}: the features of {some[int(broken[0])].name} are no numbers (NaN or infinite)")
            found.setdefault(layer, []).append(values.float().numpy())
        marks.append(marks_of(some))
        if callable(on_batch):
            on_batch()
    arrays = {layer: np.concatenate(rows) for layer, rows in found.items() if layer != "captions" or captioned}
    buffer = io.BytesIO()
    marked = np.concatenate([np.empty((0, 3), np.uint64), *marks])
    np.savez(buffer, marks=marked, **arrays)  # type: ignore[arg-type]  # the names are never one of its options
    return PartFeatures(buffer.getvalue(), len(marked), side, tuple(layer for layer in LAYERS if layer in arrays))


def _batches(images: Iterator[SetImage], size: int) -> Iterator[list[SetImage]]:
    some = list[SetImage]()
    for image in images:
        some.append(image)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


@dataclass(frozen=True)
class FeatureFiles:
    """The features of a whole set."""

    folder: str
    counts: Mapping[str, int]
    """Images of each part, in the order of the set."""
    layers: tuple[Layer, ...]
    """That all parts have."""

    @property
    def images(self) -> int:
        """Images of the set."""
        return sum(self.counts.values())

    def moments(self, layer: Layer) -> Moments:
        """Statistics of a layer, the parts merged in their order; read where they were computed before."""
        uri = join(self.folder, f"statistics-{layer}.npz")
        try:
            with np.load(io.BytesIO(open_storage(uri).read(uri)), allow_pickle=False) as arrays:
                stored = Moments(int(arrays["count"]), arrays["mean"], arrays["scatter"])
            if stored.count == self.images and stored.scatter_DD.shape == 2 * stored.mean_D.shape:
                return stored
        except (Missing, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            pass  # there are none, or not all of them
        moments, buffer = merge_moments(Moments.of(rows) for rows in self._parts(layer)), io.BytesIO()
        np.savez(buffer, count=moments.count, mean=moments.mean_D, scatter=moments.scatter_DD)
        open_storage(uri).write(uri, buffer.getvalue())
        return moments

    def chosen(self, most: int, seed: int) -> NDArray[np.int64]:
        """The numbers of at most ``most`` images, ascending: all, or a random choice that the seed decides about."""
        if self.images <= most:
            return np.arange(self.images)
        return np.sort(np.random.default_rng(seed).choice(self.images, most, replace=False))

    def rows(self, layer: Layer, chosen: Sequence[int] | NDArray[np.int64]) -> Rows:
        """The features of these images, given by ascending number."""
        numbers, start, found = np.asarray(chosen), 0, list[Rows]()
        for rows in self._parts(layer):
            inside = numbers[(numbers >= start) & (numbers < start + len(rows))]
            found.append(rows[inside - start])
            start += len(rows)
        return np.concatenate(found)

    def marks(self) -> Marks:
        """The marks of all images."""
        return np.concatenate(list(self._arrays("marks", np.dtype(np.uint64))))

    def _parts(self, layer: Layer) -> Iterator[Rows]:
        return self._arrays(layer, np.dtype(np.float32))

    def _arrays(self, name: str, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        for part, count in self.counts.items():
            if not count:
                continue
            uri = join(self.folder, feature_file(part))
            try:
                with np.load(io.BytesIO(open_storage(uri).read(uri)), allow_pickle=False) as arrays:
                    rows = np.asarray(arrays[name])
            except (Missing, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(f"{uri}: not the features that were written there ({error}). Remove it, and run this again.") from error
            if rows.dtype != dtype or rows.ndim != 2 or len(rows) != count:
                found = f"{rows.dtype} {list(rows.shape)}"
                raise UserError(f"{uri}: {name} is {found}, not {dtype} of {count} images. Remove it, and run this again.")
            yield rows


def feature_file(part: str) -> str:
    """The name of the file with the features of a part."""
    return f"{part.removesuffix('.tar')}.npz"
