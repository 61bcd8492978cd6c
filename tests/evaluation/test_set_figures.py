"""Figures of two sets from their feature files: the right ones, under names that say what they are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.evaluation.adm_batch import write_batch
from oar_scale.evaluation.distances import kid, kid_error
from oar_scale.evaluation.extractors import Extractor, Layer, Layers
from oar_scale.evaluation.extractors.extractor import WeightsFile
from oar_scale.evaluation.feature_files import FeatureFiles, feature_file, part_features
from oar_scale.evaluation.image_marks import repeated
from oar_scale.evaluation.image_sets import find_images
from oar_scale.evaluation.set_figures import Comparison, Side, figure_names

FEATURES = 6
Rows = NDArray[np.float32]


def stored(folder: Path, parts: Sequence[Rows], captions_S: Sequence[int] | None = None, **layers: Rows) -> FeatureFiles:
    """A set whose pooled features are these, a file a part; further layers go to a single part.

    Args:
        captions_S: a number for the caption of each image; default: there are none. Its pixels are its features.
    """
    folder.mkdir()
    counts: dict[str, int] = {}
    for index, rows in enumerate(parts):
        start = sum(counts.values())
        numbers = [0] * len(rows) if captions_S is None else captions_S[start : start + len(rows)]
        marks = [
            (start + at + 1, caption, hash(row.tobytes()) % 2**64) for at, (row, caption) in enumerate(zip(rows, numbers, strict=True))
        ]
        np.savez(folder / feature_file(f"{index:05d}"), pooled=rows, marks=np.array(marks, np.uint64), **layers)
        counts[f"{index:05d}"] = len(rows)
    names: tuple[Layer, ...] = ("pooled", *(layer for layer in ("spatial", "logits", "captions") if layer in layers))  # type: ignore[assignment]
    return FeatureFiles(str(folder), counts, names)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Rows, Rows, Comparison]:
    """60 samples in three parts, 45 reference images in two."""
    rng = np.random.default_rng(0)
    samples, reference = rng.normal(size=(60, FEATURES)).astype(np.float32) + 0.5, rng.normal(size=(45, FEATURES)).astype(np.float32)
    sides = [
        Side("samples", stored(tmp_path / "s", np.split(samples, [10, 30]))),
        Side("reference", stored(tmp_path / "r", np.split(reference, [40]))),
    ]
    return samples, reference, Comparison(*sides, label="small", standard=False)


def test_every_figure_is_that_of_the_whole_sets(two: tuple[Rows, Rows, Comparison]) -> None:
    """The Frechet distance by scipy's square root of a matrix, on all features at once; KID by the function of sets."""
    samples, reference, comparison = two
    assert comparison.possible() == ["fd", "kid", "precision", "recall", "density", "coverage"]
    figures = comparison.figures(comparison.wanted([]))
    x, y = samples.astype(np.float64), reference.astype(np.float64)
    root = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert figures["fd_small"]["value"] == pytest.approx(expected, rel=1e-9)
    assert figures["kid_small"]["value"] == pytest.approx(kid(x, y).mean, rel=1e-9)
    assert {(figure["samples"], figure["reference"]) for figure in figures.values()} == {(60, 45)}
    kid_figure = figures["kid_small"]
    between = kid(x, y).std / np.sqrt(100)
    assert kid_figure["error"] == pytest.approx(np.hypot(kid_error(x, y), between), rel=1e-6)
    assert kid_figure["deviation_between_subsets"] == pytest.approx(kid(x, y).std, rel=1e-6)
    for name in ("precision", "recall", "coverage"):
        share = figures[f"{name}_small"]
        assert share["low"] < share["high"] and "error" not in share


def test_halves_of_the_reference_are_compared_with_as_many_samples(tmp_path: Path) -> None:
    """All from one distribution: the samples are no farther from one half than the other half is, whatever their number."""
    rng, found = np.random.default_rng(4), []
    for trial in range(40):
        sides = [
            Side(name, stored(tmp_path / f"{name}{trial}", [rng.normal(size=(count, FEATURES)).astype(np.float32)]))
            for name, count in (("s", 80), ("r", 30))
        ]
        figure = Comparison(*sides, "small", False).figures(["fd"])["fd_small"]
        equal = figure["equal_sizes"]
        found.append([figure["value"], equal["halves_of_reference"], equal["samples"]])
    whole, other_half, samples = np.mean(found, axis=0)
    assert equal["images"] == 15
    assert samples == pytest.approx(other_half, rel=0.2) and whole < 0.6 * other_half  # as many images are comparable, more are not


