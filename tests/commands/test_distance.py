"""``oar distance``: from two sets to figures, files and errors. The parts are computed in this process; the pool has tests of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oar_scale.cli import main
from oar_scale.commands import distance
from oar_scale.evaluation.adm_batch import read_batch, read_statistics, write_batch
from oar_scale.evaluation.distances import frechet
from oar_scale.evaluation.extractors import ExtractorSpec, load_extractor
from oar_scale.shard_pool import PoolReport
from oar_scale.shard_pool.feature_pool import FeatureJob, FeatureWorker, SetFeatures, gathered
from oar_scale.storage import open_storage

pytest.importorskip("efficientnet_lite_pytorch")
SIDE = 8


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compute(job: FeatureJob, **_: object) -> SetFeatures:
        worker, report = FeatureWorker(job), PoolReport()
        for part in job.images.parts:
            output = worker.run(part.name, lambda: None)
            open_storage(output.uri).write(output.uri, output.data)
            report.done[part.name] = output.result
        return gathered(job, report)

    monkeypatch.setattr(distance, "compute_features", compute)
    monkeypatch.setattr(distance.os, "cpu_count", lambda: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    """14 bright and 12 dark images, as ADM batches."""
    paths = []
    for name, count, darker in (("bright", 14, 1), ("dark", 12, 2)):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8) // darker
        write_batch(str(tmp_path / f"{name}.npz"), iter(pixels.astype(np.uint8)), count, (SIDE, SIDE))
        paths.append(str(tmp_path / f"{name}.npz"))
    return paths


def test_figures_are_printed_and_written_with_their_counts(sets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    assert main(["distance", *sets, "--out", str(out)]) == 0
    record, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert list(record["figures"]) == [f"{name}_efflite0" for name in ("fd", "kid", "precision", "recall", "density", "coverage")]
    assert record["samples"] == {"where": sets[0], "images": 14, "pixels": [SIDE, SIDE]}
    assert record["features"]["id"].startswith("efflite0, weights shipped")
    equal = record["figures"]["fd_efflite0"]["equal_sizes"]
    assert f"; of 6 images a side: {equal['samples']:.4f}, two halves of the reference {equal['halves_of_reference']:.4f})" in shown
    assert re.search(r"precision_efflite0 0\.\d{4} \[0\.\d{4}, 0\.\d{4}\]", shown)
    assert "dark.npz has 12 images for 1280 features, so its covariance is singular" in shown


def test_a_cache_named_by_a_relative_path_is_the_same_folder_to_all_actors(
    sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a cluster (RAY_ADDRESS) work in the folder in which its Ray was started."""
    caches, compute = list[str](), distance.compute_features

    def noted(job: FeatureJob, *, actors: int | None, **others: Any) -> SetFeatures:
        caches.append(job.cache)
        return compute(job, actors=actors, **others)

    monkeypatch.setattr(distance, "compute_features", noted)
    monkeypatch.chdir(tmp_path)
    assert main(["distance", *sets, "--metrics", "fd", "--cache", "features"]) == 0
    assert caches == [str(tmp_path / "features")] * 2


def test_statistics_of_the_reference_stand_for_its_images(sets: list[str], tmp_path: Path) -> None:
    statistics = str(tmp_path / "statistics.npz")
    assert main(["distance", sets[1], "--export-statistics", statistics]) == 0
    found = read_statistics(statistics)
    assert found is not None and found.count == 12
    values = []
    for samples, reference in ((sets[0], statistics), (sets[0], sets[1])):
        assert main(["distance", samples, reference, "--metrics", "fd", "--out", str(tmp_path / "a.json")]) == 0
        values.append(json.loads((tmp_path / "a.json").read_text())["figures"]["fd_efflite0"]["value"])
    assert values[0] == pytest.approx(values[1], abs=1e-4) and values[1] > 1


