"""Text and labels as people's programs write them: read right, or counted as a bad sample; the same in every source."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from oar_scale.cli import main
from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import DataConfig, FolderSource, TableSource, WebDatasetSource
from oar_scale.data.labels import label_of
from oar_scale.data.notes import Notes
from oar_scale.data.open_shard import OpenShard, UnusableSample
from oar_scale.data.prepare import prepare_images
from oar_scale.data.scan import scan_shard
from oar_scale.data.shards import identity, read_shard
from oar_scale.data.sources.captions import CLEANED
from oar_scale.data.sources.class_folders import read_names
from oar_scale.data.views import make_view
from oar_scale.errors import UserError
from oar_scale.orders.order_table import OrderTable, join_orders, order_bytes, parse_orders
from oar_scale.storage import read_json, write_json
from oar_scale.text import NotText, clean_text, cut, decode_bytes, decode_text, shown

TEXT = "ein Käfer \U0001f600"
OTHER_LETTERS = [text.encode("utf-16-le") for text in ("Это кошка на ковре", "Η γάτα είναι εδώ", "החתול על השטיח", "القطة هنا")]
ENCODED = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "utf-16": TEXT.encode("utf-16"),
    "utf-16 big": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
    "utf-32 big": b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"),
}


@pytest.mark.parametrize("data", ENCODED.values(), ids=list(ENCODED))
def test_a_byte_order_mark_says_the_encoding_and_is_removed(data: bytes) -> None:
    assert decode_text(data) == decode_text(memoryview(data)) == TEXT


@pytest.mark.parametrize(
    "data", [TEXT.encode("latin-1", "replace"), TEXT.encode("utf-16-le"), b"\xff\xfe\0", b"\xed\xa0\xbd", b"\x89PNG\r\n", *OTHER_LETTERS]
)
def test_what_is_no_text_is_not_guessed_at(data: bytes) -> None:
    with pytest.raises(NotText, match="save it as UTF-8"):
        decode_text(data)


def test_line_ends_and_control_characters_become_plain() -> None:
    assert decode_text(b"one\r\ntwo\rthree\nfour\0five\x1b[31m\t\xc2\x85") == "one\ntwo\nthree\nfour five [31m\t "
    assert clean_text("\ud83d\ude00 and half of one: \ud83d") == "\U0001f600 and half of one: ?"


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\ufeff")))
def test_text_without_such_characters_is_not_changed(text: str) -> None:
    assert clean_text(text) == text == decode_text(text.encode())


@given(st.text(st.characters(max_codepoint=127), max_size=8))
def test_plain_text_is_read_the_same_at_once(text: str) -> None:
    """Most captions take the short way of :func:`decode_text`; it must give what the long one gives."""
    try:
        expected = clean_text(decode_bytes(text.encode()))
    except NotText:
        with pytest.raises(NotText):
            decode_text(text.encode())
    else:
        assert decode_text(text.encode()) == expected


def test_values_in_messages_are_short() -> None:
    for value in (b"\xff" * 10**6, "x" * 10**6, {"bytes": b"x" * 10**6}, [1] * 10**6, 10**4000, 3.5):
        assert len(shown(value)) <= 80
    assert len(cut("x" * 10**6 + "\n" * 10**4)) < 3000


ALIKE = [("true", 1), ("True", 1), ("FALSE\n", 0), (b"false", 0), ("-0", 0), ("-0.0", 0), (-0.0, 0), ("+3", 3), ("+3.0", 3)]
"""Written as programs write the numbers and truth values that Parquet and JSON have."""


@pytest.mark.parametrize(
    ("value", "label"),
    [(3, 3), (3.0, 3), ("3", 3), ("003", 3), (" 3.0\r\n", 3), (b"\xef\xbb\xbf3", 3), (True, 1), (0, 0), ("0", 0), *ALIKE],
)
def test_what_is_a_label(value: object, label: int) -> None:
    assert label_of(value) == label == label_of(value, 4) and type(label_of(value)) is int


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "no label"),
        (float("nan"), "no label"),
        ("nan", "no label"),
        (" ", "no label"),
        (-1, "its label -1 is below 0"),
        ("-1", "its label '-1' is no whole number"),
        (2.5, "its label 2.5 is no whole number"),
        (float("inf"), "its label inf is no whole number"),
        ("three", "its label 'three' is no whole number"),
        ("1e3", "no whole number"),
        ("٣", "no whole number"),
        ([3], "its label a list of 1 entries is no whole number"),
        (b"\xff\xff", "its label is not UTF-8"),
        (4, "its label 4 is none of 0 to 3"),
        (10**400, "is none of 0 to 3"),
    ],
)
def test_what_is_no_label_says_why(value: object, why: str) -> None:
    with pytest.raises(ValueError) as error:
        label_of(value, 4)
    assert why in str(error.value) and len(str(error.value)) < 120


# -- through the sources ------------------------------------------------------------------------------------------------------


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (200, 30, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, samples: list[dict[str, bytes]], name: str = "{n:03d}") -> None:
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as archive:
        for number, sample in enumerate(samples):
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{name.format(n=number)}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def folder(path: Path, samples: list[dict[str, bytes]]) -> None:
    for number, sample in enumerate(samples):
        for extension, data in sample.items():
            (path / f"{number:03d}.{extension}").write_bytes(data)


def prepared(tmp_path: Path, source: Any, classes: int | None = None, **changes: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """What the stage ``data`` made: caption and metadata by the number in the name; and the bad samples with their reasons."""
    config = DataConfig(source=source, image_size=8, heldout_fraction=0.4, max_bad_fraction=0.9, **changes)
    notes, found = Notes(), dict[str, Any]()
    manifests = prepare_images(config, str(tmp_path / "images"), notes=notes, classes=classes)
    for split, manifest in manifests.items():
        for info in manifest.shards:
            for sample in read_shard(str(tmp_path / "images" / split / info.name), "", info):
                metadata = json.loads(sample["json"], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
                found[identity(metadata)[0].rpartition("/")[2]] = (sample["txt"].decode(), metadata)
    (tmp_path / "notes.json").write_text(json.dumps(notes.record()))
    bad = {key.split("-")[-3 if "png" in key else -2]: why for key, why in manifests["train"].skipped.items()}
    assert notes.record().get("bad samples, left out", {"count": 0})["count"] == len(bad)
    return found, bad


GOOD = [{"png": picture(), "txt": f"drawing {number}".encode()} for number in range(8)]


def beside(kind: str, tmp_path: Path, samples: list[dict[str, bytes]], **fields: Any) -> Any:
    """These samples as a folder or as a tar."""
    at = tmp_path / "in"
    at.mkdir()
    if kind == "folder":
        folder(at, samples)
        return FolderSource(type="folder", path=str(at))
    tar(at / "s.tar", samples)
    return WebDatasetSource(type="webdataset", url=str(at), **fields)


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_captions_are_read_right_or_counted(tmp_path: Path, kind: str) -> None:
    odd = [{"png": picture(), "txt": data} for data in ENCODED.values()]
    odd += [{"png": picture(), "txt": data} for data in (b"ein K\xe4fer", b"nan", b" \r\n", b"two\r\nlines\0\r\n")]
    found, bad = prepared(tmp_path, beside(kind, tmp_path, odd + GOOD))
    assert [found[f"{number:03d}"][0] for number in range(len(ENCODED))] == [TEXT] * len(ENCODED)
    assert found["009"][0] == "two\nlines"
    assert json.loads((tmp_path / "notes.json").read_text())[CLEANED] == {"count": 1, "examples": [found["009"][1]["name"]]}
    assert bad == {"006": "its caption is not UTF-8 (byte 5 is 0xe4); save it as UTF-8", "007": "no caption", "008": "no caption"}


def test_captions_in_json_of_any_type(tmp_path: Path) -> None:
    """Half an emoji, several captions, and values that are no caption."""
    values = [
        '"a cat \\ud83d"',
        '["one", "two", null, ""]',
        "null",
        "NaN",
        "7",
        '{"en": "a cat"}',
        '"None"',
        "[" * 600 + "]" * 600,
        "[" * 10**5,
        "\ufeff",
    ]
    samples = [{"png": picture(), "json": f'{{"text": {value}}}'.encode()} for value in values]
    samples += [{"png": picture(), "json": b'{"text": "fine"}'}] * 8
    found, bad = prepared(tmp_path, beside("webdataset", tmp_path, samples, caption="text"))
    assert found["000"][0] == "a cat ?"
    assert found["001"][0] in ("one", "two") and found["001"][1]["captions"] == ["one", "two"]
    assert bad["002"] == bad["003"] == bad["006"] == "no caption"
    assert bad["004"] == "its caption is no text but 7" and bad["005"] == "its caption is no text but a mapping of 1 entries"
    assert {"007", "008", "009"} <= bad.keys() and all(
        "its .json" in bad[each] or "its caption" in bad[each] for each in ("007", "008", "009")
    )


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_labels_are_checked_by_the_first_stage(tmp_path: Path, kind: str) -> None:
    """In JSON or in ``.cls``; a model of labels needs no captions, and no sample without a label is left for later."""
    jsons = ["3", "3.0", '"3"', "-1", '"cat"', "null", "4"]
    samples: list[dict[str, bytes]] = [{"png": picture(), "json": f'{{"label": {value}}}'.encode()} for value in jsons]
    samples += [{"png": picture(), "cls": b"2\n"}, {"png": picture(), "cls": b"two"}, {"png": picture(), "json": b"{}"}]
    samples += [{"png": picture(), "cls": str(number % 4).encode(), "txt": b"a drawing"} for number in range(8)]
    found, bad = prepared(tmp_path, beside(kind, tmp_path, samples), classes=4)
    assert [found[f"{number:03d}"] for number in range(3)] == [("class 3", {**found[f"{n:03d}"][1], "label": 3}) for n in range(3)]
    assert (found["007"][0], found["007"][1]["label"]) == ("class 2", 2)
    assert (found["012"][0], found["012"][1]["label"]) == ("a drawing", 2), "a caption stays where there is one"
    assert bad == {
        "003": "its label -1 is below 0",
        "004": "its label 'cat' is no whole number",
        "005": "no caption",
        "006": "its label 4 is none of 0 to 3",
        "008": "its label 'two' is no whole number",
        "009": "no caption",
    }


def test_a_label_does_not_stand_in_for_a_caption_that_is_needed(tmp_path: Path) -> None:
    samples = [*GOOD, {"png": picture(), "cls": b"2"}]
    _, bad = prepared(tmp_path, beside("webdataset", tmp_path, samples))
    assert bad == {"008": "no caption"}


def test_what_the_user_calls_name_and_nan_survives(tmp_path: Path) -> None:
    samples = [{**sample, "json": b'{"name": "mine", "family": "font", "similarity": NaN, "width": 48}'} for sample in GOOD]
    found, _ = prepared(tmp_path, beside("webdataset", tmp_path, samples))
    metadata = found["000"][1]
    assert (metadata["name"], metadata["family"], metadata["width"], metadata["similarity"]) == ("mine", "font", 48, None)
    assert identity(metadata) == ("s/000", "")


def test_extensions_may_be_capitals(tmp_path: Path) -> None:
    samples = [{"PNG": picture(), "TXT": b"a drawing", "Json": b'{"label": 1}'} for _ in range(8)]
    found, bad = prepared(tmp_path, beside("folder", tmp_path, samples))
    assert len(found) == 8 and not bad and found["003"][0] == "a drawing" and found["003"][1]["label"] == 1


def test_shards_that_are_used_as_they_are_follow_the_same_rules(tmp_path: Path) -> None:
    samples = [{"cls": b"3"}, {"json": b'{"label": "003"}'}, {"json": b'{"label": -1}', "txt": b"K\xe4fer"}, {"txt": ENCODED["utf-16"]}]
    tar(tmp_path / "s.tar", samples)
    shard = OpenShard(memoryview((tmp_path / "s.tar").read_bytes()), "s.tar")
    assert [shard.prompt(row, "label") for row in range(2)] == [3, 3]
    assert (shard.caption(0), shard.caption(3)) == ("class 3", TEXT)
    for row, field, why in ((2, "label", "its label -1 is below 0"), (2, "txt", "its caption is not UTF-8"), (3, "label", "no label")):
        with pytest.raises(UnusableSample, match=rf"s.tar: sample '00{row}' cannot be used: {why}"):
            shard.prompt(row, field)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [b"", b" \n", b"None", b"nan"])
def test_shards_used_as_they_are_never_have_empty_prompts(tmp_path: Path, text: bytes) -> None:
    """A label stands in for a caption that says nothing, whatever is no label does not."""
    samples = [{"cls": b"3"}, {"json": b'{"label": 3.0}'}, {}, {"cls": b"[1]"}, {"json": b'{"label": {"a": 1}}'}]
    tar(tmp_path / "s.tar", [{**sample, "txt": text} for sample in samples])
    shard = OpenShard(memoryview((tmp_path / "s.tar").read_bytes()), "s.tar")
    assert [shard.caption(row) for row in range(2)] == ["class 3", "class 3"]
    for row, why in (
        (2, "has no caption"),
        (3, "cannot be used: no caption, and its label"),
        (4, "cannot be used: no caption, and its label"),
    ):
        with pytest.raises(UnusableSample, match=f"s.tar: sample '00{row}' {why}"):
            shard.caption(row)
    assert scan_shard(str(tmp_path / "s.tar")).bad_captions == 3


def test_a_label_alone_is_a_caption_only_where_it_is_one(tmp_path: Path) -> None:
    tar(tmp_path / "s.tar", [{"json": b'{"label": "3"}'}, {"json": b'{"label": "a cat"}'}])
    shard = OpenShard(memoryview((tmp_path / "s.tar").read_bytes()), "s.tar")
    assert shard.caption(0) == "class 3"
    with pytest.raises(UnusableSample, match="no caption, and its label 'a cat' is no whole number"):
        shard.caption(1)


def test_a_table_for_a_folder_and_the_reverse_are_named(tmp_path: Path) -> None:
    folder(tmp_path, GOOD)
    (tmp_path / "list.csv").write_text("image,caption\n")
    config: Any
    for config, message in (
        (FolderSource(type="folder", path=str(tmp_path / "list.csv")), "is a file.*type: table"),
        (TableSource(type="table", path=str(tmp_path / "nothing")), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_images(DataConfig(source=config), str(tmp_path / "images"))


def test_keys_that_are_not_utf8_pass_through_views_and_order_tables(tmp_path: Path) -> None:
    """They are the bytes that they are in the tar, up to the joined orders."""
    tar(tmp_path / "s.tar", [{"png": picture()}], "b\udcff{n}")
    shard = OpenShard(memoryview((tmp_path / "s.tar").read_bytes()), "s.tar")
    assert shard.keys == ["b\udcff0"]
    image = Image.new("RGB", (8, 8))
    assert make_view(image, "jitter1", shard.keys[0], 8).size == (8, 8)
    one = np.arange(4, dtype=np.uint16)[None]
    for keys in (shard.keys, ["plain"]):
        table = OrderTable(keys, [0], one, one.astype(np.float32), "m", "s")
        read = parse_orders(order_bytes(table), "t")
        assert join_orders(keys, read, shard="s.tar", cells=4).tolist() == [[[0, 1, 2, 3]]]
    assert pq.read_schema(io.BytesIO(order_bytes(table))).field("key").type == pa.string(), "usual keys stay text"
    write_json(str(tmp_path / "x.json"), {"key": shard.keys[0]})
    assert read_json(str(tmp_path / "x.json")) == {"key": shard.keys[0]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_lists_of_names_and_recipes_are_read_by_the_same_rule(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "names.txt").write_bytes("n01 Käfer, beetle\r\nn02 great_white_shark\r\n".encode(encoding))
    (tmp_path / "names.json").write_bytes(json.dumps({"n01": "Käfer", "n02": "great_white_shark"}).encode(encoding))
    (tmp_path / "mine.yaml").write_bytes("name: mine\r\nrun_dir: Käfer\r\n".encode(encoding))
    for name in ("names.txt", "names.json"):
        assert read_names(str(tmp_path / name)) == {"n01": "Käfer", "n02": "great white shark"}
    assert load_recipe(str(tmp_path / "mine.yaml")).run_dir == "Käfer"


def test_what_is_no_text_is_named_where_a_list_or_a_recipe_is_due(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes("name: K\xe4fer".encode("latin-1"))
    for read in (read_names, load_recipe):
        with pytest.raises(UserError, match=r"x.yaml: .*is not UTF-8 \(byte 7 is 0xe4\); save it as UTF-8"):
            read(str(tmp_path / "x.yaml"))
    with pytest.raises(UserError, match="no such file"):
        read_names(str(tmp_path / "gone.txt"))


def test_no_error_fills_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is in a message: the command line cuts it."""
    (tmp_path / "mine.yaml").write_text("name: mine\n" + "x" * 10**6 + ": 1\n")
    assert main(["recipe", str(tmp_path / "mine.yaml")]) == 2
    assert len(capsys.readouterr().err) < 10_000
