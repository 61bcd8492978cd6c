"""What a network sees in pictures, and how far apart pictures are there. The networks are those of ``evaluation.extractors``."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from oar_scale.evaluation.eval_tasks import here
from oar_scale.evaluation.extractors import Extractor, ExtractorSpec, extractor_id, load_extractor
from oar_scale.evaluation.flexibility.pieces import KnownById

BATCH = 64
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
        """The features [S, F] of pictures, computed on the device of this process."""
        network = _opened_extractor(self.spec)
        batches = [network.images(batch)["pooled"] for batch in torch.tensor(pictures_SHW3).split(BATCH)]
        features_SF: Features = torch.cat(batches).numpy()
        return features_SF


def feature_network(spec: ExtractorSpec) -> FeatureNetwork:
    """The network of a spec. Raises UserError without a package or weights that it needs, or for weights of another network."""
    return FeatureNetwork(extractor_id(spec), spec, _opened_extractor(spec).label)


@functools.lru_cache(maxsize=1)
def _opened_extractor(spec: ExtractorSpec) -> Extractor:
    network = load_extractor(spec)
    network.to(here())
    return network


def mean_pairwise(features_SKF: ArrayLike) -> NDArray[np.float64]:
    """The mean distance [S] between the features of two of K pictures of an image. Raises ValueError for fewer than 2."""
    features = np.asarray(features_SKF, dtype=np.float64)
    if features.shape[1] < 2:
        raise ValueError(f"the distance between pictures wants at least 2 of each image, got {features.shape[1]}")
    first, second = np.triu_indices(features.shape[1], 1)
    distances_S: NDArray[np.float64] = np.linalg.norm(features[:, first] - features[:, second], axis=2).mean(1)
    return distances_S
