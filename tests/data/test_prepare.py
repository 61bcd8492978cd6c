"""Captioned images into shards, with the bad ones named."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from oar_scale.config.schema import DataConfig, FolderSource, OpenMojiSource
from oar_scale.data.manifest import read_manifest
from oar_scale.data.prepare import prepare_images
from oar_scale.data.shards import read_shard
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


def test_names_that_differ_in_a_few_characters_stay_different_images(pictures: Path, tmp_path: Path) -> None:
    for name in ("a b", "a-b", "\u732b", "\u72ac"):
        Image.new("RGB", (8, 8)).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(name)
    manifests = prepare_images(config(pictures), str(tmp_path / "images"))
    assert sum(m.samples for m in manifests.values()) == 34


def test_bad_samples_are_skipped_and_named(pictures: Path, tmp_path: Path) -> None:
    manifests = prepare_images(config(pictures), str(tmp_path / "images"))
    assert sum(m.samples for m in manifests.values()) == 30
    skipped = read_manifest(str(tmp_path / "images" / "train")).skipped
    assert skipped[key_of("silent.png")] == "no caption"
    assert "cannot be read" in skipped[key_of("broken.jpg")]


def test_a_bad_sample_stops_the_stage_where_the_recipe_says_so(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(silent|broken).*on_bad_sample: skip"):
        prepare_images(config(pictures, on_bad_sample="fail"), str(tmp_path / "images"))
    assert not (tmp_path / "images" / "train" / "manifest.json").exists()


def test_too_many_bad_samples_stop_the_stage(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 of 32 images are bad.*max_bad_fraction = 0.01"):
        prepare_images(config(pictures, max_bad_fraction=0.01), str(tmp_path / "images"))


def test_a_name_stays_on_its_side_of_the_split_when_images_are_added(pictures: Path, tmp_path: Path) -> None:
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


def test_the_same_images_give_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    one, two = (prepare_images(config(pictures), str(tmp_path / name)) for name in ("one", "two"))
    assert one["train"].fingerprint == two["train"].fingerprint


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