def test_only_features_of_the_published_inception_are_called_fid(two: tuple[Rows, Rows, Comparison]) -> None:
    _, _, comparison = two
    published = Comparison(comparison.samples, comparison.reference, "inception", True)
    assert [published.name(figure) for figure in ("fd", "sfd", "kid", "is")] == ["fid", "sfid", "kid", "inception_score"]
    assert [comparison.name(figure) for figure in ("fd", "precision")] == ["fd_small", "precision_small"]
    assert figure_names(["fid", "fd", "kid"], "inception", True) == ["fd", "fd", "kid"]
    with pytest.raises(UserError, match=r"--metrics fid: only distances on InceptionV3 .* these features are small"):
        figure_names(["fid"], "small", False)
    with pytest.raises(UserError, match=r"--metrics fud: there is no such figure. There are: fd, sfd, kid"):
        figure_names(["fud"], "small", False)


def test_statistics_alone_give_frechet_distances_alone(two: tuple[Rows, Rows, Comparison]) -> None:
    _, reference, comparison = two
    given = Side("adm.npz", None, {"pooled": (reference.mean(0), np.cov(reference.T))}, None)
    bare = Comparison(comparison.samples, given, "small", False)
    assert bare.possible() == ["fd"]
    figure = bare.figures(["fd"])["fd_small"]
    assert figure["value"] == pytest.approx(comparison.figures(["fd"])["fd_small"]["value"], rel=1e-6)
    assert (figure["samples"], figure["reference"]) == (60, None)
    with pytest.raises(UserError, match=r"--metrics kid: adm\.npz: there are no pooled features"):
        bare.wanted(["kid"])


def test_a_choice_of_images_bounds_what_is_in_memory(two: tuple[Rows, Rows, Comparison]) -> None:
    samples, _, comparison = two
    few = Comparison(comparison.samples, comparison.reference, "small", False, kept=20)
    figure = few.figures(["kid"])["kid_small"]
    assert (figure["samples"], figure["reference"]) == (20, 20)
    assert any("20 of 60 images, a random choice" in note for note in few.notes(["kid"]))
    files = comparison.samples.files
    assert files is not None
    chosen = files.chosen(20, seed=0)
    assert len(set(chosen)) == 20
    np.testing.assert_array_equal(files.rows("pooled", chosen), samples[chosen])


def test_fewer_images_than_features_are_pointed_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    small = Side("a", stored(tmp_path / "a", [rng.normal(size=(6, FEATURES)).astype(np.float32)]))
    large = Side("b", stored(tmp_path / "b", [rng.normal(size=(50, FEATURES)).astype(np.float32)]))
    assert any("a has 6 images for 6 features" in note for note in Comparison(small, large, "x", False).notes(["fd"]))
    assert not any("singular" in note for note in Comparison(large, large, "x", False).notes(["fd"]))


def test_too_few_images_and_other_dimensions_are_errors(tmp_path: Path, two: tuple[Rows, Rows, Comparison]) -> None:
    _, _, comparison = two
    three = Side("three", stored(tmp_path / "three", [np.random.default_rng(3).normal(size=(3, FEATURES)).astype(np.float32)]))
    other = Side("other", stored(tmp_path / "other", [np.ones((9, 5), np.float32)]))
    one = Side("one", stored(tmp_path / "one", [np.ones((1, FEATURES), np.float32)]))
    for side, figure, says in (
        (three, "recall", "three has 3 images; recall_small needs 4"),
        (three, "kid", "three has 3 images; kid_small needs 4"),
        (one, "fd", "one has 1 image; fd_small needs 2"),
    ):
        with pytest.raises(UserError, match=f"--metrics {figure}: {says}"):
            Comparison(side, comparison.reference, "small", False).wanted([figure])
    few = Comparison(three, comparison.reference, "small", False)
    assert set(few.figures(few.wanted([]))) == {"fd_small", "precision_small", "density_small", "coverage_small"}
    assert few.left_out(few.possible()) == ["three has 3 images; kid_small needs 4, recall_small needs 4"]
    for figure in ("fd", "kid", "coverage"):
        with pytest.raises(UserError, match=f"{other.where} and reference: .*5 features cannot be compared with 6"):
            Comparison(other, comparison.reference, "small", False).figures([figure])


