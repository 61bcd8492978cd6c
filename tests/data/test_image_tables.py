"""Tables as people's programs write them: CSV of every habit, Parquet of every type, pictures inside, files in a folder or on S3."""

from __future__ import annotations

import csv
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from oar_scale.config.schema import TableSource
from oar_scale.data.sources import BadImage, open_source
from oar_scale.data.sources.table import TableImages
from oar_scale.errors import UserError
from oar_scale.storage import join, open_storage


def picture(red: int = 200, size: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (red, 30, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture())


def source(path: Path | str, **fields: Any) -> TableImages:
    found = open_source(TableSource.model_validate({"type": "table", "path": str(path), **fields}))
    assert isinstance(found, TableImages)
    return found


def rows(table: TableImages) -> list[str | tuple[str, Any]]:
    """Caption and metadata of each row, or the reason why it is a bad sample."""
    found: list[str | tuple[str, Any]] = []
    for image in table.images():
        try:
            content = image.read(8)
        except BadImage as fault:
            found.append(str(fault))
        else:
            found.append((content.caption, content.metadata))
    return found


def captions(path: Path | str, **fields: Any) -> list[str]:
    return [row if isinstance(row, str) else row[0] for row in rows(source(path, **fields))]


# -- CSV ----------------------------------------------------------------------------------------------------------------------

LONG = "a very long story, " * 10_000
FORMS = {
    "commas": 'image,caption\n0.png,"one, two"\n1.png,"a ""quoted"" word"\n2.png,"two\nlines"\n',
    "semicolons": 'image;caption\n0.png;one, two\n1.png;"a ""quoted"" word"\n2.png;"two\nlines"\n',
    "tabs in a .csv": 'image\tcaption\n0.png\tone, two\n1.png\t"a ""quoted"" word"\n2.png\t"two\nlines"\n',
    "all quoted": '"image","caption"\n"0.png","one, two"\n"1.png","a ""quoted"" word"\n"2.png","two\nlines"\n',
    "windows": 'image,caption\r\n0.png,"one, two"\r\n1.png,"a ""quoted"" word"\r\n2.png,"two\r\nlines"\r\n',
    "old mac": 'image,caption\r0.png,"one, two"\r1.png,"a ""quoted"" word"\r2.png,"two\rlines"\r',
    "blank lines": 'image,caption\n\n0.png,"one, two"\n1.png,"a ""quoted"" word"\n\n2.png,"two\nlines"\n\n',
    "backslashes": 'image,caption\n0.png,"one, two"\n1.png,"a \\"quoted\\" word"\n2.png,"two\nlines"\n',
    "bars": 'image|caption\n0.png|one, two\n1.png|"a ""quoted"" word"\n2.png|"two\nlines"\n',
    "sep=": 'sep=;\nimage;caption\n0.png;one, two\n1.png;"a ""quoted"" word"\n2.png;"two\nlines"\n',
    "empty cells at the end": 'image,caption\n0.png,"one, two",,\n1.png,"a ""quoted"" word",\n2.png,"two\nlines"\n',
    "blanks before the quotation marks": '"image", "caption"\n"0.png", "one, two"\n"1.png", "a ""quoted"" word"\n"2.png", "two\nlines"\n',
    "a long cell beside": f'image,story,caption\n0.png,"{LONG}","one, two"\n1.png,,"a ""quoted"" word"\n2.png,x,"two\nlines"\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", FORMS.values(), ids=list(FORMS))
def test_csv_is_read_as_it_is_meant(tmp_path: Path, text: str, encoding: str) -> None:
    pictures(tmp_path, 3)
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    table = source(tmp_path / "t.csv")
    assert [row[0] for row in rows(table)] == ["one, two", 'a "quoted" word', "two\nlines"]
    assert not table.notes.record()


@pytest.mark.parametrize(
    "cells",
    [
        ['"an open quotation', "plain", "plain", "plain"],
        ['"an open quotation', "plain", "plain", 'and its end"', "plain"],
        ['"Hello" she said', "plain"],
        ['12" disc', 'the "best', '"'],
        ['"one', '"two', '"three"'],
    ],
)
def test_quotation_marks_in_a_file_without_quoting_are_letters(tmp_path: Path, cells: list[str]) -> None:
    """They swallowed all rows up to the next one before."""
    pictures(tmp_path, len(cells))
    (tmp_path / "t.tsv").write_text("image\tcaption\n" + "".join(f"{number}.png\t{cell}\n" for number, cell in enumerate(cells)))
    assert captions(tmp_path / "t.tsv") == cells


def test_paragraphs_in_quoted_cells_are_no_rows(tmp_path: Path) -> None:
    """Their lines have as many commas as a row, and made more whole rows without quoting."""
    cells = ["A cat.\nIt sits, sleeping.\nThe mat is red, the wall blue.", "A dog.\nIt runs, barking.\nThe sky is blue, the grass green."]
    pictures(tmp_path, len(cells))
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{number}.png", cell) for number, cell in enumerate(cells))])
    assert captions(tmp_path / "t.csv") == cells


def test_a_stray_comma_never_moves_the_cells_behind_it(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    (tmp_path / "t.csv").write_text("image,caption,width\n0.png,fine,8\n1.png,one, two,8\n2.png,fine,8\n")
    assert captions(tmp_path / "t.csv") == ["fine", "more cells than the header has columns: a separator without quotation marks", "fine"]
    (tmp_path / "t.csv").write_text("width,image,caption\n8,0.png,fine\n8,1.png,one, two\n")
    assert captions(tmp_path / "t.csv") == ["fine", "one, two"]


def test_rows_of_other_lengths_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    (tmp_path / "t.csv").write_text("image,caption\n0.png,one, two, three\n1.png\n2.png,fine\n,\n")
    table = source(tmp_path / "t.csv")
    assert [row if isinstance(row, str) else row[0] for row in rows(table)] == ["one, two, three", "no caption", "fine", "no path"]
    noted = table.notes.record()
    assert noted["rows with more cells than the header: the rest was taken for the last column"]["count"] == 1
    assert noted["rows with fewer cells than the header: the last ones are empty"]["count"] == 1


def test_cells_that_are_not_utf8_are_bad_captions_and_good_names(tmp_path: Path) -> None:
    name = b"K\xe4fer.png".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_bytes(picture())
    (tmp_path / "0.png").write_bytes(picture())
    (tmp_path / "t.csv").write_bytes(b"image,caption\n0.png,ein K\xe4fer\nK\xe4fer.png,a beetle\n0.png,nan\n")
    assert captions(tmp_path / "t.csv") == ["its caption is not UTF-8 (byte 5 is 0xe4); save it as UTF-8", "a beetle", "no caption"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", b"\x1f\x8b\x08\0\0\0\0\0", "compressed with gzip; unpack it"),
        ("t.csv", b"PK\x03\x04" + bytes(90), "Excel file.*save the sheet as CSV"),
        ("t.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(90), "old Excel file; save the sheet as CSV"),
        ("t.csv", b'{"image": "a.png", "caption": "a"}', "JSON; save it as CSV or Parquet"),
        ("t.csv", b'\xef\xbb\xbf\n {"image": "a.png", "caption": "a"}', "JSON; save it as CSV or Parquet"),
        ("t.csv", b'\n[\n  {"image": "a.png", "caption": "a"}]', "JSON; save it as CSV or Parquet"),
        ("t.csv", b"", "t.csv has no column 'image'; it has none: there is no first line with their names$"),
        ("t.csv", b"\xef\xbb\xbf\n\n", "t.csv has no column 'image'; it has none: there is no first line with their names$"),
        ("t.csv", b"\xff\xfei\0m\0", r"t.csv has no column 'image'; it has im"),
        ("t.csv", "image,caption\n".encode("utf-16-le"), r"t.csv: is UTF-16 or UTF-32 without a byte order mark, or no text at all"),
        ("t.csv", b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01", r"t.csv: is UTF-16 or UTF-32 without a byte order mark, or no text at all"),
        ("t.csv", b"\xff\xfei\0m\0a", r"not UTF-16 as its byte order mark says"),
        ("t.csv", b"image;" + b"x" * 10**6, r"has no column 'caption'; it has image, x+\.\.\. \(1000007 characters\)$"),
        ("t.parquet", b"image,caption\n", "not a Parquet file that can be read"),
    ],
)
def test_what_is_no_table_says_what_it_is(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        source(tmp_path / name)
    assert len(str(error.value)) < 1500


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption,caption\n0.png,a,b\n")
    pq.write_table(pa.Table.from_arrays([pa.array(["0.png"])] * 3, names=["image", "caption", "caption"]), tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(UserError, match="has 2 columns 'caption'"):
            source(tmp_path / name)


# -- Parquet ------------------------------------------------------------------------------------------------------------------

WORDS = ["ein Käfer", "two"]
TEXTS = {
    "string": pa.array(WORDS),
    "large": pa.array(WORDS, pa.large_string()),
    "view": pa.array(WORDS, pa.string_view()),
    "binary": pa.array([word.encode() for word in WORDS], pa.binary()),
    "large binary": pa.array([word.encode() for word in WORDS], pa.large_binary()),
    "fixed": pa.array([b"ein K\xc3\xa4fer", b"two       "], pa.binary(10)),
    "dictionary": pa.array(WORDS).dictionary_encode(),
    "dictionary of bytes": pa.array([word.encode() for word in WORDS]).dictionary_encode(),
}


@pytest.mark.parametrize("caption", TEXTS.values(), ids=list(TEXTS))
@pytest.mark.parametrize("image", ["string", "binary", "dictionary"])
def test_text_columns_of_every_type(tmp_path: Path, image: str, caption: pa.Array) -> None:
    pictures(tmp_path, 2)
    names = pa.array(["0.png", "1.png"])
    column = {"string": names, "binary": names.cast(pa.binary()), "dictionary": names.dictionary_encode()}[image]
    pq.write_table(pa.table({"image": column, "caption": caption}), tmp_path / "t.parquet")
    assert captions(tmp_path / "t.parquet") == WORDS


MISSING = {
    "null": (pa.array(["a", None]), "a"),
    "nan": (pa.array([1.0, float("nan")]), "1"),
    "null type": (pa.array([None, None]), "no caption"),
    "words": (pa.array(["a", "nan"]), "a"),
    "NaT": (pa.array([17, None], pa.timestamp("ns")), "1970-01-01 00:00:00.000000017"),
    "empty bytes": (pa.array([b"a", b""]), "a"),
    "empty list": (pa.array([["a"], []]), "a"),
    "list of null": (pa.array([["a", "a"], [None, ""]]), "a"),
    "not UTF-8": (pa.array([b"a", b"\xe4"]), "a"),
}


@pytest.mark.parametrize(("caption", "first"), MISSING.values(), ids=list(MISSING))
def test_missing_captions_are_counted_never_words(tmp_path: Path, caption: pa.Array, first: str) -> None:
    pictures(tmp_path, 2)
    pq.write_table(pa.table({"image": ["0.png", "1.png"], "caption": caption}), tmp_path / "t.parquet")
    found = captions(tmp_path / "t.parquet")
    assert found[0] == first
    assert found[1].startswith("its caption is not UTF-8" if found[1] != "no caption" else "no caption")


def test_columns_that_are_no_text_are_refused_by_name(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    columns = {
        "image": ["0.png"],
        "a": [{"en": "a", "x" * 500: "b"}],
        "b": [[["a"]]],
        "c": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    for name in "abc":
        with pytest.raises(UserError, match=rf"t.parquet: column '{name}' holds .*, which is no text. Name another column.") as error:
            source(tmp_path / "t.parquet", caption=name)
        assert len(str(error.value)) < 400
    with pytest.raises(UserError, match=r"column 'a' holds .*: a picture is a path, bytes, or a struct of bytes and path"):
        source(tmp_path / "t.parquet", image="a", caption="image")


def test_labels_of_every_type(tmp_path: Path) -> None:
    pictures(tmp_path, 6)
    (tmp_path / "t.csv").write_text("image,caption,class\n0.png,a,3.0\n1.png,a,003\n2.png,a,nan\n3.png,a,-1\n4.png,a,cat\n5.png,,2\n")
    good = [("a", {"label": 3}), ("a", {"label": 3})]
    expected = [*good, "no label", "its label '-1' is no whole number", "its label 'cat' is no whole number", ("", {"label": 2})]
    assert rows(source(tmp_path / "t.csv", label="class")) == expected
    labels = pa.array([3.0, 3.0, None, -1.0, 2.5, 2.0])
    pq.write_table(
        pa.table({"image": [f"{n}.png" for n in range(6)], "caption": ["a"] * 5 + [None], "class": labels}), tmp_path / "t.parquet"
    )
    expected = [*good, "no label", "its label -1 is below 0", "its label 2.5 is no whole number", ("", {"label": 2})]
    assert rows(source(tmp_path / "t.parquet", label="class")) == expected


# -- the layout of Hugging Face `datasets` --------------------------------------------------------------------------------------


def datasets(folder: Path, split: str, count: int, parts: int = 1, **columns: Any) -> None:
    """As ``push_to_hub`` writes it: the picture a struct of bytes and path, the label a ClassLabel."""
    features = {"image": {"_type": "Image"}, "label": {"names": ["tench, Tinca tinca", "great_white_shark"], "_type": "ClassLabel"}}
    for part in range(parts):
        images = [{"bytes": picture(20 * number), "path": "image.png"} for number in range(part * count, (part + 1) * count)]
        data = {"image": images, "label": pa.array([n % 2 for n in range(count - 1)] + [-1]), "text": [f"{part} {n}" for n in range(count)]}
        table = pa.table({**data, **columns}).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / f"{split}-{part:05d}-of-{parts:05d}.parquet", row_group_size=2)


def test_pictures_inside_of_a_table_are_its_images(tmp_path: Path) -> None:
    datasets(tmp_path / "data", "train", 3, parts=2)
    table = source(tmp_path / "data", caption="text")
    images = list(table.images())
    assert [image.name for image in images] == [f"train-0000{part}-of-00002/{row}" for part in range(2) for row in range(3)]
    assert len({image.key for image in images}) == 6
    colours = [image.read(8).image.getpixel((4, 4)) for image in images]
    assert colours == [(20 * number, 30, 90) for number in range(6)]
    assert captions(tmp_path / "data" / "train-*", caption="text") == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]


def test_class_names_of_datasets_are_used(tmp_path: Path) -> None:
    datasets(tmp_path, "train", 3)
    found = rows(source(tmp_path, caption="a photo of a {label}", label="label"))
    assert found == [
        ("a photo of a tench", {"label": 0, "class": "tench, Tinca tinca"}),
        ("a photo of a great white shark", {"label": 1, "class": "great_white_shark"}),
        "its label -1 is below 0",
    ]


def test_pictures_as_plain_bytes_paths_or_missing(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture())
    pq.write_table(pa.table({"image": [picture(), b"0.png", None, b"", b"\xff\xd8 cut"], "caption": list("abcde")}), tmp_path / "t.parquet")
    found = captions(tmp_path / "t.parquet")
    assert found[:4] == ["a", "b", "no path", "no path"] and "cannot be read" in found[4]
    structs = [{"bytes": None, "path": "0.png"}, {"bytes": None, "path": None}, None, {"bytes": picture(), "path": None}]
    pq.write_table(pa.table({"image": structs, "caption": list("abcd")}), tmp_path / "s.parquet")
    assert captions(tmp_path / "s.parquet") == ["a", "no path", "no path", "d"]


def test_splits_and_missing_parts_are_named(tmp_path: Path) -> None:
    datasets(tmp_path, "train", 2, parts=3)
    datasets(tmp_path, "test", 2)
    with pytest.raises(UserError, match=r"the splits test, train lie here. Name one of them: .*/train-\*"):
        source(tmp_path, caption="text")
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"1 of 3 files are missing, e\.g\. number 1"):
        source(tmp_path / "train-*", caption="text")


def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    """One row group with 60 MB of pictures: a few rows of it are in memory at a time, and then none."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 1 << 20), dtype=np.uint8)
    table_60 = pa.table({"image": [each.tobytes() for each in noise], "caption": ["a"] * 60})
    pq.write_table(table_60, tmp_path / "t.parquet", use_dictionary=False, write_batch_size=4)  # pages, which are read whole, of 4 rows
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        table = source(tmp_path / "t.parquet")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert 1e6 < pool.max_memory() < 40e6 and peak < 20e6 and kept < 2e6
    assert captions(tmp_path / "t.parquet")[0].startswith("cannot be read") or len(list(table.images())) == 60


def test_a_message_never_holds_a_picture(tmp_path: Path) -> None:
    """Whatever column is taken for whatever: a cell is cut where it is shown."""
    data = [{"bytes": picture(size=400) * 50, "path": "x" * 10**5}]
    pq.write_table(pa.table({"image": data, "raw": [picture() * 1000], "text": ["y" * 10**6]}), tmp_path / "t.parquet")
    for fields in ({"image": "text"}, {"caption": "raw"}, {"caption": "image"}, {"caption": "text", "label": "text"}, {"image": "raw"}):
        try:
            found = rows(source(tmp_path / "t.parquet", **{"caption": "text", **fields}))
            assert all(len(row) < 500 for row in found if isinstance(row, str))
        except UserError as error:
            assert len(str(error)) < 500


def test_paths_that_no_file_can_have_or_without_an_end(tmp_path: Path) -> None:
    """NUL in a name, a pipe that nobody writes to, a device that never ends, a file of a terabyte: bad samples, each on its own."""
    pictures(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)
    names = pa.array(["0.png", "a\0b.png", "pipe.png", "/dev/zero", "huge.png", ".", "x" * 300 + ".png"])
    pq.write_table(pa.table({"image": names, "caption": ["fine"] * 7}), tmp_path / "t.parquet")
    found = captions(tmp_path / "t.parquet")
    assert found[0] == "fine" and all(each.startswith("cannot be read (") for each in found[1:]), found


# -- where they lie -----------------------------------------------------------------------------------------------------------


def test_a_folder_or_a_pattern_of_tables(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    (tmp_path / "meta").mkdir()
    for part in range(2):
        names = [f"{number}.png" for number in range(2 * part, 2 * part + 2)]
        pq.write_table(
            pa.table({"image": names, "caption": [f"of {name}" for name in names]}), tmp_path / "meta" / f"part-{part:05d}.parquet"
        )
    (tmp_path / "meta" / "_SUCCESS").write_text("")
    (tmp_path / "meta" / "._part-00000.parquet").write_text("no data")
    for path in ("meta", "meta/part-*.parquet"):
        assert captions(tmp_path / path, root=str(tmp_path)) == [f"of {number}.png" for number in range(4)]
    for path, message in (("", "no table in this folder .*type: folder"), ("meta/*.csv", "no file matches"), ("nowhere", "no such file")):
        with pytest.raises(UserError, match=message):
            source(tmp_path / path)


def test_files_beside_the_tables_and_odd_folders(tmp_path: Path) -> None:
    """What is not taken is noted; brackets may be part of a folder's name; patterns match in capitals too."""
    folder = tmp_path / "set [v2]"
    folder.mkdir()
    pictures(folder, 2)
    (folder / "PART-0.CSV").write_text("image,caption\n0.png,a\n")
    (folder / "part-1.csv").write_text("image,caption\n1.png,b\n")
    for name in ("part-2.csv.gz", "README.md", "_SUCCESS", "._part-1.csv"):
        (folder / name).write_text("")
    table = source(folder)
    assert sorted(row[0] for row in rows(table)) == ["a", "b"]
    assert {reason: note["count"] for reason, note in table.notes.record().items()} == {
        "files of other kinds, left out": 2,
        "files that are no data, left out": 2,
    }
    assert sorted(captions(folder / "part-*.csv")) == ["a", "b"]


def test_tables_on_s3_give_the_same_images(tmp_path: Path, s3_root: str) -> None:
    datasets(tmp_path, "train", 3, parts=2)
    (tmp_path / "list.csv").write_bytes(b"image,caption\n0.png,a\ngone.png,b\nK\xe4fer.png,c\n")
    there = join(s3_root, "table")
    for path in tmp_path.iterdir():
        open_storage(there).write(join(there, path.name), path.read_bytes())
    open_storage(there).write(join(there, "0.png"), picture())
    assert captions(f"{there}/train-*", caption="text") == captions(tmp_path / "train-*", caption="text")
    found = captions(join(there, "list.csv"))
    assert found[0] == "a" and "there is no s3://" in found[1] and "not a valid S3 name" in found[2]
    for path, message in (("nowhere.csv", "no such file"), ("*.tsv", "no file matches")):
        with pytest.raises(UserError, match=message):
            source(join(there, path))
