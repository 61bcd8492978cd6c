"""``oar edit`` on files: what is written, what is said, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_shards import bomb
from PIL import Image
from small_models import small_model

from oar_scale.cli import main
from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import Recipe
from oar_scale.data.images import decode_upright
from oar_scale.generation.picture_files import read_record
from oar_scale.model import save_model
from oar_scale.model.spec import ClassSpec
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, save_vq

SIDE = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run with a model of ten classes."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = {"image": {"multipliers": (1, 1, 1)}, "text": {"type": "labels", "classes": 10}}
    recipe = Recipe.model_validate({"name": "small", "data": {"image_size": SIDE}, "tokenizer": tokenizer, "sample": {"guidance": 1.0}})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": SIDE, "channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1, "latent_channels": 32}
    save_vq(str(folder / "tokenizers" / "vq.safetensors"), VQTokenizer(VQSpec(**sizes, codebook_size=7, codebook_dim=4)))
    for seed, name in enumerate(("ordered", "control")):
        save_model(str(folder / "models" / f"{name}.safetensors"), small_model(seed=seed, condition=ClassSpec(classes=10)))
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a square, a wide transparent and a turned picture, and a mask of the wide one; it is the working folder."""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(tmp_path / "square.png")
    Image.fromarray(random.integers(0, 256, (20, 36, 4), dtype=np.uint8)).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random.integers(0, 256, (20, 36, 3), dtype=np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    mask = np.zeros((20, 36), dtype=np.bool_)
    mask[3:9, 20:30] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(run: str, *arguments: str) -> int:
    return main(["edit", "--model", run, "--device", "cpu", "--prompt", "3", *arguments])


def outside(path: str, mask: np.ndarray) -> bytes:
    """The pixels of a picture that are not marked."""
    return np.asarray(decode_upright(Path(path).read_bytes(), path))[~mask].tobytes()


def test_an_edit_is_written_and_says_how_it_was_drawn(run: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit(run, "wide.png", "--mask", "mask.png") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("edited/wide.png: ") and line.endswith("of 9 cells drawn; at 12 x 7 pixels, enlarged to the picture's 36 x 20")
    mask = np.asarray(Image.open("mask.png"))
    with Image.open("edited/wide.png") as edited:
        assert (edited.mode, edited.size) == ("RGBA", (36, 20))
        assert (np.asarray(edited)[mask] != np.asarray(Image.open("wide.png"))[mask]).any()
    assert outside("edited/wide.png", mask) == outside("wide.png", mask)


def test_variations_of_several_pictures_become_several_files(run: str, pictures: Path) -> None:
    assert edit(run, "square.png", "turned.jpg", "--box", "0,0,8,4", "--variations", "2", "--seed", "4", "--strength", "1") == 0
    assert sorted(os.listdir("edited")) == ["square-1.png", "square-2.png", "turned-1.png", "turned-2.png"]
    assert Path("edited/square-1.png").read_bytes() != Path("edited/square-2.png").read_bytes()
    box = np.zeros((36, 20), dtype=np.bool_)  # upright, the turned picture is 20 x 36
    box[:4, :8] = True
    assert outside("edited/turned-2.png", box) == outside("turned.jpg", box)
    assert edit(run, "square.png", "--box", "0,0,8,4", "--seed", "4", "--out", "one.png") == 0
    assert Path("one.png").read_bytes() == Path("edited/square-1.png").read_bytes()


def test_how_it_is_drawn_is_said_by_options(run: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All settings of sampling, as in oar sample; the file names them."""
    changes = {"score": "sampled", "steps": 3, "top_p": 0.9, "min_p": 0.01, "guidance": 2.0, "guidance_schedule": "linear"}
    options = [argument for name, value in changes.items() for argument in ("-o", f"sample.{name}={value}")]
    start = ("-o", "sample.guidance_start=1.5")
    assert edit(run, "square.png", "--box", "0,0,8,8", *options, *start, "--out", "other.png") == 0
    record = read_record(Path("other.png").read_bytes())
    assert record is not None
    assert {**changes, "guidance_start": 1.5}.items() <= vars(record.settings).items()
    assert edit(run, "square.png", "--box", "0,0,8,8", "-o", "sample.order=halton", "--out", "halton.png") == 0
    record = read_record(Path("halton.png").read_bytes())
    assert record is not None and record.order == "halton"
    for option, complaint in (
        ("sample.score=gt_logprob", "sample.score = gt_logprob"),
        ("sample.topp=1", "Did you mean sample.top_p?"),
        ("seed=1", "Of what it says only fields of sample can be changed"),
    ):
        capsys.readouterr()
        assert edit(run, "square.png", "--box", "0,0,8,8", "-o", option) == 2
        assert complaint in capsys.readouterr().err


def test_many_variations_are_drawn_in_parts_and_are_the_same(run: str, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = ("square.png", "turned.jpg", "--box", "0,0,8,4", "--variations", "3")
    assert edit(run, *several) == 0
    monkeypatch.setattr("oar_scale.commands.edit.VARIATIONS_AT_ONCE", 2)
    assert edit(run, *several, "--out", "parts") == 0
    for name in os.listdir("edited"):
        assert Path("parts", name).read_bytes() == Path("edited", name).read_bytes()


def test_a_picture_grows_and_stays_what_it_was_inside(run: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit(run, "wide.png", "turned.jpg", "--expand", "left=4,bottom=3") == 0
    for path, size in (("wide.png", (36, 20)), ("turned.jpg", (20, 36))):
        before = np.asarray(decode_upright(Path(path).read_bytes(), path))
        after = np.asarray(Image.open(Path("edited", path).with_suffix(".png")))
        assert after.shape[:2] == (size[1] + 3, size[0] + 4) and np.array_equal(after[: size[1], 4:], before)
        assert len(np.unique(after[size[1] :, 4:], axis=1)) > 1
    capsys.readouterr()
    for margins in ("left=0", "top=9000000"):
        assert edit(run, "wide.png", "--expand", margins) == 2
        assert "each must be 0 or more, one more, and the page may have 67108864 pixels" in capsys.readouterr().err


def test_another_model_of_the_run_draws_otherwise(run: str, pictures: Path) -> None:
    for name in ("ordered", "control"):
        assert edit(run, "square.png", "--box", "0,0,12,8", "--which", name, "--out", f"{name}.png") == 0
    assert Path("ordered.png").read_bytes() != Path("control.png").read_bytes()


def test_what_cannot_be_edited_is_explained(run: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (SIDE, SIDE), 0).save("empty.png")
    Image.new("L", (SIDE, SIDE), 255).save("full.png")
    Image.new("RGB", (SIDE, SIDE), "red").save("red.png")
    Image.new("RGBA", (SIDE, SIDE)).save("clear.png")
    Path("huge.png").write_bytes(bomb(20_000, 20_000))
    Image.new("RGB", (1, 1)).save("dot.png")
    Path("text.png").write_text("no picture")
    Path("other").mkdir()
    Path("other/square.png").write_bytes(Path("square.png").read_bytes())
    before = {name: Path(name).read_bytes() for name in ("square.png", "mask.png", "wide.png")}
    box = ("--box", "0,0,4,4")
    for arguments, complaint in (
        (("square.png", "--mask", "mask.png"), "mask.png (the mask of square.png) has 36 x 20 pixels, the picture (upright) 12 x 12"),
        (("square.png", "--mask", "empty.png"), "marks nothing: white is drawn, black is kept"),
        (("square.png", "--keep", "full.png"), "full.png (the mask of square.png) marks nothing: black is drawn, white is kept"),
        (("square.png", "--keep", "empty.png", "--keep", "full.png"), "2 masks for 1 pictures"),
        (("mask.png", "--keep", "mask.png", "--out", "."), "would replace mask.png"),
        (("square.png", *box, "--prompt", "x" * 10_000), "'xxx"),
        (("square.png", *box, "--prompt", "\u202e\u0634\u0645\u0633 \U0001f34e"), "is no class label"),
        (("square.png", *box, "--prompt", ""), "'' is no class label"),
        (("square.png", "--mask", "full.png"), "the whole picture is marked, so nothing of it would be known"),
        (("square.png", "--mask", "red.png"), "has colours. Save it in black"),
        (("square.png", "--mask", "clear.png"), "is transparent, and what that means is not agreed upon"),
        (("dot.png", "--box", "0,0,1,1"), "dot.png: the whole picture is marked"),
        (("huge.png", *box), "huge.png cannot be read (it has too many pixels, the limit is 67108864). Scale it down"),
        (("text.png", *box), "text.png cannot be read"),
        (("gone.png", *box), "gone.png: no such file"),
        (("square.png", "--mask", "gone.png"), "gone.png: no such file"),
        (("other", *box), "other: Is a directory. This is a folder"),
        (("square.png", "--box", "0,0,13,4"), "square.png: box (0, 0, 13, 4) (left, top, right, bottom) does not lie inside 12 x 12"),
        (("square.png", *box, "--strength", "0"), "strength 0.0 must be above 0"),
        (("square.png", *box, "--prompt", "a cat"), "'a cat' is no class label"),
        (("square.png", *box, "--out", "."), "would replace square.png"),
        (("square.png", *box, "--out", "a.JPG"), "--out a.JPG: pictures are written as PNG"),
        (("square.png", *box, "--out", "square.png"), "square.png would replace square.png"),
        (("wide.png", "--mask", "mask.png", "--out", "./mask.png"), "mask.png would replace mask.png"),
        (("square.png", *box, "--variations", "100000000"), "variations 100000000 must be a whole number from 1 to 65536"),
        (("square.png", "other/square.png", *box), "edited/square.png would replace square.png, or its edit"),
        (("square.png", *box, "--variations", "2", "--out", "a.png"), "--out a.png is one file, and there will be more"),
        (("square.png", "--mask", "empty.png", "--mask", "full.png"), "2 masks for 1 pictures"),
        (("square.png", *box, "--which", "base"), "has no model 'base'"),
        (("square.png", *box, "--model", "nowhere"), "nowhere: neither an exported folder"),
    ):
        assert edit(run, *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert complaint in error and "Traceback" not in error, error
    assert {name: Path(name).read_bytes() for name in before} == before


def test_what_is_kept_is_the_other_way_round(run: str, pictures: Path) -> None:
    Image.fromarray(~np.asarray(Image.open("mask.png"))).save("inverse.png")
    assert edit(run, "wide.png", "--mask", "mask.png", "--out", "masked.png") == 0
    assert edit(run, "wide.png", "--keep", "inverse.png", "--out", "kept.png") == 0
    assert Path("masked.png").read_bytes() == Path("kept.png").read_bytes()


def test_regions_have_prompts_of_their_own(run: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.asarray(Image.open("mask.png"))
    other = np.zeros_like(mask)
    other[12:, :10] = True
    Image.fromarray(other).save("other.png")
    for name, label in (("a", "4"), ("b", "5")):
        regions = ("--region", "mask.png", "3", "--region", "other.png", label)
        assert main(["edit", "--model", run, "--device", "cpu", "wide.png", *regions, "--out", f"{name}.png"]) == 0
        assert " of 18 cells drawn in 2 steps; at 12 x 7 pixels" in capsys.readouterr().out
        assert outside(f"{name}.png", mask | other) == outside("wide.png", mask | other)
    first, second = np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png"))
    assert np.array_equal(first[mask], second[mask]) and not np.array_equal(first[other], second[other])
    assert main(["edit", "--model", run, "wide.png", "--region", "mask.png", "3", "--region", "mask.png", "4"]) == 2
    assert "error: wide.png: regions 1 and 2 both mark 60 pixels" in capsys.readouterr().err


def test_large_pictures_are_drawn_by_windows_and_say_so(run: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit(run, "wide.png", "--mask", "mask.png", "--windows") == 0
    assert re.search(r" cells drawn in [23] steps, by windows of 12 x 12 pixels; at the picture's own resolution", capsys.readouterr().out)
    mask = np.asarray(Image.open("mask.png"))
    assert outside("edited/wide.png", mask) == outside("wide.png", mask)
    assert edit(run, "wide.png", "--expand", "left=4", "--no-windows") == 0
    assert "; at 12 x 6 pixels, enlarged to the picture's 40 x 20" in capsys.readouterr().out


def test_without_a_mark_a_share_of_the_whole_picture_is_drawn(run: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit(run, "square.png", "--strength", "0.4", "--variations", "2") == 0
    assert capsys.readouterr().out.count("4 of 9 cells drawn\n") == 2
    assert Path("edited/square-1.png").read_bytes() != Path("edited/square-2.png").read_bytes()


def test_a_damaged_model_is_named_and_nothing_is_written(run: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, "damaged")
    model = small_model(condition=ClassSpec(classes=10))
    with torch.no_grad():
        model.tok_embeddings.weight.fill_(torch.nan)
    save_model("damaged/models/ordered.safetensors", model)
    for strength in ("1", "0.5"):
        assert edit("damaged", "square.png", "--box", "0,0,8,4", "--strength", strength) == 2
        assert "damaged: the model's scores are not numbers (NaN)" in capsys.readouterr().err
    assert not Path("edited").exists()


def test_what_says_too_little_is_explained(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit(run, "square.png") == 2
    assert "one of --mask, --keep, --box, --expand and --region is required, or --strength below 1" in capsys.readouterr().err
    for arguments in (["--box", "0,0,4,4"], ["--prompt", "3", "--region", "mask.png", "3"]):
        assert main(["edit", "square.png", "--model", run, *arguments]) == 2
        assert "--prompt is required, but with --region FILE PROMPT" in capsys.readouterr().err
    assert edit(run, "square.png", "--expand", "left=4", "--strength", "0.5") == 2
    assert "--strength 0.5 means nothing with --expand" in capsys.readouterr().err
    assert main(["edit", "square.png", "--model", run, *["--region", "mask.png", "3"] * 30]) == 2
    assert "--region: 30 regions, and a picture's record holds 29. Draw the others in the edited picture." in capsys.readouterr().err


def test_a_box_that_is_none_and_two_marks_are_usage_errors(run: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        (("square.png", "--box", "1,2,3"), "are no four whole numbers with commas between"),
        (("square.png", "--expand", "leftwards=3"), "names no sides and pixels, as in left=64,top=0"),
        (("square.png", "--expand", "left=3,left=4"), "names no sides and pixels"),
        (("square.png", "--expand", "left=-3"), "names no sides and pixels"),
        (("square.png", "--box", "0,0,4,4", "--mask", "mask.png"), "not allowed with"),
        (("square.png", "--box", "0,0,4,4", "--strength", "nan"), "'nan' is no number from 0 to 1"),
    ):
        with pytest.raises(SystemExit) as ended:
            edit(run, *arguments)
        assert ended.value.code == 2 and complaint in capsys.readouterr().err


def test_another_folder_than_the_repository_has_no_model_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["edit", "cat.png", "--box", "0,0,8,8", "--prompt", "a cat"]) == 2
    assert "error: --model is required here" in capsys.readouterr().err
