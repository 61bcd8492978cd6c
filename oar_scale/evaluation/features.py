"""Features of pictures in memory, by any extractor: what KID and the Frechet distance of an evaluation compare."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.evaluation.extractors import Extractor, ExtractorSpec, load_extractor

BATCH = 64


def picture_features(
    pictures: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    spec: ExtractorSpec | None = None,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Pooled features [S, F].

    Args:
        pictures: uint8 [H, W, 3] each, of one size; a batch at a time goes through the network.
        spec: the extractor; default: EfficientNet-Lite0, which comes with the extra ``eval``. It is loaded once in a process.

    Raises:
        UserError: no such extractor, packages of the extra ``eval`` are missing, or weights of another network.
        ArithmeticError: features that are no numbers.
    """
    extractor, found = _loaded(spec or ExtractorSpec()), []
    extractor.to(device)
    for start in range(0, len(pictures), BATCH):
        some = torch.from_numpy(np.stack(list(pictures[start : start + BATCH])))
        found.append(extractor.images(some)["pooled"].float().numpy())
    features_SF = np.concatenate(found)
    if not np.isfinite(features_SF).all():
        raise ArithmeticError(f"features {extractor.label} of some pictures are no numbers (NaN or infinite)")
    return features_SF


def features_label(spec: ExtractorSpec) -> str:
    """What the names of distances on these features end in. Raises UserError as :func:`picture_features`."""
    return _loaded(spec).label


@functools.cache
def _loaded(spec: ExtractorSpec) -> Extractor:
    return load_extractor(spec)
