"""Figures against torchmetrics' on the same features: it is given a network that hands on what it gets."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oar_scale.evaluation.distances import Gaussian, frechet_distance, kid
from oar_scale.evaluation.moments import Moments
from oar_scale.evaluation.scores import inception_score

pytestmark = [
    pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed"),
    pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features"),
]
FEATURES = 32


class HandsOn(nn.Module):
    """An extractor whose images are features already."""

    num_features = FEATURES

    def forward(self, features_BD: Tensor) -> Tensor:
        return features_BD


@pytest.fixture(scope="module")
def sets() -> tuple[Tensor, Tensor]:
    """Features as networks have them: none below 0, of correlated channels, of other numbers of images."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(FEATURES, FEATURES)) / np.sqrt(FEATURES)
    samples, reference = rng.normal(size=(90, FEATURES)) @ mixing + 0.3, rng.normal(size=(70, FEATURES))
    return torch.from_numpy(samples.clip(0)), torch.from_numpy(reference.clip(0))


def test_the_frechet_distance_is_that_of_torchmetrics(sets: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance  # seconds, in each process that collects tests

    samples, reference = sets
    metric = FrechetInceptionDistance(feature=HandsOn()).set_dtype(torch.float64)
    metric.update(reference, real=True)
    metric.update(samples[:40], real=False)
    metric.update(samples[40:], real=False)
    expected = float(metric.compute())
    for gaussians in (map(Gaussian.of_features, sets), (Gaussian.of_moments(Moments.of(features)) for features in sets)):
        assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-5)


def test_kid_is_that_of_torchmetrics(sets: tuple[Tensor, Tensor]) -> None:
    """Of one subset with all images of both sides, so that no choice is in it."""
    from torchmetrics.image.kid import KernelInceptionDistance

    samples, reference = sets[0][:70], sets[1]
    metric = KernelInceptionDistance(feature=HandsOn(), subsets=1, subset_size=70)
    metric.update(reference, real=True)
    metric.update(samples, real=False)
    mean, _ = metric.compute()
    assert kid(samples.numpy(), reference.numpy(), subsets=1, subset_size=70).mean == pytest.approx(float(mean), rel=1e-6)


def test_the_inception_score_is_that_of_torchmetrics(sets: tuple[Tensor, Tensor]) -> None:
    """Of one part, since each shuffles in its own way."""
    from torchmetrics.image.inception import InceptionScore

    logits = 4 * sets[0]
    metric = InceptionScore(feature=HandsOn(), splits=1)
    metric.update(logits)
    with pytest.warns(UserWarning, match="degrees of freedom"):  # the deviation of one part
        mean, _ = metric.compute()
    assert inception_score(logits.numpy(), splits=1)[0] == pytest.approx(float(mean), rel=1e-6)
