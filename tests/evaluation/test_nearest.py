"""The training image that is nearest to a sample, against all distances at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from oar_scale.evaluation import nearest
from oar_scale.evaluation.nearest import nearest_pictures
from oar_scale.results.examples import Picture


def pictures(count: int, side: int, seed: int) -> list[Picture]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("at_once", [1, 3, 256])
def test_it_is_that_of_all_distances_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of 2 x 2 pixels are what 32 x 32 pixels become; of equal ones the first is taken."""
    monkeypatch.setattr(nearest, "AT_ONCE", at_once)
    samples, others = pictures(5, 32, 0), pictures(11, 32, 1)
    others.append(others[2].copy())
    small = [np.array(some).reshape(len(some), 16, 2, 16, 2, 3).mean((2, 4)).round().reshape(len(some), -1) for some in (samples, others)]
    rms = np.sqrt(((small[0][:, None] - small[1][None]) ** 2).mean(2))
    for row, found in enumerate(nearest_pictures(samples, iter(others))):
        assert found.picture is others[int(rms[row].argmin())]
        assert found.rms == pytest.approx(float(rms[row].min()), abs=0.3)


def test_a_remembered_picture_is_found_at_another_size() -> None:
    others = pictures(40, 16, 0)
    sample = np.asarray(Image.fromarray(others[33]).resize((64, 64), Image.Resampling.NEAREST))
    (found,) = nearest_pictures([sample], others)
    assert found.picture is others[33] and found.rms == 0


def test_few_others_are_in_memory() -> None:
    """A thousand large pictures go by; of each that was looked at nothing is kept but the nearest."""
    alive = set[int]()

    class Watched(np.ndarray):
        def __del__(self) -> None:
            alive.discard(id(self))

    def going_by() -> Iterator[Picture]:
        for number in range(4 * nearest.AT_ONCE):
            picture = np.full((4, 4, 3), number % 256, dtype=np.uint8).view(Watched)
            alive.add(id(picture))
            assert len(alive) <= 2 * nearest.AT_ONCE + 8
            yield picture

    (found,) = nearest_pictures([np.full((4, 4, 3), 7, dtype=np.uint8)], going_by())
    assert found.rms == 0 and (np.asarray(found.picture) == 7).all()


def test_nothing_to_compare_with_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pictures to compare with"):
        nearest_pictures(pictures(1, 16, 0), [])
