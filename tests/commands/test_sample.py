"""``oar sample`` from an exported folder: sheets, files with metadata, animations, and what is said where it cannot be."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

import oar_scale
from oar_scale.cli import main
from oar_scale.generation import pretrained
from oar_scale.generation.picture_files import read_record
from oar_scale.generation.wanted_pictures import WantedPicture
from oar_scale.storage import open_storage

EMOJI = str(Path(__file__).resolve().parents[2] / "recipes" / "weights" / "emoji")
QUICK = ("--device", "cpu", "-o", "sample.steps=4")
"""Four passes instead of 64."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sample(*arguments: str) -> int:
    return main(["sample", EMOJI, *QUICK, *arguments])


def pixels(path: Path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


def test_files_are_those_of_python_and_say_how_they_were_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--seed", "3", "--count", "2", "--order", "random", "--out", "out", "--batch", "3", "a red apple", "قطة 😺") == 0
    names = ["000000-a-red-apple.png", "000000_1-a-red-apple.png", "000001.png", "000001_1.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert capsys.readouterr().out == "out: 4 pictures drawn\n"
    numbers = [0, 1 << 32, 1, 1 + (1 << 32)]
    captions = ["a red apple", "a red apple", "قطة 😺", "قطة 😺"]
    drawn = oar_scale.load(EMOJI).sample(captions, seed=3, images=numbers, order="random", steps=4)
    for name, picture, caption, number in zip(names, drawn, captions, numbers, strict=True):
        assert pixels(tmp_path / "out" / name) == picture.tobytes()
        record = read_record((tmp_path / "out" / name).read_bytes())
        assert record is not None
        assert (record.prompt, record.seed, record.number, record.order, record.settings.steps) == (caption, 3, number, "random", 4)


def test_missing_files_are_drawn_and_the_others_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.csv").write_text('caption,number,seed\n"a red apple",7,\na smiling cat,2,5\n')
    assert sample("--prompts", "prompts.csv", "--out", "out") == 0
    apple, cat = tmp_path / "out" / "000007-a-red-apple.png", tmp_path / "out" / "000002-a-smiling-cat.png"
    files, times = [apple.read_bytes(), cat.read_bytes()], cat.stat().st_mtime_ns
    apple.unlink()
    assert sample("--prompts", "prompts.csv", "--out", "out") == 0
    assert capsys.readouterr().out.endswith("out: 1 pictures drawn, 1 were there\n")
    assert [apple.read_bytes(), cat.read_bytes()] == files and cat.stat().st_mtime_ns == times
    assert read_record(files[1]).seed == 5  # type: ignore[union-attr]


def test_other_settings_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--out", "out", "a red apple") == 0
    before = (tmp_path / "out" / "000000-a-red-apple.png").read_bytes()
    for change, says in (
        (("--seed", "1"), "was drawn with seed 0, now it is 1"),
        (("-o", "sample.top_k=3"), "was drawn with top_k 0, now it is 3"),
        (("--order", "halton"), "was drawn with order confidence, now it is halton"),
        (("--precision", "bf16"), "was drawn with dtype float32, now it is bfloat16"),
    ):
        assert sample("--out", "out", "a red apple", "a smiling cat", *change) == 2
        assert says in capsys.readouterr().err
        assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [before]


def test_picture_of_another_origin_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "out" / "000000-a-cat.png")
    assert sample("--out", "out", "a cat") == 2
    assert "000000-a-cat.png is there already, and does not say how it was drawn" in capsys.readouterr().err


def test_sheet_has_a_row_for_each_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--seed", "3", "--count", "2", "a red apple", "a smiling cat") == 0
    assert capsys.readouterr().out.splitlines() == ["  row 1: a red apple", "  row 2: a smiling cat", "samples.png"]
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))
    assert sheet.shape == (2 * 128 + 8, 2 * 128 + 8, 3)
    cat = oar_scale.load(EMOJI).sample(["a smiling cat"], seed=3, images=[1 + (1 << 32)], steps=4)[0]
    assert np.array_equal(sheet[136:, 136:], np.asarray(cat.resize((128, 128), Image.Resampling.NEAREST)))


def test_one_picture_is_itself_and_drawn_again(tmp_path: Path) -> None:
    assert sample("--count", "1", "--out", "apple.png", "--precision", "bf16", "--seed", "-4", "a red apple") == 0
    assert Image.open("apple.png").size == (32, 32)
    assert main(["sample", EMOJI, "--again", "apple.png", "--out", "again.png"]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "apple.png").read_bytes()
    for out in ("apple.png", "again.jpg"):
        assert main(["sample", EMOJI, "--again", "apple.png", "--out", out]) == 2
    assert sorted(os.listdir(tmp_path)) == ["again.png", "apple.png"]


