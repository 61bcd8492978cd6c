"""Measures of edits against sums written out: similarity by its windows, the hole's likelihood cell by cell, distances pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_models import random_codes, random_text, small_model

from oar_scale.evaluation.distances import kid_difference, kid_shares
from oar_scale.evaluation.flexibility.edits import holes, only
from oar_scale.evaluation.flexibility.features import mean_pairwise
from oar_scale.evaluation.flexibility.similarity import ssim
from oar_scale.evaluation.likelihood import honest_nll
from oar_scale.generation.seen_codes import fill_hole, pixels_of
from oar_scale.results.statistics import clustered_error
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, pixels_to_unit


def pictures(count: int, side: int = 12, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def ssim_by_hand(x: NDArray[np.float64], y: NDArray[np.float64], at: tuple[int, int], region: NDArray[np.bool_]) -> float:
    """Weighted moments of those pixels of the 11 x 11 window around a pixel of one colour that lie in the region."""
    reach = np.arange(-5, 6)
    weights = np.exp(-(reach**2) / (2 * 1.5**2))

    def window(values: NDArray[np.generic]) -> NDArray[np.float64]:
        return np.pad(values, 5)[at[0] : at[0] + 11, at[1] : at[1] + 11].astype(np.float64)

    seen = np.outer(weights, weights) * window(region)
    seen, windows = seen / seen.sum(), [window(each) for each in (x, y)]
    m_x, m_y = (float((seen * each).sum()) for each in windows)
    v_x, v_y = (float((seen * (each - mean) ** 2).sum()) for each, mean in zip(windows, (m_x, m_y), strict=True))
    shared = float((seen * (windows[0] - m_x) * (windows[1] - m_y)).sum())
    c1, c2 = 0.01**2, 0.03**2
    return (2 * m_x * m_y + c1) * (2 * shared + c2) / ((m_x**2 + m_y**2 + c1) * (v_x + v_y + c2))


def test_similarity_is_that_of_its_windows() -> None:
    first, second = pictures(2)
    second = (0.5 * first + 0.5 * second).astype(np.uint8)
    region = pixels_of(torch.from_numpy(holes(3)["outpainting"]), 12).numpy()
    found = np.zeros((12, 12))
    found[region] = ssim(first, second, region)
    for at in ((0, 0), (3, 6), (11, 3)):
        by_hand = [ssim_by_hand(first[..., c] / 255, second[..., c] / 255, at, region) for c in range(3)]
        assert region[at] and found[at] == pytest.approx(np.mean(by_hand), rel=1e-9)
    assert ssim(first, first, region) == pytest.approx(np.ones(region.sum()))
    assert found[region] == pytest.approx(ssim(second, first, region))
    with pytest.raises(ValueError, match="cannot be compared"):
        ssim(first, second[:6], region)


@pytest.mark.parametrize("name", ["inpainting", "outpainting", "right half"])
def test_similarity_of_a_region_does_not_see_what_lies_beyond(name: str) -> None:
    """What is known is equal by construction: in windows that look over the border it would lift the similarity of every completion."""
    first, second = pictures(2)
    region = pixels_of(torch.from_numpy(holes(4)[name]), 12).numpy()  # type: ignore[index]
    completed = np.where(region[..., None], second, first)
    elsewhere = np.where(region[..., None], second, pictures(1, seed=5)[0])
    assert ssim(first, completed, region) == pytest.approx(ssim(first, elsewhere, region), rel=1e-9)


def test_holes_cover_what_their_names_say() -> None:
    found = holes(4)
    assert np.flatnonzero(found["inpainting"]).tolist() == [5, 6, 9, 10]
    assert (found["inpainting"] ^ found["outpainting"]).all()
    assert np.flatnonzero(found["right half"]).tolist() == [cell for cell in range(16) if cell % 4 >= 2]
    shown = only(pictures(1), found["right half"])
    assert (shown[:, :, :6] == 176).all() and (shown[:, :, 6:] == pictures(1)[:, :, 6:]).all()


@torch.no_grad()
def test_the_likelihood_of_a_hole_is_that_of_brute_force_and_saw_nothing() -> None:
    """Known codes are those of the picture with its hole filled, encoded by hand; another content of the hole changes none of them."""
    model = small_model()
    torch.manual_seed(0)
    spec = VQSpec(image_size=12, channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_channels=32, codebook_size=7, codebook_dim=4)
    vq = VQTokenizer(spec).eval()
    hole, codes, text, real = holes(3)["right half"], random_codes(model, 2), random_text(model, 2), pictures(2)
    condition = model.condition(text)
    found = honest_nll(model, vq, real, codes.numpy(), hole, condition)

    hidden = pixels_of(torch.from_numpy(hole), 12)
    known, asked = np.flatnonzero(~hole).tolist(), np.flatnonzero(hole).tolist()
    for image in range(2):
        filled = fill_hole(pixels_to_unit(torch.from_numpy(real[image : image + 1]))[0], hidden, "noise")
        given = torch.where(torch.from_numpy(hole), codes[image], vq.encode(filled[None])[0])
        total, placed = 0.0, list(known)
        for cell in asked:
            placed.append(cell)
            logits = model(given[None], torch.tensor([placed]), condition[image : image + 1])[0, -1].double()
            total -= float(logits.log_softmax(-1)[codes[image, cell]])
        assert float(found[image]) == pytest.approx(total / len(asked), rel=1e-4)
    other = np.where(hidden.numpy()[None, :, :, None], pictures(2, seed=9), real)
    assert torch.equal(honest_nll(model, vq, other, codes.numpy(), hole, condition), found)


def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float((a @ b / len(a) + 1) ** 3)


def test_shares_of_a_distance_are_those_of_pairs_written_out() -> None:
    rng = np.random.default_rng(0)
    x, other, y = rng.normal(size=(3, 6, 5))

    def kid(rows: list[int]) -> float:
        pairs = [(i, j) for i in rows for j in rows if i != j]
        return float(np.mean([kernel(x[i], x[j]) - 2 * kernel(x[i], y[j]) + kernel(y[i], y[j]) for i, j in pairs]))

    shares = kid_shares(x, y)
    everyone = list(range(6))
    by_hand = [6 * kid(everyone) - 5 * kid([row for row in everyone if row != left_out]) for left_out in everyone]
    assert shares == pytest.approx(by_hand) and shares.mean() == pytest.approx(kid(everyone))
    difference, wanted = shares - kid_shares(other, y), kid_difference(x, other, y)
    assert difference.mean() == pytest.approx(wanted.mean)
    assert difference.std(ddof=1) / 6**0.5 == pytest.approx(wanted.standard_error)
    with pytest.raises(ValueError, match="at least 3"):
        kid_shares(x[:2], y[:2])


def test_pairs_of_one_family_are_left_out_of_a_distance() -> None:
    """Twins in other rows as well as an image's own sample: by sums over all pairs of different families, with and without a family."""
    x, y = np.random.default_rng(0).normal(size=(2, 9, 5))

    def kid(families: NDArray[np.int64], but: int = -1) -> float:
        pairs = [(i, j) for i in range(9) for j in range(9) if families[i] != families[j] and but not in (families[i], families[j])]
        return float(np.mean([kernel(x[i], x[j]) - 2 * kernel(x[i], y[j]) + kernel(y[i], y[j]) for i, j in pairs]))

    uneven, even = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4]), np.arange(9) % 3
    assert kid_shares(x, y, uneven).mean() == pytest.approx(kid(uneven)) != pytest.approx(kid_shares(x, y).mean())
    assert kid_shares(x, y, np.arange(9)) == pytest.approx(kid_shares(x, y))
    without = [kid(even, but) for but in range(3)]
    jackknife = (2 / 3 * np.sum((np.array(without) - np.mean(without)) ** 2)) ** 0.5
    assert clustered_error(kid_shares(x, y, even), even) == pytest.approx(jackknife)
    with pytest.raises(ValueError, match="different families, got 2"):
        kid_shares(x, y, np.arange(9) % 2)


def test_diversity_is_the_mean_over_pairs_and_zero_of_equal_pictures() -> None:
    features = np.random.default_rng(1).normal(size=(2, 3, 4))
    by_hand = [np.mean([np.linalg.norm(each[a] - each[b]) for a, b in ((0, 1), (0, 2), (1, 2))]) for each in features]
    assert mean_pairwise(features) == pytest.approx(by_hand)
    assert mean_pairwise(np.ones((2, 3, 4))).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="at least 2"):
        mean_pairwise(features[:, :1])
