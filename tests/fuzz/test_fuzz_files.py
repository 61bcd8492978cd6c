"""Hostile recipes, profiles, pictures, samples and tables.

Each example is a command of ``oar`` on input that is valid but for something: it ends with one clear error, or with what it could do
(``sandbox.py`` has the list of what it must not). docs/results/fuzz.md has the long runs.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

from foreign_shards import img2dataset_sample, token_sample, write_tar
from hypothesis import given
from hypothesis import strategies as st
from sandbox import oar
from strategies import PATIENCE, VALUES, WORDS, damaged, document, fuzz, json_files, noise, pictures

pytestmark = PATIENCE
ROOT = Path(__file__).resolve().parents[2]


RECIPES = [document(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))]
PROFILES = [document(path) for path in sorted((ROOT / "cluster" / "slurm").glob("*.yaml"))]


@fuzz
@given(data=st.data())
def test_fuzzed_recipes_are_read_or_refused(folder: Path, data: st.DataObject) -> None:
    content = data.draw(json_files(data.draw(st.sampled_from(RECIPES))))
    (folder / "fuzzed.yaml").write_bytes(content.replace(b"base/", str(ROOT / "recipes" / "base").encode() + b"/"))
    key = data.draw(st.sampled_from(["name", "run_dir", "storage.root", "data.source", "model", "pretrain.lr", "a.b", "", ".", "extends"]))
    value = data.draw(st.sampled_from(WORDS[:-1]))
    oar(folder, "recipe", "fuzzed.yaml", *data.draw(st.sampled_from([[], ["-o", f"{key}={value}"], ["--origin"]])))


@fuzz
@given(data=st.data())
def test_fuzzed_profiles_are_rendered_or_refused(folder: Path, run: Path, data: st.DataObject) -> None:
    (folder / "profile.yaml").write_bytes(data.draw(json_files(data.draw(st.sampled_from(PROFILES)))))
    oar(folder, "submit", "run.yaml", "--cluster", "profile.yaml", "--dry-run")


# -- pictures, samples, tables ----------------------------------------------------------------------------------------------


def check_shards(folder: Path) -> None:
    """All that ``oar data`` does without Ray, on the shards in ``shards``."""
    for command in (["index", "shards"], ["verify", "shards"], ["stats", "shards", "--grid", "grid.png"], ["index", "shards", "--force"]):
        oar(folder, "data", *command)


@fuzz
@given(data=st.data())
def test_fuzzed_pictures_are_decoded_or_named(folder: Path, data: st.DataObject) -> None:
    shutil.rmtree(folder / "shards", ignore_errors=True)
    (folder / "shards").mkdir()
    suffix = data.draw(st.sampled_from(["jpg", "png", "webp", "JPG"]))
    samples = [{"__key__": f"{number:05d}", suffix: data.draw(pictures()), "txt": b"a cat"} for number in range(3)]
    write_tar(folder / "shards" / "00000.tar", samples)
    check_shards(folder)


@fuzz
@given(data=st.data())
def test_fuzzed_samples_are_read_or_named(folder: Path, data: st.DataObject) -> None:
    shutil.rmtree(folder / "shards", ignore_errors=True)
    (folder / "shards").mkdir()
    make = data.draw(st.sampled_from([img2dataset_sample, token_sample]))
    samples = []
    for number in range(3):
        sample: dict[str, Any] = make(number)
        member = data.draw(st.sampled_from([*sorted(set(sample) - {"__key__"}), "txt", "json", "cls", "codes.npy"]))
        hostile = st.one_of(
            st.binary(max_size=40), st.text(max_size=40).map(lambda text: text.encode("utf-16")), json_files({"caption": "a"})
        )
        old = sample.get(member)
        sample[member] = data.draw(damaged(old)) if isinstance(old, bytes) and data.draw(st.booleans()) else data.draw(hostile)
        samples.append(sample)
    path = folder / "shards" / "00000.tar"
    write_tar(path, samples)
    if data.draw(st.integers(0, 3)) == 0:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    check_shards(folder)


def source_recipe(folder: Path, source: dict[str, Any]) -> None:
    """A recipe whose images come from there, for ``oar prepare``."""
    shutil.rmtree(folder / "prepared", ignore_errors=True)
    recipe = {"name": "fuzz", "run_dir": "prepared", "data": {"source": source, "samples_per_shard": 2, "canonical_streams": 1}}
    (folder / "prepare.yaml").write_text(json.dumps(recipe))


def picture_folder(folder: Path) -> Path:
    target = folder / "pictures"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for number in range(4):
        noise((9, 7)).save(target / f"p{number}.png")
    return target


@fuzz
@given(data=st.data())
def test_fuzzed_tables_are_read_or_refused(folder: Path, data: st.DataObject) -> None:
    images = picture_folder(folder)
    rows = [{"path": f"p{number}.png", "caption": f"a cat {number}", "label": str(number)} for number in range(4)]
    for row in data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=3)):
        row[data.draw(st.sampled_from(["path", "caption", "label"]))] = str(data.draw(VALUES)).replace(
            "\x00", data.draw(st.sampled_from(["", "\x00"]))
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, ["path", "caption", "label"], delimiter=data.draw(st.sampled_from([",", "\t", ";"])))
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode(data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])), errors="surrogatepass")
    table = images / data.draw(st.sampled_from(["t.csv", "t.tsv"]))
    table.write_bytes(data.draw(damaged(content)) if data.draw(st.integers(0, 3)) == 0 else content)
    source_recipe(folder, {"type": "table", "path": f"pictures/{table.name}", "image": "path", "caption": "caption"})
    oar(folder, "prepare", "prepare.yaml")


@fuzz
@given(data=st.data())
def test_fuzzed_parquet_tables_are_read_or_refused(folder: Path, data: st.DataObject) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = picture_folder(folder)
    pixels = [path.read_bytes() for path in sorted(images.glob("*.png"))]
    columns: dict[str, Any] = {
        "path": [f"p{number}.png" for number in range(4)],
        "caption": ["a cat"] * 4,
        "image": [{"bytes": each, "path": "x.png"} for each in pixels],
    }
    name = data.draw(st.sampled_from(sorted(columns)))
    others = data.draw(
        st.sampled_from(
            [
                [1, 2, 3, 4],
                [b"\xff", b"a", None, b""],
                ["", None, LONGER, "a\x00"],
                [float("nan")] * 4,
                [[1], [], None, [2, 3]],
                [{"a": 1}] * 4,
            ]
        )
    )
    columns[name] = others
    table = pa.table(columns)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=2)
    content = buffer.getvalue()
    (images / "t.parquet").write_bytes(data.draw(damaged(content)) if data.draw(st.integers(0, 2)) == 0 else content)
    source_recipe(
        folder,
        {"type": "table", "path": "pictures/t.parquet", "image": data.draw(st.sampled_from(["path", "image"])), "caption": "caption"},
    )
    oar(folder, "prepare", "prepare.yaml")


LONGER = "y" * 200_000


@fuzz
@given(data=st.data())
def test_fuzzed_folders_are_read_or_refused(folder: Path, data: st.DataObject) -> None:
    images = picture_folder(folder)
    for number in range(2):
        (images / f"p{number}.txt").write_bytes(
            data.draw(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-16"))))
        )
        (images / f"p{number}.json").write_bytes(data.draw(json_files({"caption": "a cat", "name": "x", "family": "f"})))
    (images / "p2.png").write_bytes(data.draw(pictures()))
    name = data.draw(
        st.binary(min_size=1, max_size=20)
        .map(lambda raw: raw.replace(b"/", b"").replace(b"\0", b""))
        .filter(lambda raw: raw not in (b"", b".", b".."))
    )
    with open(os.path.join(os.fsencode(images), name + b".png"), "wb") as file:
        file.write((images / "p3.png").read_bytes())
    link = images / data.draw(st.sampled_from(["loop", "up", "broken", "dot"]))
    link.symlink_to({"loop": images, "up": "..", "broken": "nothing", "dot": "."}[link.name])
    source_recipe(folder, {"type": "folder", "path": "pictures"})
    oar(folder, "prepare", "prepare.yaml")