def test_pairs_of_one_caption_are_left_out_of_kid(tmp_path: Path) -> None:
    """Three drawings of each caption, of which the reference has one image: those of a perfect model, unbiased only without the pairs."""
    rng, found = np.random.default_rng(5), []
    for trial in range(30):
        shared = rng.normal(size=(20, FEATURES))
        drawn = np.repeat(shared, 3, 0) + 0.3 * rng.normal(size=(60, FEATURES))
        real = shared + 0.3 * rng.normal(size=(20, FEATURES))
        order = rng.permutation(60)
        captions = (np.arange(60) // 3 + 1)[order]
        samples = Side("s", stored(tmp_path / f"s{trial}", np.split(drawn[order].astype(np.float32), [25]), captions.tolist()))
        reference = Side("r", stored(tmp_path / f"r{trial}", [real.astype(np.float32)], [*range(1, 21)]))
        plain, paired = (Comparison(samples, reference, "x", False, 50_000, 0, how) for how in (None, "caption"))  # type: ignore[arg-type]
        found.append([each.figures(["kid"])["kid_x"]["value"] for each in (plain, paired)])
    (biased, unbiased), errors = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(len(found))
    assert abs(unbiased) < 4 * errors[1] and abs(biased) > 6 * errors[0]
    (note,) = plain.notes(["kid"])
    assert "60 of 60 samples have the caption of a reference image" in note and "cannot see whether the samples of one caption" in note
    assert paired.notes(["kid"]) == []
    expected = kid(drawn[order].astype(np.float32), real.astype(np.float32), groups=(captions, np.arange(1, 21)))
    assert paired.figures(["kid"])["kid_x"]["value"] == pytest.approx(expected.mean, rel=1e-9)


def test_sets_that_cannot_be_paired_are_an_error(tmp_path: Path, two: tuple[Rows, Rows, Comparison]) -> None:
    samples, _, comparison = two
    for by, says in (("caption", "60 of 60 images of samples have no caption"), ("name", None)):
        paired = Comparison(comparison.samples, comparison.reference, "small", False, paired=by)  # type: ignore[arg-type]
        if says is None:
            assert paired.figures(["kid"])["kid_small"]["paired"] == "name"
            continue
        with pytest.raises(UserError, match=f"--paired {by}: {says}"):
            paired.figures(["kid"])
    own = Side("own", stored(tmp_path / "own", [samples], [7] * 60))
    other = Side("other", stored(tmp_path / "other", [samples], [8] * 60))
    with pytest.raises(UserError, match="--paired caption: own and other have no caption in common"):
        Comparison(own, other, "x", False, paired="caption").figures(["kid"])


def test_images_that_are_the_same_are_pointed_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    rows, reference = rng.normal(size=(20, FEATURES)).astype(np.float32), rng.normal(size=(20, FEATURES)).astype(np.float32)
    rows[5:9] = rows[4]
    rows[12] = reference[3]
    sides = [Side("a", stored(tmp_path / "a", np.split(rows, [7]))), Side("b", stored(tmp_path / "b", [reference]))]
    notes = Comparison(*sides, "x", False).notes(["kid"])
    assert notes == [
        "a: 5 of 20 images are, pixel for pixel, the same as another one of the set. Errors and intervals take all images for independent: "
        "they are too small by that.",
        "a: 1 of 20 images are, pixel for pixel, images of the reference",
    ]


def test_images_without_a_caption_do_not_share_one() -> None:
    marks = np.array([(1, 0, 11), (2, 0, 12), (3, 7, 13), (4, 7, 14), (5, 8, 15)], np.uint64)
    assert (repeated(marks, "caption"), repeated(marks, "name"), repeated(marks)) == (2, 0, 0)


def test_identical_images_claim_no_certainty(tmp_path: Path) -> None:
    """Twenty times one picture: no figure has an error of 0."""
    same = Side("same", stored(tmp_path / "same", [np.ones((20, FEATURES), np.float32)]))
    other = Side("other", stored(tmp_path / "other", [np.random.default_rng(7).normal(size=(20, FEATURES)).astype(np.float32) + 1]))
    both = Comparison(same, other, "x", False)
    for figure in both.figures(both.possible()).values():
        assert figure.get("error", 1.0) > 0 and figure.get("low", 0.0) < figure.get("high", 1.0)
    assert "20 of 20 images are" in both.notes(["kid"])[0]


def test_scores_need_their_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    pooled = rng.normal(size=(20, FEATURES)).astype(np.float32)
    scored = Side("scored", stored(tmp_path / "a", [pooled], logits=np.zeros((20, 4), np.float32), captions=pooled))
    alone = Comparison(scored, Side("no reference", None), "clip", False)
    assert alone.possible() == ["is", "clip"]
    figures = alone.figures(alone.possible())
    assert figures["is_clip"]["value"] == pytest.approx(1) and figures["clip_clip"]["value"] == pytest.approx(100)
    plain = Side("plain", stored(tmp_path / "b", [pooled]))
    with pytest.raises(UserError, match="--metrics clip: plain: not every image has a caption"):
        Comparison(plain, plain, "x", False).wanted(["clip"])


def test_damaged_features_are_named(two: tuple[Rows, Rows, Comparison]) -> None:
    _, _, comparison = two
    files = comparison.samples.files
    assert files is not None
    path = Path(files.folder) / "00001.npz"
    for content in (path.read_bytes()[:200], _one_row()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"00001\.npz: .*Remove it, and run this again"):
            files.moments("pooled")


def _one_row() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, pooled=np.zeros((1, FEATURES), np.float32))
    return buffer.getvalue()


