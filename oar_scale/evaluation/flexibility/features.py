"""What a network sees in pictures, and how far apart pictures are there. The networks are those of ``evaluation.extractors``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oar_scale.evaluation.distances import kid_shares
from oar_scale.evaluation.eval_tasks import here
from oar_scale.evaluation.extractors import ExtractorSpec, extractor_id
from oar_scale.evaluation.features import features_label, picture_features
from oar_scale.evaluation.flexibility.pieces import Arrays, KnownById, Piece, in_parts
from oar_scale.evaluation.flexibility.subjects import Source

Features = NDArray[np.float32]


@dataclass(frozen=True)
class FeatureNetwork(KnownById):
    """A network whose features are compared."""

    spec: ExtractorSpec
    label: str
    """Ends the names of figures: ``kid_LABEL``."""

    @property
    def kid(self) -> str:
        """The name of the kernel distance on its features."""
        return f"kid_{self.label}"

    def features(self, pictures_SHW3: NDArray[np.uint8]) -> Features:
        """The features [S, F] of pictures, computed on the device of this process. Raises as :func:`picture_features`."""
        return picture_features(pictures_SHW3, self.spec, here())


def feature_network(spec: ExtractorSpec) -> FeatureNetwork:
    """The network of a spec. Raises UserError without a package or weights that it needs, or for weights of another network."""
    return FeatureNetwork(extractor_id(spec), spec, features_label(spec))


@dataclass(frozen=True)
class DistanceSource(Source):
    """The distance of pictures to others, whose features are an array of other pieces."""

    reference: tuple[Piece, ...]
    reference_array: str
    families_S: NDArray[np.int64]
    """Pairs of one family are left out."""

    @property
    def needed(self) -> tuple[Piece, ...]:
        return (*self.pieces, *self.reference)

    def values(self, results: Mapping[str, Arrays]) -> NDArray[np.float64]:
        samples, reference = in_parts(results, self.pieces)[self.array], in_parts(results, self.reference)[self.reference_array]
        return kid_shares(samples, reference, self.families_S)


def mean_pairwise(features_SKF: ArrayLike) -> NDArray[np.float64]:
    """The mean distance [S] between the features of two of K pictures of an image. Raises ValueError for fewer than 2."""
    features = np.asarray(features_SKF, dtype=np.float64)
    if features.shape[1] < 2:
        raise ValueError(f"the distance between pictures wants at least 2 of each image, got {features.shape[1]}")
    first, second = np.triu_indices(features.shape[1], 1)
    distances_S: NDArray[np.float64] = np.linalg.norm(features[:, first] - features[:, second], axis=2).mean(1)
    return distances_S
