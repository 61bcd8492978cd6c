"""Folders as they really lie on people's disks: junk of other programs, links, endings in capitals, classes that hold nothing."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from foreign_shards import picture
from PIL import Image
from pydantic import TypeAdapter

from oar_scale.config.schema import DataConfig, Source
from oar_scale.data.notes import NO_DATA, SEVERAL_FORMATS, Notes
from oar_scale.data.prepare import prepare_images
from oar_scale.data.scan import scan_shard
from oar_scale.data.sources import BadImage, Content, ImageSource, open_source
from oar_scale.data.sources.image_files import ALONE

APPLE = bytes.fromhex("00051607") + b"\0\2\0\0Mac OS X        " + bytes(90)
"""What macOS writes beside each file on a disk of another system."""


def opened(**fields: Any) -> ImageSource:
    source: Source = TypeAdapter(Source).validate_python(fields)
    return open_source(source)


def contents(source: ImageSource) -> dict[str, Content | str]:
    """Every image by name, or its fault."""
    found: dict[str, Content | str] = {}
    for image in source.images():
        try:
            found[image.name] = image.read(8)
        except BadImage as fault:
            found[image.name] = str(fault)
    return found


def put(path: Path, data: bytes | str = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def image_and_text(stem: Path, ending: str = "jpg") -> None:
    put(stem.with_name(f"{stem.name}.{ending}"), picture(0))
    put(stem.with_name(f"{stem.name}.txt"), f"caption of {stem.name}")


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_a_folder_copied_by_a_mac_gives_its_pictures_and_no_more(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        image_and_text(tmp_path / name)
        put(tmp_path / f"{Path(name).parent}/._{Path(name).name}.jpg", APPLE)
    put(tmp_path / "__MACOSX/._a.jpg", APPLE)
    put(tmp_path / ".DS_Store", APPLE)
    source = opened(type="folder", path=str(tmp_path))
    assert set(contents(source)) == {"a", "b/c"}
    assert source.notes.record()[NO_DATA]["count"] == 4, "two beside the pictures, one folder, one .DS_Store"


def test_class_folders_copied_by_a_mac_keep_their_labels(tmp_path: Path) -> None:
    for name in ("apple", "pear"):
        put(tmp_path / name / "1.JPEG", picture(0))
        put(tmp_path / name / "._1.JPEG", APPLE)
    put(tmp_path / "__MACOSX/apple/._1.JPEG", APPLE)
    labels = {name: content.metadata["label"] for name, content in contents(opened(type="class_folders", path=str(tmp_path))).items()}
    assert labels == {"apple/1": 0, "pear/1": 1}


def test_a_class_without_images_gets_no_number_and_is_named(tmp_path: Path) -> None:
    for name in ("ant", "cat", "dog"):
        put(tmp_path / name / "1.jpg", picture(0))
    put(tmp_path / "bee/readme.txt", "no pictures yet")
    (tmp_path / "cow").mkdir()
    put(tmp_path / "loose.jpg", picture(0))
    source = opened(type="class_folders", path=str(tmp_path))
    assert {name: content.metadata["label"] for name, content in contents(source).items()} == {"ant/1": 0, "cat/1": 1, "dog/1": 2}
    assert source.notes.record()["folders without images, which get no label"] == {"count": 2, "examples": ["bee/", "cow/"]}
    assert "images that lie in no class folder, left out" in source.notes.record()


def test_linked_classes_count_and_two_links_to_one_do_not(tmp_path: Path) -> None:
    put(tmp_path / "disk/cats/1.jpg", picture(0))
    put(tmp_path / "train/dog/1.jpg", picture(0))
    (tmp_path / "train/cat").symlink_to(tmp_path / "disk/cats")
    (tmp_path / "train/kitten").symlink_to(tmp_path / "disk/cats")
    source = opened(type="class_folders", path=str(tmp_path / "train"))
    assert {name: content.metadata["label"] for name, content in contents(source).items()} == {"cat/1": 0, "dog/1": 1}
    assert "folders without images, which get no label" in source.notes.record()


def test_linked_folders_and_shards_are_read(tmp_path: Path) -> None:
    image_and_text(tmp_path / "disk/a")
    image_and_text(tmp_path / "photos/b")
    (tmp_path / "photos/more").symlink_to(tmp_path / "disk")
    assert set(contents(opened(type="folder", path=str(tmp_path / "photos")))) == {"b", "more/a"}
    put(tmp_path / "other/1.tar", tar_of({"x.jpg": picture(0), "x.txt": b"x"}))
    put(tmp_path / "shards/0.tar", tar_of({"y.jpg": picture(0), "y.txt": b"y"}))
    (tmp_path / "shards/linked").symlink_to(tmp_path / "other")
    assert set(contents(opened(type="webdataset", url=str(tmp_path / "shards")))) == {"0/y", "linked/1/x"}


def test_a_pipe_beside_a_picture_makes_a_bad_sample(tmp_path: Path) -> None:
    image_and_text(tmp_path / "a")
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    assert list(contents(opened(type="folder", path=str(tmp_path))).values()) == ["its .txt cannot be read (no regular file)"]


def test_junk_beside_and_inside_shards_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "0.tar", tar_of({"._a.jpg": APPLE, "a.jpg": picture(0), "._a.txt": APPLE, "a.txt": b"a", "Thumbs.db": b"x"}))
    put(tmp_path / "._0.tar", APPLE)
    source = opened(type="webdataset", url=str(tmp_path))
    assert [content.caption for content in contents(source).values() if isinstance(content, Content)] == ["a"]
    assert source.notes.record()[NO_DATA]["count"] == 4


def test_endings_in_capitals_are_endings(tmp_path: Path) -> None:
    put(tmp_path / "photos/A.JPG", picture(0))
    put(tmp_path / "photos/A.txt", "a")
    put(tmp_path / "shards/0.TAR", tar_of({"x.JPG": picture(0), "x.TXT": b"x"}))
    assert set(contents(opened(type="folder", path=str(tmp_path / "photos")))) == {"A"}
    assert set(contents(opened(type="webdataset", url=str(tmp_path / "shards")))) == {"0/x"}
    assert set(contents(opened(type="webdataset", url=str(tmp_path / "shards/0.TAR")))) == {"0/x"}


def test_pictures_of_other_formats_are_left_out_with_a_word(tmp_path: Path) -> None:
    image_and_text(tmp_path / "a")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.GIF")
    source = opened(type="folder", path=str(tmp_path))
    assert set(contents(source)) == {"a"}
    assert source.notes.record() == {"pictures that are not .png, .jpg, .jpeg, .webp, left out": {"count": 1, "examples": ["b.GIF"]}}


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    image_and_text(tmp_path / "photos/a")
    put(tmp_path / "photos/a.json", "{}")
    for name in ("b.jpg.1", "c", "list.parquet"):
        put(tmp_path / "photos" / name)
    source = opened(type="folder", path=str(tmp_path / "photos"))
    assert set(contents(source)) == {"a"}
    assert source.notes.record() == {"files of other kinds, left out": {"count": 3, "examples": ["b.jpg.1", "c", "list.parquet"]}}
    put(tmp_path / "shards/0.tar", tar_of({"x.jpg": picture(0), "x.txt": b"x"}))
    put(tmp_path / "shards/1.tar.gz")
    notes = opened(type="webdataset", url=str(tmp_path / "shards")).notes.record()
    assert notes == {"archives that are no plain .tar, left out": {"count": 1, "examples": ["1.tar.gz"]}}


def test_what_has_no_picture_or_several_is_named(tmp_path: Path) -> None:
    image_and_text(tmp_path / "photos/a")
    image_and_text(tmp_path / "texts/a")
    for name in ("photos/b.txt", "photos/c.d.features.npy", "texts/gone.TXT", "photos/a.features.npy"):
        put(tmp_path / name, "x")
    (tmp_path / "texts/a.jpg").unlink()
    for given in ({}, {"captions": str(tmp_path / "texts")}):
        source = opened(type="folder", path=str(tmp_path / "photos"), **given)
        assert set(contents(source)) == {"a"}
        examples = ["b.txt", "c.d.features.npy", *(["gone.TXT"] if given else [])]
        assert source.notes.record() == {ALONE: {"count": len(examples), "examples": examples}}
    members = {
        "x.jpg": picture(0),
        "x.png": picture(1),
        "x.txt": b"x",
        "README": b"",
        "y.jpg": picture(0),
        "y.txt": b"y",
        "z.png": picture(0),
    }
    put(tmp_path / "shards/0.tar", tar_of(members))
    source = opened(type="webdataset", url=str(tmp_path / "shards"))
    assert len(contents(source)) == 3
    assert {reason: note["count"] for reason, note in source.notes.record().items()} == {NO_DATA: 1, SEVERAL_FORMATS: 1}
    assert scan_shard(str(tmp_path / "shards/0.tar")).notes.keys() == {NO_DATA, SEVERAL_FORMATS}


def test_what_was_passed_over_is_in_the_notes_of_the_stage(tmp_path: Path) -> None:
    for number in range(20):
        image_and_text(tmp_path / f"photos/{number}")
        put(tmp_path / f"photos/._{number}.jpg", APPLE)
    notes = Notes()
    source: Source = TypeAdapter(Source).validate_python({"type": "folder", "path": str(tmp_path / "photos")})
    prepare_images(DataConfig(source=source, image_size=8, heldout_fraction=0.3), str(tmp_path / "images"), notes=notes)
    assert notes.line() == f"left out or changed: 20 {NO_DATA} (._0.jpg, ._1.jpg, ._10.jpg, ...)"
    assert json.dumps(notes.record())


@pytest.mark.parametrize("verb", ["index", "verify", "stats"])
def test_commands_say_what_they_passed_over(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from oar_scale.cli import main

    put(tmp_path / "0.tar", tar_of({"a.jpg": picture(0), "a.txt": b"a", "._b.jpg": APPLE}))
    put(tmp_path / "._0.tar", APPLE)
    assert main(["data", "index", str(tmp_path)]) == 0
    if verb != "index":
        capsys.readouterr()
        assert main(["data", verb, str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("left out or changed: ") and "._b.jpg" in last