def test_pairs_of_what_has_no_images_are_one_error(sets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics = str(tmp_path / "statistics.npz")
    assert main(["distance", sets[1], "--export-statistics", statistics]) == 0
    alone = f"{statistics} holds statistics alone"
    for compared, why in (([sets[0]], "there is no reference"), ([sets[0], statistics], alone), ([statistics, sets[0]], alone)):
        capsys.readouterr()
        assert main(["distance", *compared, "--paired", "name"]) == 2
        shown = capsys.readouterr()
        assert f"--paired name: only kid leaves pairs out, and it compares the images of two sets; {why}" in shown.err
        assert not shown.out, "features were computed first"


def test_the_distance_is_that_of_the_features_by_hand(sets: list[str], tmp_path: Path) -> None:
    import torch

    extractor, features = load_extractor(ExtractorSpec()), []
    for path in sets:
        batch = read_batch(path)
        assert batch is not None
        features.append(extractor.images(torch.from_numpy(batch.rows(0, 12).copy()))["pooled"].numpy())
    write_batch(str(tmp_path / "twelve.npz"), iter(read_batch(sets[0]).rows(0, 12)), 12, (SIDE, SIDE))  # type: ignore[union-attr]
    assert main(["distance", str(tmp_path / "twelve.npz"), sets[1], "--metrics", "fd", "--out", str(tmp_path / "a.json")]) == 0
    figure = json.loads((tmp_path / "a.json").read_text())["figures"]["fd_efflite0"]
    assert figure["value"] == pytest.approx(frechet(*features), rel=1e-3)


def test_a_folder_of_images_becomes_a_batch(sets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    batch = read_batch(sets[0])
    assert batch is not None
    (tmp_path / "folder").mkdir()
    for index, pixels in enumerate(batch.rows(0, 14)):
        Image.fromarray(pixels).save(tmp_path / "folder" / f"{index:03d}.png")
    export = ["distance", str(tmp_path / "folder"), "--export-npz", str(tmp_path / "again.npz")]
    assert main([*export, "--out", str(tmp_path / "figures.json")]) == 2
    assert "nothing can be measured of it without a reference" in capsys.readouterr().err  # figures were asked for as well
    assert main(export) == 0
    assert "again.npz: 14 images" in capsys.readouterr().out
    again = read_batch(str(tmp_path / "again.npz"))
    assert again is not None
    np.testing.assert_array_equal(again.rows(0, 14), batch.rows(0, 14))


def test_a_figure_without_the_reference_it_needs_is_refused_before_features_are_computed(
    sets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distance", sets[0], "--metrics", "kid"]) == 2
    shown = capsys.readouterr()
    assert "--metrics kid: it compares samples with a reference" in shown.err and "images" not in shown.out
    assert main(["distance", sets[0], "--paired", "name", "--export-npz", "new.npz"]) == 2
    assert (
        "--paired name: only kid leaves pairs out, and it compares the images of two sets; there is no reference" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--metrics", "fid"], "only distances on InceptionV3 with its published weights are called so"),
        (["--metrics", "sfd"], "there are no spatial features"),
        (["--metrics", "clip"], "not every image has a caption"),
        (["--features", "inception"], "the weights are not shipped"),
        (["--weights", "x.pth"], "come with their weights"),
        (["--gpus-per-actor", "1"], "--gpus-per-actor means nothing without --actors"),
        (["--gpus-per-actor", "nan", "--actors", "1"], "--gpus-per-actor nan must be a number from 0"),
        (["--export-npz", "batch.zip"], r"batch.zip: name a file .npz"),
        (["--paired", "caption"], "--paired caption: 14 of 14 images of"),
        (["--paired", "name", "--metrics", "fd"], "only kid leaves pairs out"),
        (["--kept", "5"], "--kept 5: the figures need 6 images a side"),
    ],
)
def test_what_cannot_be_measured_is_one_error(options: list[str], says: str, sets: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distance", *sets, *options]) == 2
    assert says in capsys.readouterr().err


def test_sets_that_do_not_belong_together_are_one_error(sets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, three, adm = (str(tmp_path / f"{name}.npz") for name in ("small", "three", "adm"))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    write_batch(small, iter(pixels), 9, (4, 4))
    write_batch(three, iter(np.repeat(np.repeat(pixels[:3], 2, 1), 2, 2)), 3, (SIDE, SIDE))
    np.savez(adm, mu=np.zeros(2048), sigma=np.eye(2048))
    for reference, says in (
        (small, "are 8 x 8 pixels, those of"),
        (three, "three.npz has 3 images; precision_efflite0 needs 4"),
        (adm, "its statistics are of other features (the InceptionV3 that FID is defined with)"),
        (str(tmp_path / "nowhere"), "nowhere: no such folder"),
    ):
        assert main(["distance", sets[0], reference, "--metrics", "fd,precision"]) == 2
        shown = capsys.readouterr()
        assert says in shown.err
        assert ("14 images" in shown.out) == (reference in (small, three)), "features were computed for a reference that is none"
    assert main(["distance", sets[0], small, "--size", "4", "--metrics", "kid"]) == 0
    capsys.readouterr()
    assert main(["distance", three, sets[1]]) == 0
    shown = capsys.readouterr().out
    assert "fd_efflite0 " in shown and "coverage_efflite0 " in shown
    assert "note: " + three + " has 3 images; kid_efflite0 needs 4, recall_efflite0 needs 4: left out" in shown
    assert main(["distance", three, sets[1], "--paired", "name"]) == 2
    says = f"--paired name: only kid leaves pairs out, and it cannot be computed: {three} has 3 images; kid_efflite0 needs 4"
    assert says in capsys.readouterr().err
    assert main(["distance", sets[0], sets[0], "--paired", "name", "--metrics", "kid"]) == 0
    shown = capsys.readouterr().out
    assert "14 of 14 images are, pixel for pixel, images of the reference" in shown
    assert "(14 samples, 14 reference, pairs of one name left out)" in shown
    assert main(["distance", sets[0], sets[1], "--kept", "6", "--metrics", "fd,kid,density"]) == 0
    assert main(["distance", sets[0]]) == 2
    assert "nothing can be measured of it without a reference" in capsys.readouterr().err
