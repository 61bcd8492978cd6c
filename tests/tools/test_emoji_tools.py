"""The quick start's drawings are a part of the full set, split as that is; and what a blind judge of pictures is shown and asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import oar_scale
from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import DataConfig
from oar_scale.data.manifest import read_manifest
from oar_scale.data.prepare import images_of_split, prepare_images
from oar_scale.data.sources import SourceImage
from oar_scale.errors import UserError
from tools import quickstart_data, recognition

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SPLITS = ("train", "heldout", "test")
WHOSE = "Drawings by Somebody (CC BY 4.0)"


def emoji_recipe(folder: Path, adjective: str = "small") -> str:
    """A recipe with 40 families of three variants, whose pictures of 8 px all differ, split by family."""
    folder.mkdir(parents=True)
    rows = [(f"v{number}.png", f"{adjective} thing {number // 3}, style {number % 3}", f"family {number // 3}") for number in range(120)]
    for number, (file, _, _) in enumerate(rows):
        Image.new("RGB", (8, 8), (number, 255 - number, 7)).save(folder / file)
    lines = [f'{file},"{caption}",{file},{family}' for file, caption, family in rows]
    (folder / "table.csv").write_text("\n".join(["image,caption,name,family", *lines]))
    source = {"type": "table", "path": str(folder / "table.csv"), "name": "name", "family": "family", "attribution": WHOSE}
    data = {"source": source, "image_size": 8, "heldout_fraction": 0.3, "test_fraction": 0.3, "split_by": "family"}
    (folder / "recipe.yaml").write_text(json.dumps({"name": "things", "data": data}))
    return str(folder / "recipe.yaml")


def by_name(images: list[SourceImage]) -> dict[str, tuple[str, str, bytes]]:
    """Family, caption and pixels of images."""
    contents = {image.name: (image.family, image.read(8)) for image in images}
    return {name: (family, content.caption, content.image.tobytes()) for name, (family, content) in contents.items()}


def test_the_quick_start_is_split_as_the_full_set_is(tmp_path: Path) -> None:
    """Whole families, in the same splits, with captions, pixels and attribution as they were."""
    recipe, target = emoji_recipe(tmp_path / "full"), tmp_path / "packed" / "emoji.parquet"
    quickstart_data.write(recipe, target, share=0.5)
    full = load_recipe(recipe).data
    packed = load_recipe(recipe, [f"data.source.path={target}"]).data
    chosen = set[str]()
    for split in SPLITS:
        whole, part = (by_name(images_of_split(data, split)) for data in (full, packed))
        assert 0 < len(part) < len(whole)
        families = {family for family, _, _ in part.values()}
        assert part == {name: image for name, image in whole.items() if image[0] in families}
        chosen |= families
    assert 10 < len(chosen) < 30, "about half of the forty families"
    manifests = prepare_images(packed, str(tmp_path / "images"))
    assert {split: manifest.attribution for split, manifest in manifests.items()} == dict.fromkeys(SPLITS, WHOSE)


def test_the_shipped_drawings_carry_their_attribution() -> None:
    """With the licence of each set, in the recipe that reads them and in NOTICE, which goes wherever the file goes."""
    full, shipped = (load_recipe(str(RECIPES / f"{name}.yaml")).data.source for name in ("emoji", "quickstart"))
    assert shipped.attribution == full.attribution  # type: ignore[union-attr]
    notice = (RECIPES.parent / "NOTICE").read_text()
    for title, licence in (("Noto Emoji", "Apache-2.0"), ("Fluent Emoji", "MIT"), ("Twemoji", "CC-BY-4.0")):
        assert re.search(rf"{title} by [^()]+ \({licence}\)", shipped.attribution)  # type: ignore[union-attr]
        assert title in notice


def test_a_recipe_without_families_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("name: plain\n")
    with pytest.raises(UserError, match=rf"{recipe}: data\.source is no table with families"):
        quickstart_data.write(str(recipe), tmp_path / "emoji.parquet", share=0.5)
    assert not (tmp_path / "emoji.parquet").exists()


@pytest.mark.parametrize("share", [0, -0.5, 7, float("nan"), 1e-9])
def test_a_share_without_drawings_leaves_the_file_as_it_was(tmp_path: Path, share: float) -> None:
    target = tmp_path / "emoji.parquet"
    target.write_bytes(b"as it was")
    with pytest.raises(UserError, match=rf"--share {share:g}: (it is of the families, above 0|no family of .*table\.csv falls into it)"):
        quickstart_data.write(emoji_recipe(tmp_path / "full"), target, share)
    assert target.read_bytes() == b"as it was"


# -- recognition ---------------------------------------------------------------------------------------------------------------


class Painter:
    """Draws pictures in greys that no real drawing has: the n-th caption that it is given as n."""

    def __init__(self) -> None:
        self.grey: dict[str, int] = {}

    def sample(self, captions: list[str], seed: int) -> list[Image.Image]:
        for caption in captions:
            self.grey.setdefault(caption, len(self.grey))
        return [Image.new("RGB", (8, 8), (self.grey[caption],) * 3) for caption in captions]


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    """Instead of a model; six pictures of each kind."""
    drawer = Painter()
    monkeypatch.setattr(oar_scale, "load", lambda model: drawer)
    monkeypatch.setattr(recognition, "EACH", 6)
    return drawer


def judged(folder: Path, adjective: str = "small") -> tuple[Path, DataConfig]:
    """Sheets of a run, and where its drawings come from."""
    data = load_recipe(emoji_recipe(folder / "full", adjective)).data
    prepare_images(data, str(folder / "run" / "images"))
    recognition.write_sheets(str(folder / "run"), "model", folder / "judged")
    return folder / "judged", data


def test_sheets_show_no_captions_and_number_as_the_key_does(painter: Painter, tmp_path: Path) -> None:
    """The same pictures under other captions make the same files, but for the key."""
    out, data = judged(tmp_path / "one")
    grey = dict(painter.grey)
    painter.grey.clear()
    other = judged(tmp_path / "two", "large")[0]
    assert {file.name for file in out.iterdir()} == {"sheet1.png", "key.json"}
    assert (out / "sheet1.png").read_bytes() == (other / "sheet1.png").read_bytes()
    key = json.loads((out / "key.json").read_text())
    assert [entry["number"] for entry in key] == list(range(1, 19))
    kinds = [entry["kind"] for entry in key]
    assert {kind: kinds.count(kind) for kind in recognition.KINDS} == dict.fromkeys(recognition.KINDS, 6)
    assert kinds != sorted(kinds) and kinds != sorted(kinds, key=recognition.KINDS.index), "shuffled"
    real = {caption: tuple(pixels[:3]) for _, caption, pixels in by_name(images_of_split(data, "test")).values()}
    sheet = np.asarray(Image.open(out / "sheet1.png").convert("RGB"))
    side = recognition.SIDE
    for place, entry in enumerate(key):
        row, column = divmod(place, recognition.COLUMNS)
        shown = tuple(sheet[row * (side + 30) + 20 + side // 2, column * (side + 10) + 5 + side // 2])
        caption = entry["caption"]
        assert shown == (real[caption] if entry["kind"] == "real" else (grey[caption],) * 3)


def test_new_captions_are_of_families_not_in_training(painter: Painter, tmp_path: Path) -> None:
    """And a caption that is drawn is not beside a real drawing of it, which would give it away."""
    out, data = judged(tmp_path)
    families = {split: {caption: family for family, caption, _ in by_name(images_of_split(data, split)).values()} for split in SPLITS}
    key = json.loads((out / "key.json").read_text())
    captions = {kind: {entry["caption"] for entry in key if entry["kind"] == kind} for kind in recognition.KINDS}
    assert captions["train"] <= families["train"].keys()
    assert captions["test"] | captions["real"] <= families["test"].keys() and not captions["test"] & captions["real"]
    assert not {families["test"][caption] for caption in captions["test"]} & set(families["train"].values())


def test_a_split_that_is_too_small_leaves_no_sheets(painter: Painter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recognition, "EACH", 60)
    with pytest.raises(UserError, match=r"images/test: has \d+ drawings, and 120 are needed"):
        judged(tmp_path)
    assert read_manifest(str(tmp_path / "run/images/test")).samples < 120
    assert not (tmp_path / "judged").exists()


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """Four pictures, and a judge's answers."""
    kinds = ["real", "test", "train", "test"]
    key = [{"number": number, "kind": kind, "caption": f"thing {number}"} for number, kind in enumerate(kinds, 1)]
    (tmp_path / "key.json").write_text(json.dumps(key))
    (tmp_path / "answers.txt").write_text("4: ?\n\n1: a cat: grey\n 2 :a dog\n3: ?\n")
    return tmp_path


