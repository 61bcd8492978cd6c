"""Features by a pool: the same bytes whoever computes them, resumed after a kill, from a folder and from S3."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from actors_here import pools_here

from oar_scale.errors import UserError
from oar_scale.evaluation.adm_batch import write_batch
from oar_scale.evaluation.extractors import ExtractorSpec
from oar_scale.evaluation.feature_files import FeatureFiles, feature_file, part_features
from oar_scale.evaluation.image_sets import ImageSet, find_images
from oar_scale.shard_pool import Ledger
from oar_scale.shard_pool.feature_pool import FeatureJob, FeatureWorker, compute_features
from oar_scale.storage import join, open_storage
from tests.evaluation.test_image_sets import folder_of_shards

pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Five images in two shards."""
    return find_images(str(folder_of_shards(tmp_path_factory.mktemp("set") / "shards")))


@pytest.fixture(scope="module")
def job(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> FeatureJob:
    """Whose features are computed."""
    job = FeatureJob(images, ExtractorSpec(), str(tmp_path_factory.mktemp("cache")), batch=2)
    with pools_here():
        compute_features(job, actors=1)
    return job


def stored(folder: str) -> dict[str, bytes]:
    return {name: open_storage(folder).read(join(folder, name)) for name in map(feature_file, ("00000.tar", "00001.tar"))}


@pytest.mark.usefixtures("shared_ray")
def test_actors_of_a_ray_compute_the_same_bytes(job: FeatureJob, tmp_path: Path) -> None:
    again = dataclasses.replace(job, cache=str(tmp_path))
    found = compute_features(again, actors=2)
    assert (found.computed, found.side, found.files.images) == (2, (6, 6), 5)
    assert stored(again.out) == stored(job.out)


@pytest.mark.usefixtures("pool_here")
def test_a_killed_pool_goes_on_to_the_same_bytes(job: FeatureJob, tmp_path: Path) -> None:
    """One part is done, and entered; of the other one the file is cut, as a full disk leaves it, and there is no entry."""
    whole = stored(job.out)
    again = dataclasses.replace(job, cache=str(tmp_path))
    worker = FeatureWorker(again)
    done = worker.run("00000.tar", lambda: None)
    assert done.data == whole["00000.npz"]
    compute_features(again, actors=1)
    Ledger(join(again.out, "ledger")).forget("00001.tar")
    (Path(again.out) / "00001.npz").write_bytes(whole["00001.npz"][:100])
    resumed = compute_features(again, actors=1)
    assert resumed.computed == 1 and stored(again.out) == whole
    before, after = FeatureFiles(job.out, resumed.files.counts, resumed.files.layers), resumed.files
    assert np.array_equal(before.moments("pooled").scatter_DD, after.moments("pooled").scatter_DD)


@pytest.mark.usefixtures("pool_here")
def test_a_set_is_computed_once_for_an_extractor(job: FeatureJob) -> None:
    assert compute_features(job, actors=1).computed == 0
    assert dataclasses.replace(job, images=dataclasses.replace(job.images, size=4)).out != job.out


@pytest.mark.usefixtures("pool_here")
def test_features_in_s3_are_those_of_a_folder(job: FeatureJob, s3_root: str) -> None:
    """The shards lie there, too."""
    for name in ("00000.tar", "00001.tar"):
        open_storage(s3_root).upload(str(Path(job.images.where) / name), join(s3_root, "shards", name))
    there = FeatureJob(find_images(join(s3_root, "shards")), ExtractorSpec(), join(s3_root, "cache"), batch=2)
    assert compute_features(there, actors=1).files.images == 5
    assert stored(there.out) == stored(job.out)


def test_images_of_several_sizes_are_refused_with_a_remedy(tmp_path: Path) -> None:
    rng, parts = np.random.default_rng(0), []
    for side in (4, 5):
        path = tmp_path / f"{side}.npz"
        write_batch(str(path), iter(rng.integers(0, 256, (3, side, side, 3), dtype=np.uint8)), 3, (side, side))
        parts.append(find_images(str(path)))
    from PIL import Image

    folder = tmp_path / "mixed"
    folder.mkdir()
    for index, images in enumerate(parts):
        for number, image in enumerate(images.read(images.parts[0])):
            Image.fromarray(image.pixels).save(folder / f"{index}{number}.png")
    mixed = find_images(str(folder))
    worker = FeatureWorker(FeatureJob(mixed, ExtractorSpec(), str(tmp_path / "cache")))
    with pytest.raises(UserError, match=r"10\.png is 5 x 5 pixels, others are 4 x 4\. .*--size N"):
        part_features(mixed, mixed.parts[0], worker.extractor, 4)
    sized = find_images(str(folder), size=4)
    assert part_features(sized, sized.parts[0], worker.extractor, 4).images == 6
