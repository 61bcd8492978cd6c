"""Which files are data, for all who read folders, prefixes and tars: one rule, links followed, and what is passed over noted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oar_scale.data.data_files import BROKEN_LINKS, READ_BEFORE, SECOND_LINKS, UNREADABLE, files_below, is_data, walk, which_are_data
from oar_scale.data.notes import NO_DATA, Notes

JUNK = (
    *("._cat.jpg", "a/._cat.jpg", ".DS_Store", ".git/x.jpg", "a/.cache/x.jpg", ".nfs0001", "./.x.jpg", "..x.jpg"),
    *(
        "Thumbs.db",
        "a/THUMBS.DB",
        "desktop.ini",
        "a/Desktop.ini",
        "__MACOSX/cat.jpg",
        "a/__macosx/cat.jpg",
        "$RECYCLE.BIN/1.jpg",
        "@eaDir/1.jpg",
        "#recycle/1.jpg",
        "a/@Recycle/1.jpg",
        "#snapshot/1.jpg",
        ".Trashes/1.jpg",
        "System Volume Information/1.jpg",
    ),
    *("lost+found/1.jpg", "ehthumbs_vista.db", "x.incomplete", "x_.gstmp", "~$list.xlsx", "cat.jpg~", "#cat.txt#", "a/#cat.txt#"),
    *("0.tar.part", "0.tar.PARTIAL", "0.jpg.crdownload", "0.jpg.download", "0.jpg.tmp", "0.txt.swp", "0.tar.aria2", "0.tar.filepart"),
)
DATA = (
    *("cat.jpg", "./cat.jpg", "a/./b.jpg", "a.b/c.d.jpg", "c~1.jpg", "a#1.jpg", "#1.jpg", "part.jpg", "a.part/b.jpg", "x..jpg"),
    *("thumbs.db.jpg", "Thumbs/1.jpg", "macosx/1.jpg", "MACOSX.jpg", "__meta__/x.txt", "tmp/1.jpg", "download/1.jpg", "größe.png"),
)


@pytest.mark.parametrize("name", JUNK)
def test_what_other_programs_leave_is_no_data(name: str) -> None:
    assert not is_data(name) and which_are_data(["a.jpg", name]) == [True, False]


@pytest.mark.parametrize("name", DATA)
def test_what_people_name_is_data(name: str) -> None:
    assert is_data(name)


@given(st.lists(st.text(st.sampled_from("._~#$@/AaTthumbsdbDSmacosxpartwn+"), max_size=12)))
@example(["A/.x"])
@example(["", "x.SWP"])
def test_the_quick_search_misses_nothing(names: list[str]) -> None:
    """Many names at once are judged as each by itself."""
    assert (which_are_data(names) or [True] * len(names)) == [is_data(name) for name in names]


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def test_links_are_followed_and_each_folder_read_once(tmp_path: Path) -> None:
    """Linked folders and files count; a link upwards is no loop, a second link to a folder adds nothing, a broken one is noted."""
    root, other = tmp_path / "root", tmp_path / "other"
    for path in ("root/a/1.jpg", "root/z/2.jpg", "other/3.jpg", "other/deep/4.jpg", "file/5.jpg"):
        put(tmp_path / path)
    put(root / "x.part/7.jpg")
    (root / "linked").symlink_to(other)
    (root / "again").symlink_to(other)
    (root / "a/up").symlink_to(root)
    (root / "before-z").symlink_to(root / "z")
    (root / "self").symlink_to("self")
    (root / "6.jpg").symlink_to(tmp_path / "file/5.jpg")
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (other / "back").symlink_to(root)
    notes = Notes()
    found = files_below(str(root), notes)
    assert found == ["6.jpg", "a/1.jpg", "again/3.jpg", "again/deep/4.jpg", "x.part/7.jpg", "z/2.jpg"]
    record = notes.record()
    assert record[BROKEN_LINKS] == {"count": 2, "examples": ["gone.jpg", "self"]}
    assert record[READ_BEFORE]["count"] == 4


def test_a_linked_file_counts_once(tmp_path: Path) -> None:
    """Under its own path where that is read; where its own name is none of a picture (the blobs of a download cache), under one link."""
    for name in ("root/a/1.jpg", "blobs/x", "root/a/y"):
        put(tmp_path / name)
    for name, target in {"2.jpg": "root/a/1.jpg", "3.jpg": "blobs/x", "b/4.jpg": "blobs/x", "5.jpg": "root/a/y"}.items():
        (tmp_path / "root" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "root" / name).symlink_to(tmp_path / target)
    notes = Notes()
    found = sorted(walk(str(tmp_path / "root"), notes, lambda name: name.endswith(".jpg")))
    assert found == ["3.jpg", "5.jpg", "a/1.jpg", "a/y"]
    assert notes.record()[SECOND_LINKS] == {"count": 2, "examples": ["2.jpg", "b/4.jpg"]}


def test_the_folder_that_was_named_may_be_hidden_or_a_link(tmp_path: Path) -> None:
    put(tmp_path / ".cache/photos/1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / ".cache/photos")
    assert files_below(str(tmp_path / ".cache/photos"), Notes()) == files_below(str(tmp_path / "link"), Notes()) == ["1.jpg"]


def test_folders_and_prefixes_follow_one_rule(tmp_path: Path, s3_root: str) -> None:
    from foreign_shards import upload

    for name in ("0.tar", "._0.tar", "a/1.tar", "__MACOSX/2.tar", "3.tar.part", ".x/4.tar"):
        put(tmp_path / "d" / name)
    local, remote = Notes(), Notes()
    prefix = upload(tmp_path / "d", f"{s3_root}/junk")
    assert files_below(str(tmp_path / "d"), local) == files_below(prefix, remote) == ["0.tar", "a/1.tar"]
    assert (local.record()[NO_DATA]["count"], remote.record()[NO_DATA]["count"]) == (4, 4)


def test_a_folder_that_may_not_be_read_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "closed/1.jpg")
    put(tmp_path / "2.jpg")
    plain = os.scandir

    def refuse(path: str) -> Any:  # root, who may run this, may read everything
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return plain(path)

    monkeypatch.setattr(os, "scandir", refuse)
    notes = Notes()
    assert files_below(str(tmp_path), notes) == ["2.jpg"] and notes.record()[UNREADABLE]["examples"] == ["closed/"]