def test_count_is_of_what_the_scores_say(answered: Path, capsys: Any) -> None:
    recognition.count(answered)
    assert (answered / "pairs.txt").read_text() == "1 | thing 1 | a cat: grey\n2 | thing 2 | a dog\n3 | thing 3 | ?\n4 | thing 4 | ?\n"
    assert "scores.txt is still to come" in capsys.readouterr().out
    (answered / "scores.txt").write_text("1: 2\n2: 1\n3: 0\n4: 2\n")
    recognition.count(answered)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["test", "2", "1", "1", "0"], ["train", "1", "0", "0", "1"], ["real", "1", "1", "0", "0"]]


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        ("1: 2\n2: 1\n3: 0\n", r"scores\.txt: has no line for 4\. Write one for each: 7: 2"),
        ("1: 2\n2: 1\n3: 0\n4: 3\n", r"scores\.txt:4  '4: 3' is no line for a picture from 1 to 4\. Write: 7: 2, or 1, or 0"),
        ("1: 2\n\n2 1\n3: 0\n4: 0\n", r"scores\.txt:3  '2 1' is no line"),
        ("1: 2\n2:\n3: 0\n4: 0\n", r"scores\.txt:2  '2:' is no line"),
        ("1: 2\n2: 1\n3: 0\n4: 0\n5: 2\n", r"scores\.txt:5  '5: 2' is no line"),
        ("1: 2\n2: 1\n3: 0\n4: 0\n1: 1\n", r"scores\.txt:5  '1: 1': picture 1 has a line before, '2'\. Delete one"),
    ],
)
def test_a_line_that_is_missing_or_malformed_is_named(answered: Path, capsys: Any, scores: str, fault: str) -> None:
    (answered / "scores.txt").write_text(scores)
    with pytest.raises(UserError, match=fault):
        recognition.count(answered)
    assert "|" not in capsys.readouterr().out, "no table of a part of them"


def test_without_answers_count_says_what_to_write(answered: Path) -> None:
    (answered / "answers.txt").unlink()
    with pytest.raises(UserError, match=r"answers\.txt: is not there\. Write it, with a line for each picture from 1 to 4: 7: a red"):
        recognition.count(answered)
    (answered / "key.json").unlink()
    with pytest.raises(UserError, match=r"there is no key\.json here\. Make the sheets first: .*sheets"):
        recognition.count(answered)
