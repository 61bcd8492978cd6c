"""Every source of images: from a small sample of its layout to shards."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from oar_scale.config.schema import DataConfig, Source
from oar_scale.data.prepare import prepare_images
from oar_scale.data.scan import scan_shard
from oar_scale.data.shards import read_shard
from oar_scale.data.sources import BadImage, Content, open_source
from oar_scale.data.sources.image_files import square_of
from oar_scale.errors import UserError
from oar_scale.storage import join, open_storage


def source_of(**fields: Any) -> Source:
    source: Source = TypeAdapter(Source).validate_python(fields)
    return source


def contents(**fields: Any) -> dict[str, Content]:
    """All good images of a source, by name."""
    entries = {}
    for image in open_source(source_of(**fields)).images():
        try:
            entries[image.name] = image.read(8)
        except BadImage:
            continue
    return entries


def faults(**fields: Any) -> dict[str, str]:
    reasons = {}
    for image in open_source(source_of(**fields)).images():
        try:
            image.read(8)
        except BadImage as fault:
            reasons[image.name] = str(fault)
    return reasons


def picture(colour: tuple[int, int, int], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


# -- folders ----------------------------------------------------------------------------------------------------------------


def test_equal_names_in_two_subfolders_stay_two(tmp_path: Path) -> None:
    """Subfolders are read and equal names in two of them stay two."""
    for at in ("cat", "a/cat", "b/cat", ".trash/cat"):
        put(tmp_path / f"{at}.png", picture((9, 9, 9)))
        put(tmp_path / f"{at}.txt", f"the cat in {at}")
    images = contents(type="folder", path=str(tmp_path))
    assert {name: content.caption for name, content in images.items()} == {n: f"the cat in {n}" for n in ("cat", "a/cat", "b/cat")}
    assert len({image.key for image in open_source(source_of(type="folder", path=str(tmp_path))).images()}) == 3


def test_captions_in_their_own_folder_ten_to_choose_from(tmp_path: Path) -> None:
    """The layout of Multimodal CelebA-HQ."""
    for number in range(12):
        put(tmp_path / f"images/{number}.jpg", picture((20 * number, 0, 0), "JPEG"))
        put(tmp_path / f"text/{number}.txt", "".join(f"Face {number} in the words of line {line}.\n" for line in range(10)))
    fields = {"type": "folder", "path": str(tmp_path / "images"), "captions": str(tmp_path / "text"), "alternatives": True}
    images = contents(**fields)
    assert len(images) == 12
    for number, content in images.items():
        assert len(content.metadata["captions"]) == 10
        assert content.caption in content.metadata["captions"] and content.caption.startswith(f"Face {number} ")
    assert len({content.caption[-2:] for content in images.values()}) > 3, "not the same line for all"
    assert {name: c.caption for name, c in contents(**fields).items()} == {name: c.caption for name, c in images.items()}


# -- tables -----------------------------------------------------------------------------------------------------------------

STYLES = """id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName
15970,Men,Apparel,Topwear,Shirts,Navy Blue,Fall,2011,Casual,Turtle Check Men Navy Blue Shirt
39386,Men,Apparel,Bottomwear,Jeans,Blue,Summer,2012,Casual,Peter England Men Party Blue Jeans
59263,Women,Accessories,Watches,Watches,,Winter,2016,Casual,"Titan Women Silver Watch, round"
30039,Men,Accessories,Watches,Watches,Black,Winter,2016,Casual,Skagen Men Black Watch, slim, steel
"""


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """The layout of Fashion Product Images: a cell is empty, one has commas without quotes, one image is missing."""
    put(tmp_path / "styles.csv", STYLES)
    for number in (15970, 59263, 30039):
        put(tmp_path / f"images/{number}.jpg", picture((number % 255, 0, 0), "JPEG"))
    return tmp_path


def test_captions_from_columns_survive_a_stray_comma(fashion: Path) -> None:
    """A caption is built from columns and a stray comma breaks nothing."""
    fields = {
        "type": "table",
        "path": str(fashion / "styles.csv"),
        "image": "images/{id}.jpg",
        "caption": "{baseColour} {articleType}: {productDisplayName}",
        "label": "year",
    }
    images = contents(**fields)
    assert {name: content.caption for name, content in images.items()} == {
        "images/15970": "Navy Blue Shirts: Turtle Check Men Navy Blue Shirt",
        "images/59263": "Watches: Titan Women Silver Watch, round",
        "images/30039": "Black Watches: Skagen Men Black Watch, slim, steel",
    }
    assert images["images/15970"].metadata == {"label": 2011}
    assert "No such file" in faults(**fields)["images/39386"]


def test_parquet_gives_what_csv_gives(fashion: Path) -> None:
    rows = [line.split(",") for line in STYLES.splitlines()[1:3]]
    table = pa.table({"file": [f"images/{row[0]}.jpg" for row in rows], "words": [row[9] for row in rows], "class": [3, None]})
    pq.write_table(table, fashion / "styles.parquet")
    fields = {"type": "table", "path": str(fashion / "styles.parquet"), "image": "file", "caption": "words", "label": "class"}
    images = contents(**fields)
    assert {name: (content.caption, content.metadata) for name, content in images.items()} == {
        "images/15970": ("Turtle Check Men Navy Blue Shirt", {"label": 3})
    }


def test_paths_may_be_relative_to_another_folder(fashion: Path) -> None:
    put(fashion / "lists/few.tsv", "image\tcaption\n15970.jpg\ta shirt\n15970.jpg.gone\t\n")
    fields = {"type": "table", "path": str(fashion / "lists/few.tsv"), "root": str(fashion / "images")}
    assert contents(**fields)["15970"].caption == "a shirt"
    assert faults(**fields) == {"15970.jpg": "no caption"}


def test_a_column_can_say_what_is_held_out_together(tmp_path: Path) -> None:
    put(tmp_path / "t.csv", "image,caption,thing,kind\n1.png,a dark hat,dark hat,hat\n2.png,the same,dark hat,hat\n3.png,a hat,,hat\n")
    source = open_source(source_of(type="table", path=str(tmp_path / "t.csv"), name="thing", family="kind", attribution="by nobody"))
    assert [(image.name, image.family) for image in source.images()] == [("dark hat", "hat"), ("dark hat", "hat"), ("3", "hat")]
    assert source.attribution == "by nobody"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "images/{ID}.jpg"}, r"data\.source\.image: .*has no column 'ID'; it has id, gender"),
        ({"image": "id", "label": "klass"}, r"data\.source\.label: .*has no column 'klass'"),
        ({"path": "nowhere.csv"}, r"nowhere\.csv: no such file"),
    ],
)
def test_a_wrong_column_is_named_with_those_there_are(fashion: Path, fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(source_of(**{"type": "table", "path": str(fashion / "styles.csv"), "caption": "productDisplayName", **fields}))


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    put(tmp_path / "t.parquet", b"PAR1 nothing")
    put(tmp_path / "t.csv", "image,caption\n")
    for name, message in (("t.parquet", "not a Parquet file"), ("t.csv", "a table without a row")):
        with pytest.raises(UserError, match=message):
            open_source(source_of(type="table", path=str(tmp_path / name)))


# -- class folders ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for folder in ("n01440764", "n01443537", "n01484850"):
        for number in range(2):
            put(tmp_path / f"train/{folder}/{folder}_{number}.JPEG", picture((40 * number, 0, 0), "JPEG"))
    put(
        tmp_path / "LOC_synset_mapping.txt",
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn01484850 great white shark\n",
    )
    return tmp_path


def test_labels_are_sorted_folders_captions_their_names(imagenet: Path) -> None:
    """Labels are the sorted folders and captions say their names."""
    images = contents(type="class_folders", path=str(imagenet / "train"), names=str(imagenet / "LOC_synset_mapping.txt"))
    assert len(images) == 6
    goldfish = images["n01443537/n01443537_1"]
    assert (goldfish.caption, goldfish.metadata) == ("a photo of a goldfish", {"label": 1, "class": "n01443537"})
    assert images["n01484850/n01484850_0"].caption == "a photo of a great white shark"


@pytest.mark.parametrize(
    "names",
    [
        {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great_white_shark"},
        {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "2": ["n01484850", "great_white_shark"]},
    ],
)
def test_names_may_be_json(imagenet: Path, names: dict[str, Any]) -> None:
    put(imagenet / "names.json", json.dumps(names))
    images = contents(type="class_folders", path=str(imagenet / "train"), names=str(imagenet / "names.json"), caption="{name}!")
    assert images["n01484850/n01484850_0"].caption == "great white shark!"


def test_folder_names_serve_and_a_missing_name_is_an_error(imagenet: Path) -> None:
    """Without names the folders speak and a name that is missing is missed."""
    assert contents(type="class_folders", path=str(imagenet / "train"))["n01440764/n01440764_0"].caption == "a photo of a n01440764"
    put(imagenet / "few.txt", "n01440764\ttench\n")
    with pytest.raises(UserError, match=r"few\.txt: no name for 2 of the classes, e\.g\. 'n01443537'"):
        open_source(source_of(type="class_folders", path=str(imagenet / "train"), names=str(imagenet / "few.txt")))
    put(imagenet / "odd.txt", "n01440764\n")
    with pytest.raises(UserError, match=r"odd\.txt: a class and its name are expected"):
        open_source(source_of(type="class_folders", path=str(imagenet / "train"), names=str(imagenet / "odd.txt")))


# -- shards of others ---------------------------------------------------------------------------------------------------------


def foreign_shard(samples: list[tuple[str, dict[str, bytes]]], kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for key, members in samples:
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def img2dataset(shard: int) -> list[tuple[str, dict[str, bytes]]]:
    """As img2dataset writes them: the caption twice, and what it knows about the download."""
    return [
        (
            f"{shard:05d}{number:04d}",
            {
                "jpg": picture((60 * number, 80 * shard, 0), "JPEG"),
                "json": json.dumps({"caption": f"picture {number}", "alt": f"alt {number}", "status": "success", "class": number}).encode(),
                "txt": f"picture {number}\n".encode(),
            },
        )
        for number in range(4)
    ]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_img2dataset_are_read_sample_by_sample(tmp_path: Path, kind: int) -> None:
    long = [("k" * 150 + "ü", img2dataset(2)[0][1]), ("short", {"txt": b"no picture"})] if kind != tarfile.USTAR_FORMAT else []
    put(tmp_path / "00000.tar", foreign_shard(img2dataset(0), kind))
    put(tmp_path / "00001.tar", foreign_shard(img2dataset(1) + long, kind))
    put(tmp_path / "00001_stats.json", "{}")
    images = contents(type="webdataset", url=str(tmp_path))
    assert len(images) == 8 + bool(long)
    content = images["00001/000010002"]
    assert content.caption == "picture 2" and content.metadata["status"] == "success" and "label" not in content.metadata
    assert content.image.size == (8, 8) and max(abs(a - b) for a, b in zip(content.image.getpixel((4, 4)), (120, 80, 0), strict=True)) < 4
    if long:
        assert faults(type="webdataset", url=str(tmp_path)) == {"00001/short": "no image among .txt"}
    other = contents(type="webdataset", url=str(tmp_path / "00000.tar"), caption="alt", label="class")["00000/000000003"]
    assert (other.caption, other.metadata["label"]) == ("alt 3", 3)


def test_shards_on_s3_give_the_same_images(tmp_path: Path, s3_root: str) -> None:
    here, there = tmp_path / "shards", join(s3_root, "foreign")
    for shard in range(2):
        data = foreign_shard(img2dataset(shard), tarfile.GNU_FORMAT)
        put(here / f"{shard:05d}.tar", data)
        open_storage(there).write(join(there, f"{shard:05d}.tar"), data)

    def prepared(url: str, target: str) -> list[bytes]:
        config = DataConfig(source=source_of(type="webdataset", url=url), image_size=8, heldout_fraction=0.4, samples_per_shard=3)
        manifests = prepare_images(config, str(tmp_path / target))
        return [(tmp_path / target / split / s.name).read_bytes() for split, manifest in manifests.items() for s in manifest.shards]

    assert prepared(str(here), "a") == prepared(there, "b")


def test_a_broken_or_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, says in (("nothing", "no such folder"), ("empty", r"no \.tar below it")):
        with pytest.raises(UserError, match=f"{name}: {says}"):
            open_source(source_of(type="webdataset", url=str(tmp_path / name)))
    put(tmp_path / "00000.tar", foreign_shard(img2dataset(0), tarfile.GNU_FORMAT)[:3000])
    with pytest.raises(UserError, match=r"00000\.tar: truncated or broken tar"):
        list(open_source(source_of(type="webdataset", url=str(tmp_path))).images())


@pytest.mark.parametrize("url", ["x.tar", "x-{0000..0003}.tar", "*.tar", "pipe:cat x.tar", "https://host/x.tar"])
def test_a_tar_that_is_not_there_is_one_error(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns and commands are usual where others read WebDataset."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{re.escape(url)}: (no such file\. Name one \.tar, or the folder|cannot store under https)"):
        open_source(source_of(type="webdataset", url=url))


def test_a_tar_that_is_a_pipe_or_not_readable_is_one_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name in ("pipe.tar", "folder.tar"):
        with pytest.raises(UserError, match=f"{name}: (truncated or broken tar|cannot be read .Is a directory)"):
            scan_shard(str(tmp_path / name))


def test_a_sample_whose_json_is_none_is_a_bad_sample(tmp_path: Path) -> None:
    bad = [("a", {"png": picture((0, 0, 0)), "txt": b"a", "json": b"{"}), ("b", {"png": picture((0, 0, 0)), "txt": b"b", "json": b"[]"})]
    put(tmp_path / "x.tar", foreign_shard([*bad, ("c", {"png": picture((0, 0, 0)), "txt": b"  "})], tarfile.GNU_FORMAT))
    reasons = faults(type="webdataset", url=str(tmp_path))
    assert "its .json is none" in reasons["x/a"]
    assert (reasons["x/b"], reasons["x/c"]) == ("its .json holds no object", "no caption")


# -- pictures that are none ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_picture_is_a_bad_sample_or_a_picture(kind: str, data: st.DataObject) -> None:
    whole = bytearray(picture((200, 30, 90), kind))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=6)):
        whole[at] = data.draw(st.integers(0, 255))
    try:
        assert square_of(bytes(whole[: data.draw(st.integers(0, len(whole)))]), 8).size == (8, 8)
    except BadImage as fault:
        assert "cannot be read" in str(fault)


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_a_decompression_bomb_is_a_bad_image(side: int) -> None:
    """A picture that unpacks to more than a photo holds is a bad sample."""
    bomb = bytearray(picture((0, 0, 0)))
    bomb[16:24] = side.to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(BadImage, match=r"cannot be read \(.*pixels"):
        square_of(bytes(bomb), 8)


def test_a_script_that_calls_itself_a_picture_is_not_run() -> None:
    with pytest.raises(BadImage, match="cannot identify image file"):
        square_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", 8)


def test_what_a_source_knows_about_an_image_is_in_the_shards(imagenet: Path) -> None:
    source = source_of(type="class_folders", path=str(imagenet / "train"), names=str(imagenet / "LOC_synset_mapping.txt"))
    config = DataConfig(source=source, image_size=8, heldout_fraction=0.5)
    manifests = prepare_images(config, str(imagenet / "out"))
    samples_seen = set()
    for split, manifest in manifests.items():
        for sample in read_shard(str(imagenet / "out" / split / "00000.tar"), "", manifest.shards[0]):
            assert Image.open(io.BytesIO(sample["png"])).size == (8, 8)
            samples_seen.add((json.loads(sample["json"])["label"], sample["txt"].decode()))
    assert samples_seen == {(0, "a photo of a tench"), (1, "a photo of a goldfish"), (2, "a photo of a great white shark")}