@pytest.mark.parametrize("name", ["drawing.gif", "drawing.webp"])
def test_animation_shows_cells_in_their_order(name: str, tmp_path: Path) -> None:
    assert sample("--count", "2", "--order", "raster", "--frames", name, "a red apple") == 0
    frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(Image.open(name))]
    assert len(frames) == 65
    changed = [np.flatnonzero((after != before).any(2).any(1)) for before, after in pairwise(frames)]
    rows = [int(lines.min()) for lines in changed if len(lines)]
    assert rows == sorted(rows) and rows[-1] > rows[0]
    last = np.asarray(Image.open("samples.png")).astype(int)
    assert np.abs(frames[-1][:128, :128] - last[:128, :128]).mean() < (0.5 if name.endswith("webp") else 6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a cat", " "), "a caption is empty"),
        ((), "there are no held-out captions here"),
        (("--prompts", "none.txt"), "none.txt: no such file"),
        (("--prompts", "none.txt", "a cat"), "in a file or on the command line"),
        (("--out", "a.jpg", "a cat"), "pictures are written as PNG"),
        (("--grid", "--out", "folder", "a cat"), "name a file .png"),
        (("--out", f"{EMOJI}/config.json", "a cat"), "this is a file"),
        (("--count", "65536", *["a cat"] * 16), "more than 1000000 pictures: a pool draws them"),
        (("--count", "65537", "a cat"), "at most 65536 drawings of a prompt"),
        (("--frames", "a.png", "a cat"), "a .gif or a .webp"),
        (("--frames", "a.gif", "--count", "65", "a cat"), "65 pictures are too many"),
        (("--model", "control", "a cat"), "would be one of the models of a run"),
        (("-o", "sample.topp=1", "a cat"), "Did you mean sample.top_p?"),
        (("-o", "model.dim=8", "a cat"), "is no recipe"),
        (("--device", "tpu", "a cat"), "--device tpu: there are cpu"),
        (("--order", "hilbrt", "a cat"), "--order 'hilbrt': no such policy"),
        (("--again", "none.png"), "none.png: no such file"),
        (("--again", "none.png", "a cat"), "a caption means nothing with --again, the file says what is drawn: leave it out"),
        (("--again", "none.png", "-o", "sample.top_p=0.9"), "means nothing with --again"),
        (("--again", "none.png", "--seed", "1"), "--seed means nothing with --again"),
        (("--again", "none.png", "--actors", "2"), "--actors means nothing with --again"),
        (("--labels", "balanced", "--images", "10", "--count", "2"), "--count means nothing with --labels"),
        (("a cat", "--per-shard", "3"), "--per-shard means nothing without --actors"),
        (("--actors", "2", "--device", "cpu"), "--device means nothing with --actors"),
    ],
)
def test_what_cannot_be_drawn_is_said(arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", EMOJI, *(() if "--again" in arguments else QUICK), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_prompt_without_a_token_is_named_before_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ("a cat", "\u200b")))
    assert sample("--prompts", "prompts.jsonl", "--out", "out") == 2
    assert "prompts.jsonl:2: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_logits_that_are_no_numbers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ArithmeticError("the model's scores are not numbers")

    monkeypatch.setattr(pretrained, "generate", broken)
    assert sample("a cat") == 2
    assert "emoji: the model's scores are not numbers" in capsys.readouterr().err


def test_seed_of_more_than_64_bits_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["sample", EMOJI, "a cat"], ["edit", "a.png", "--box", "0,0,4,4", "--prompt", "a cat"]):
        with pytest.raises(SystemExit):
            main([*verb, "--seed", str(2**63)])
        assert "is no whole number from -2^63" in capsys.readouterr().err


def test_typing_error_in_a_recipe_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "none.yaml", "a cat"]) == 2
    assert "none.yaml: there is no such recipe" in capsys.readouterr().err


def test_files_go_to_s3_and_are_found_there(s3_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"{s3_root}/samples"
    assert sample("--out", out, "a cat") == sample("--out", f"{out}/", "a cat", "a dog") == 0
    assert capsys.readouterr().out == f"{out}: 1 pictures drawn\n{out}/: 1 pictures drawn, 1 were there\n"
    assert open_storage(out).list(out) == [f"{out}/000000-a-cat.png", f"{out}/000001-a-dog.png"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "000005_2-etc-passwd.png"),
        ("Crème brûlée №7!", "000005_2-creme-brulee-no7.png"),
        ("قطة", "000005_2.png"),
        ("CON\0\n\ud83d", "000005_2-con.png"),
        ("x" * 10_000, f"000005_2-{'x' * 40}.png"),
        (4, "000005_2.png"),
    ],
)
def test_file_names_are_safe(prompt: str | int, name: str) -> None:
    assert WantedPicture(prompt, 5, 2, 0).file == name
