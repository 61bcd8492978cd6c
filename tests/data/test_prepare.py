"""Captioned images into shards, with the bad ones named."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from oar_scale.config.schema import DataConfig, FolderSource, OpenMojiSource, TableSource
from oar_scale.data.manifest import ShardInfo, read_manifest
from oar_scale.data.notes import Notes
from oar_scale.data.prepare import AHEAD, prepare_images
from oar_scale.data.shards import identity, iterate_shard, read_shard, write_shard
from oar_scale.data.sources.image_files import square
from oar_scale.errors import UserError
from oar_scale.storage import join


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """30 good pictures, one without a caption, one that is no picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(30):
        Image.new("RGB", (40, 20), (8 * index, 100, 50)).save(folder / f"good{index}.png")
        (folder / f"good{index}.txt").write_text(f"picture {index}")
    Image.new("RGB", (40, 20)).save(folder / "silent.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff this is not a jpeg")
    (folder / "broken.txt").write_text("broken")
    return folder


def config(folder: Path, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {"source": FolderSource(type="folder", path=str(folder)), "heldout_fraction": 0.3, "max_bad_fraction": 0.1}
    return DataConfig(**{**settings, "samples_per_shard": 8, "canonical_streams": 2, **changes})


def key_of(name: str) -> str:
    return f"{name.replace('.', '-')}-{zlib.crc32(name.encode()):08x}"


def test_similar_names_stay_different_images(pictures: Path, tmp_path: Path) -> None:
    """Names that differ in a few characters stay different images."""
    for name in ("a b", "a-b", "\u732b", "\u72ac"):
        Image.new("RGB", (8, 8)).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(name)
    manifests = prepare_images(config(pictures), str(tmp_path / "images"))
    assert sum(m.samples for m in manifests.values()) == 34


def test_bad_samples_are_skipped_and_named(pictures: Path, tmp_path: Path) -> None:
    notes = Notes()
    manifests = prepare_images(config(pictures), str(tmp_path / "images"), notes=notes)
    assert sum(m.samples for m in manifests.values()) == 30
    skipped = read_manifest(str(tmp_path / "images" / "train")).skipped
    assert skipped[key_of("silent.png")] == "no caption"
    assert "cannot be read" in skipped[key_of("broken.jpg")]
    noted = notes.record()["bad samples, left out"]
    assert noted["count"] == 2 and f"{key_of('silent.png')}: no caption" in noted["examples"]


def test_a_bad_sample_stops_the_stage_where_the_recipe_says_so(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(silent|broken).*on_bad_sample: skip"):
        prepare_images(config(pictures, on_bad_sample="fail"), str(tmp_path / "images"))
    assert not (tmp_path / "images" / "train" / "manifest.json").exists()


def test_too_many_bad_samples_stop_the_stage(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"images are bad, more than data\.max_bad_fraction = 0\.01 of all 32\.\nThe first: (silent|broken)"
    ):
        prepare_images(config(pictures, max_bad_fraction=0.01), str(tmp_path / "images"))


def test_a_name_keeps_its_split_when_images_are_added(pictures: Path, tmp_path: Path) -> None:
    """A name stays on its side of the split when images are added."""

    def heldout(folder: str) -> set[str]:
        prepare_images(config(pictures), folder)
        held = join(folder, "heldout")
        return {s["__key__"] for shard in read_manifest(held).shards for s in read_shard(join(held, shard.name), folder, shard)}

    before = heldout(str(tmp_path / "before"))
    for index in range(30, 40):
        Image.new("RGB", (40, 20)).save(pictures / f"good{index}.png")
        (pictures / f"good{index}.txt").write_text(f"picture {index}")
    after = heldout(str(tmp_path / "after"))
    assert 0 < len(before) < 30
    assert before == {key for key in after if int(key.removeprefix("good").split("-")[0]) < 30}


def split_names(folder: Path, split: str) -> set[tuple[str, str]]:
    """Name and family of each image of a split."""
    manifest = read_manifest(str(folder / split))
    samples = (s for shard in manifest.shards for s in read_shard(str(folder / split / shard.name), str(folder), shard))
    return {identity(json.loads(sample["json"])) for sample in samples}


def family_table(folder: Path) -> TableSource:
    """40 families of three variants, each variant with a name of its own, and 10 pictures without a family."""
    rows = [(f"v{index}.png", f"hand {index}", f"family {index // 3}" if index < 120 else "") for index in range(130)]
    for name, _, _ in rows:
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / name)
    lines = ["image,caption,name,family", *(f"{name},a hand,{title},{family}" for name, title, family in rows)]
    (folder / "table.csv").write_text("\n".join(lines))
    return TableSource(type="table", path=str(folder / "table.csv"), name="name", family="family")


def test_split_by_family_leaves_no_variant_of_a_held_out_image_in_training(tmp_path: Path) -> None:
    source = family_table(tmp_path)
    by_name = DataConfig(source=source, heldout_fraction=0.2, test_fraction=0.2, canonical_streams=2)
    by_family = by_name.model_copy(update={"split_by": "family"})
    for settings, folder, leaks in ((by_name, tmp_path / "name", True), (by_family, tmp_path / "family", False)):
        manifests = prepare_images(settings, str(folder))
        assert set(manifests) == {"train", "heldout", "test"}
        names = {split: split_names(folder, split) for split in manifests}
        assert sum(map(len, names.values())) == 130 and all(names.values())
        families = {split: {family for _, family in each} - {""} for split, each in names.items()}
        for split, other in (("heldout", "train"), ("test", "train"), ("heldout", "test")):
            assert bool(families[split] & families[other]) is leaks
        assert (manifests["heldout"].with_variant_in_train > 0) is leaks and (manifests["test"].with_variant_in_train > 0) is leaks


def test_a_test_split_takes_no_image_from_the_held_out_ones(tmp_path: Path) -> None:
    source = family_table(tmp_path)
    for folder, fraction in (("without", 0.0), ("with", 0.3)):
        prepare_images(DataConfig(source=source, heldout_fraction=0.2, test_fraction=fraction, canonical_streams=2), str(tmp_path / folder))
    assert split_names(tmp_path / "with", "heldout") == split_names(tmp_path / "without", "heldout")
    assert not (tmp_path / "without" / "test").exists()


@pytest.mark.parametrize(("heldout", "test"), [(0.5, 0.5), (0.7, 0.3), (0.9, 0.2)])
def test_splits_that_leave_nothing_to_train_on_are_refused(heldout: float, test: float) -> None:
    with pytest.raises(ValidationError, match="leave nothing to train on"):
        DataConfig(heldout_fraction=heldout, test_fraction=test)


def test_the_same_images_give_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    one, two = (prepare_images(config(pictures), str(tmp_path / name)) for name in ("one", "two"))
    assert one["train"].fingerprint == two["train"].fingerprint


def digest(folder: Path) -> str:
    """Of all samples of both splits in the order of the shards, the pictures as pixels: compressors may differ."""
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*.tar")):
        for sample in iterate_shard(str(path), str(path)):
            pixels = Image.open(io.BytesIO(sample["png"])).tobytes()
            fields = [str(path.relative_to(folder)).encode(), sample["__key__"].encode(), sample["txt"], sample["json"], pixels]
            hasher.update(b"\n".join(fields))
    return hasher.hexdigest()


@pytest.mark.parametrize("threads", [1, 7])
def test_shards_are_those_of_every_earlier_version(tmp_path: Path, threads: int) -> None:
    """Weights and order tables of older runs belong to them."""
    settings = DataConfig(source=OpenMojiSource(limit=96), heldout_fraction=0.25, samples_per_shard=16, prepare_threads=threads)
    manifests = prepare_images(settings, str(tmp_path))
    assert [shard.samples for shard in manifests["train"].shards] == [16, 16, 16, 16, 7]
    assert manifests["heldout"].with_variant_in_train == 0
    assert digest(tmp_path) == "82f544b5c4310cca47aebdb40ab782e6e83d7a5217574dace35156445c2fa0af"


def test_memory_is_a_shard_of_each_split_and_a_few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is in memory than a shard of each split and a few images."""
    folder, read, kept = tmp_path / "pictures", 0, 0
    folder.mkdir()
    for index in range(300):
        Image.new("RGB", (8, 8), (index % 255, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a square")
    peak = 0

    def counted_read(path: str, size: int) -> Image.Image:
        nonlocal read
        read += 1
        return square(path, size)

    def counted_write(folder: str, name: str, samples: list[dict[str, Any]]) -> ShardInfo:
        nonlocal kept, peak
        peak = max(peak, read - kept)
        kept += len(samples)
        return write_shard(folder, name, samples)

    monkeypatch.setattr("oar_scale.data.sources.folder.square", counted_read)
    monkeypatch.setattr("oar_scale.data.prepare.write_shard", counted_write)
    progress: list[tuple[int, int]] = []
    prepare_images(config(folder, prepare_threads=2), str(tmp_path / "images"), lambda *images: progress.append(images))
    assert kept == 300
    assert peak <= 2 * 8 + (AHEAD + 1) * 2
    assert (progress[0], progress[-1]) == ((0, 300), (300, 300)) and progress == sorted(progress)


def test_many_bad_samples_stop_the_stage_long_before_the_end(pictures: Path, tmp_path: Path) -> None:
    for index in range(200):
        (pictures / f"bad{index}.png").write_bytes(b"no picture")
        (pictures / f"bad{index}.txt").write_text("bad")
    with pytest.raises(UserError, match=r"of all 232") as stopped:
        prepare_images(config(pictures, samples_per_shard=2), str(tmp_path / "images"))
    assert int(str(stopped.value).split()[1]) < 100


def test_two_images_of_one_key_are_named_before_any_is_read(tmp_path: Path) -> None:
    table = tmp_path / "twice.csv"
    table.write_text("image,caption\na.png,a cat\na.png,a dog\n")
    with pytest.raises(UserError, match=r"1 keys stand for more than one image, e\.g\. 'a-png-.* for 2: 'a'\.\n.*leave one row"):
        prepare_images(DataConfig(source=TableSource(type="table", path=str(table))), str(tmp_path / "images"))


def test_openmoji_drawings_are_named_and_drawn(tmp_path: Path) -> None:
    settings = DataConfig(source=OpenMojiSource(limit=40), heldout_fraction=0.2, samples_per_shard=64)
    manifests = prepare_images(settings, str(tmp_path))
    assert sum(m.samples for m in manifests.values()) == 40
    assert "CC BY-SA 4.0" in manifests["train"].attribution
    sample = read_shard(str(tmp_path / "train" / "00000.tar"), str(tmp_path))[0]
    assert sample["txt"].decode().strip() and sample["png"].startswith(b"\x89PNG")


def test_an_empty_or_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        prepare_images(config(tmp_path / "nowhere"), str(tmp_path / "images"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no image in it"):
        prepare_images(config(tmp_path / "empty"), str(tmp_path / "images"))
