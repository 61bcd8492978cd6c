"""Scores of one set of images: Inception Score, and CLIP score against the images' captions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oar_scale.results.estimates import Estimate, estimate

Matrix = NDArray[np.float64]


def inception_score(logits: ArrayLike, *, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """``exp(mean KL(p(class | image) || p(class)))`` (Salimans et al. 2016): are single images clear, and all together varied?

    Args:
        logits: [n, classes] of a classifier.
        splits: the images are shuffled and cut into so many parts; the score grows with the images in a part.
        seed: of the shuffling; the default, and the way of cutting, are torch-fidelity's.

    Returns:
        Mean and standard deviation over the parts.

    Raises:
        ValueError: fewer images than parts, or values that are no numbers.
    """
    logits_SC = np.asarray(logits, dtype=np.float64)
    if logits_SC.ndim != 2 or len(logits_SC) < splits:
        raise ValueError(
            f"logits of shape {logits_SC.shape}: an Inception Score over {splits} parts needs [n, classes], n at least {splits}"
        )
    if not np.isfinite(logits_SC).all():
        raise ValueError("the logits hold values that are no numbers (NaN or infinite)")
    count = len(logits_SC)
    logits_SC = logits_SC[np.random.RandomState(seed).permutation(count)]
    log_p_SC = logits_SC - logits_SC.max(1, keepdims=True)
    log_p_SC -= np.log(np.exp(log_p_SC).sum(1, keepdims=True))
    scores = []
    for index in range(splits):
        part = log_p_SC[index * count // splits : (index + 1) * count // splits]
        p_PC = np.exp(part)
        # 0 log 0 = 0, where a class has no probability in the whole part.
        marginal_C = np.log(p_PC.mean(0).clip(np.finfo(np.float64).tiny))
        scores.append(np.exp((p_PC * (part - marginal_C)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def clip_score(images: ArrayLike, captions: ArrayLike) -> Estimate:
    """100 max(cos(image, caption), 0), of CLIP's embeddings (Hessel et al. 2021, with torchmetrics' factor of 100 instead of 2.5).

    Args:
        images, captions: [n, d], row by row.

    Returns:
        Mean and standard error over the images.

    Raises:
        ValueError: unequal shapes, fewer than 2 images, or values that are no numbers.
    """
    images_SD, captions_SD = (np.asarray(given, dtype=np.float64) for given in (images, captions))
    if images_SD.ndim != 2 or images_SD.shape != captions_SD.shape:
        raise ValueError(f"embeddings of shapes {images_SD.shape} and {captions_SD.shape} belong to no pairs of images and captions")
    if not (np.isfinite(images_SD).all() and np.isfinite(captions_SD).all()):
        raise ValueError("the embeddings hold values that are no numbers (NaN or infinite)")
    lengths_S = np.linalg.norm(images_SD, axis=1) * np.linalg.norm(captions_SD, axis=1)
    cosine_S = np.einsum("nd,nd->n", images_SD, captions_SD) / lengths_S.clip(1e-12)
    return estimate(100 * cosine_S.clip(0))
