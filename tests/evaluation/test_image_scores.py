"""Inception Score and CLIP score against their formulae, written out another way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oar_scale.evaluation.scores import clip_score, inception_score


def test_inception_score_is_the_formula_of_torch_fidelity() -> None:
    """Its shuffle, cuts and softmax, written out in torch; a score of 0.1 more or less is the size of published differences."""
    logits = torch.randn(57, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    shuffled = logits[np.random.RandomState(2020).permutation(57)]
    scores = []
    for index in range(10):
        part = shuffled[index * 57 // 10 : (index + 1) * 57 // 10]
        marginal = part.softmax(1).mean(0, keepdim=True).log().expand_as(part)
        scores.append(F.kl_div(marginal, part.log_softmax(1), log_target=True, reduction="batchmean").exp().item())
    mean, std = inception_score(logits.numpy())
    assert (mean, std) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_sure_and_varied_images_score_the_number_of_classes() -> None:
    sure = np.where(np.eye(8)[np.arange(80) % 8] > 0, 1e4, 0.0)  # other classes have probability 0, exactly
    assert inception_score(sure, splits=1)[0] == pytest.approx(8)
    assert inception_score(np.zeros((80, 8)))[0] == pytest.approx(1)
    assert inception_score(np.tile(sure[:1], (80, 1)))[0] == pytest.approx(1)


def test_clip_score_is_a_hundred_cosines() -> None:
    rng = np.random.default_rng(1)
    images, captions = rng.normal(size=(2, 20, 6))
    cosines = F.cosine_similarity(torch.from_numpy(images), torch.from_numpy(captions)).clamp(min=0).numpy()
    score = clip_score(images, captions)
    assert score.mean == pytest.approx(100 * cosines.mean()) and score.standard_error == pytest.approx(
        100 * cosines.std(ddof=1) / np.sqrt(20)
    )
    assert clip_score(images, 3 * images).mean == pytest.approx(100)


def test_scores_of_too_few_images_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match="n at least 10"):
        inception_score(np.zeros((9, 4)))
    with pytest.raises(ValueError, match="no numbers"):
        inception_score(np.full((20, 4), np.nan))
    with pytest.raises(ValueError, match="no pairs"):
        clip_score(np.zeros((3, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="no numbers"):
        clip_score(np.full((3, 4), np.inf), np.ones((3, 4)))