def test_statistics_are_kept_and_computed_again_where_they_are_damaged(two: tuple[Rows, Rows, Comparison]) -> None:
    _, _, comparison = two
    files = comparison.samples.files
    assert files is not None
    first = files.moments("pooled")
    kept = Path(files.folder) / "statistics-pooled.npz"
    assert kept.exists() and np.array_equal(files.moments("pooled").scatter_DD, first.scatter_DD)
    kept.write_bytes(b"cut")
    assert np.array_equal(files.moments("pooled").scatter_DD, first.scatter_DD)


class MeanColour(Extractor):
    """An extractor of a few lines: the mean of each channel, NaN for a black image."""

    preprocessing: ClassVar[str] = "none"

    def __init__(self, model: str = "", weights: WeightsFile | None = None) -> None:
        self.label, self.network = "colour", torch.nn.Identity()

    def layers(self, images_BHW3: Tensor) -> Layers:
        means = images_BHW3.float().mean((1, 2))
        return {"pooled": torch.where(means.sum(1, keepdim=True) == 0, torch.nan, means)}

    def captions(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[len(text), 0.0, 0.0] for text in texts])


def test_no_convolution_of_features_is_rounded_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they are computed: in the pool of oar distance, in the stage evaluate, in a flexibility report."""
    rounded, before = list[bool](), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(MeanColour, "layers", lambda self, images_BHW3: rounded.append(torch.backends.cudnn.allow_tf32))
    try:
        torch.backends.cudnn.allow_tf32 = True
        MeanColour().images(torch.ones(1, 2, 2, 3, dtype=torch.uint8))
        assert rounded == [False] and torch.backends.cudnn.allow_tf32, "others go on as before"
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_features_do_not_depend_on_the_batch_and_faults_are_named(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(1, 256, (5, 4, 4, 3), dtype=np.uint8)
    write_batch(str(tmp_path / "good.npz"), iter(pixels), 5, (4, 4))
    images = find_images(str(tmp_path / "good.npz"))
    made = [part_features(images, images.parts[0], MeanColour(), batch) for batch in (2, 5)]
    assert made[0].data == made[1].data and (made[0].images, made[0].side, made[0].layers) == (5, (4, 4), ("pooled",))
    with np.load(io.BytesIO(made[0].data)) as arrays:
        np.testing.assert_allclose(arrays["pooled"], pixels.mean((1, 2)), rtol=1e-6)
    pixels[3] = 0
    write_batch(str(tmp_path / "black.npz"), iter(pixels), 5, (4, 4))
    black = find_images(str(tmp_path / "black.npz"))
    with pytest.raises(UserError, match=r"black\.npz: the features of image 3 are no numbers"):
        part_features(black, black.parts[0], MeanColour(), 2)
