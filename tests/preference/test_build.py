"""``oar study build``: which pictures are compared, and that a study tells nobody which arm drew them."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_study import CAPTIONS, drawings, open_png, picture, record, small_study

from oar_scale.cli import main
from oar_scale.errors import UserError
from oar_scale.generation.picture_files import encode_png
from oar_scale.preference.build import BuildRequest, build_study, choose_pairs
from oar_scale.preference.study import read_pictures, read_study


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def plain(folder: Path, pictures: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    return str(folder)


def build(tmp_path: Path, *arguments: str) -> int:
    return main(["study", "build", *arguments, "--out", str(tmp_path / "study")])


@given(items=st.integers(1, 40), arm_pairs=st.integers(1, 15), seed=st.integers(0, 5))
def test_every_beginning_of_the_pairs_is_balanced(items: int, arm_pairs: int, seed: int) -> None:
    chosen = list(choose_pairs(items, arm_pairs, seed))
    assert sorted(chosen) == [(item, pair) for item in range(items) for pair in range(arm_pairs)]
    of_items, of_arms = Counter(dict.fromkeys(range(items), 0)), Counter(dict.fromkeys(range(arm_pairs), 0))
    for item, pair in chosen:
        of_items[item] += 1
        of_arms[pair] += 1
        assert max(of_items.values()) - min(of_items.values()) <= 1
        assert max(of_arms.values()) - min(of_arms.values()) <= 2


def test_a_pair_shows_two_arms_drawings_of_one_prompt(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    pictures = read_pictures(str(tmp_path / "study"), study)
    assert sorted((pair.item, *(pair.arms or ())) for pair in study.pairs) == [
        (item, *arms) for item in range(len(CAPTIONS)) for arms in combinations(range(3), 2)
    ]
    for pair in study.pairs:
        assert pair.arms is not None and pair.caption is not None
        for arm, name in zip(pair.arms, pair.pictures, strict=True):
            assert np.array_equal(open_png(pictures[name]), picture(arm, CAPTIONS.index(pair.caption)))


def test_no_file_of_the_study_says_who_drew_it(tmp_path: Path) -> None:
    """Neither in a name, nor in what a picture holds beside its pixels."""
    study = small_study(tmp_path)
    for path in (tmp_path / "study" / "pictures").iterdir():
        data = path.read_bytes()
        assert path.name.removesuffix(".png") in study.pictures()
        assert not open_png(data).info and b"oar_scale" not in data and b"tEXt" not in data and b"iTXt" not in data
    assert [arm.models for arm in study.arms] == [(f"small {arm:016x}",) for arm in range(3)]  # the manifest does, which no rater sees


def test_the_same_folders_and_seed_make_the_same_study(tmp_path: Path) -> None:
    first, second = small_study(tmp_path / "1"), small_study(tmp_path / "2")
    assert first == second
    other = small_study(tmp_path / "3", seed=1)
    assert other.fingerprint != first.fingerprint and [pair.item for pair in other.pairs] != [pair.item for pair in first.pairs]


def test_a_check_is_a_picture_beside_its_own_pixels(tmp_path: Path) -> None:
    study = small_study(tmp_path, checks=5)
    pictures = read_pictures(str(tmp_path / "study"), study)
    assert len({check.item for check in study.checks}) == 5
    for check in study.checks:
        intact, scrambled = (np.asarray(open_png(pictures[name])).reshape(-1, 3) for name in check.pictures)
        assert any(check.pictures[0] in pair.pictures for pair in study.pairs if pair.item == check.item)
        assert not np.array_equal(intact, scrambled) and np.array_equal(np.unique(intact, axis=0), np.unique(scrambled, axis=0))


def test_other_pictures_are_paired_by_name(tmp_path: Path) -> None:
    ours = {
        "000001-a-red-apple.png": png(picture(1)),
        "cat.jpg": png(picture(2)),
        "only-ours.png": png(picture(3)),
        "cat.txt": b"a smiling cat\n",
    }
    arms = [
        plain(tmp_path / "ours", ours),
        plain(tmp_path / "theirs", {"cat.png": png(picture(4)), "000001-a-red-apple.webp": png(picture(5))}),
    ]
    assert build(tmp_path, f"ours={arms[0]}", f"theirs={arms[1]}", "--checks", "0") == 0
    study = read_study(str(tmp_path / "study"))
    assert sorted(str(pair.caption) for pair in study.pairs) == ["a red apple", "a smiling cat"]
    assert [arm.left_out for arm in study.arms] == [1, 0]


def test_several_drawings_of_a_prompt_are_paired_by_number(tmp_path: Path) -> None:
    for arm in range(2):
        files = {f"{name}.png": encode_png(picture(arm, number), record("a red apple", number)) for name, number in (("x", 0), ("y", 1))}
        plain(tmp_path / f"{arm}", files if arm else {f"other-{name}": data for name, data in files.items()})
    assert build(tmp_path, f"a={tmp_path / '0'}", f"b={tmp_path / '1'}", "--checks", "0") == 0
    study = read_study(str(tmp_path / "study"))
    pictures = read_pictures(str(tmp_path / "study"), study)
    shown = [[open_png(pictures[name]).tobytes() for name in pair.pictures] for pair in study.pairs]
    assert sorted(shown) == sorted([picture(0, number).tobytes(), picture(1, number).tobytes()] for number in range(2))


def test_the_same_picture_in_both_arms_is_no_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = png(picture(0))
    for arm in range(2):
        plain(tmp_path / f"{arm}", {"same.png": same, "other.png": png(picture(1, arm))})
    assert build(tmp_path, f"a={tmp_path / '0'}", f"b={tmp_path / '1'}", "--checks", "0") == 0
    study = read_study(str(tmp_path / "study"))
    assert (len(study.pairs), study.identical) == (1, 1)
    assert len(list((tmp_path / "study" / "pictures").iterdir())) == 2
    assert "1 pairs left out, whose two pictures are the same" in capsys.readouterr().out


def test_pictures_of_other_sizes_are_no_pair(tmp_path: Path) -> None:
    """Whoever sees a large picture beside a small one knows who drew which."""
    small = plain(tmp_path / "small", {"cat.png": png(picture(1)), "dog.png": png(picture(2))})
    large = plain(tmp_path / "large", {"cat.png": png(picture(3)), "dog.png": png(picture(4).resize((16, 16)))})
    assert_refused(
        tmp_path, (f"a={small}", f"b={large}"), r"small/dog\.png is 8 x 8 pixels and .*large/dog\.png 16 x 16: raters would tell"
    )


def test_what_variants_of_one_drawing_are_is_read_beside_them(tmp_path: Path) -> None:
    for arm in range(2):
        files = {f"{name}.png": png(picture(arm, at)) for at, name in enumerate(("wave-light", "wave-dark", "cat"))}
        about = {"wave-light.json": b'{"family": "wave"}', "wave-dark.json": b'{"family": "wave", "tone": 5}', "cat.json": b"{}"}
        plain(tmp_path / f"{arm}", files | (about if arm else {}))
    assert build(tmp_path, f"a={tmp_path / '0'}", f"b={tmp_path / '1'}", "--checks", "0") == 0
    study = read_study(str(tmp_path / "study"))
    assert {pair.caption: pair.family for pair in study.pairs} == {"wave light": "wave", "wave dark": "wave", "cat": None}
    (tmp_path / "1" / "cat.json").write_text("[]")
    assert build(tmp_path / "again", f"a={tmp_path / '0'}", f"b={tmp_path / '1'}", "--checks", "0") == 0
    assert {pair.family for pair in read_study(str(tmp_path / "again" / "study")).pairs} == {"wave", None}  # a list names none


def test_a_study_without_families_keeps_its_fingerprint(tmp_path: Path) -> None:
    """Studies that were built before there were any are read as they were."""
    study = small_study(tmp_path, names=("a", "b"))
    written = json.loads((tmp_path / "study" / "study.json").read_text())
    assert all("family" not in pair for pair in written["pairs"]) and study.fingerprint == written["fingerprint"]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one, other = drawings(tmp_path / "one", 0), drawings(tmp_path / "other", 1, ["something else"])
    (tmp_path / "empty").mkdir()
    broken = plain(tmp_path / "broken", {f"{number:06d}.png": b"\x89PNG\r\n" for number in range(len(CAPTIONS))})
    twice = plain(tmp_path / "twice", {name: encode_png(picture(7), record("a red apple")) for name in ("1.png", "2.png")})
    features = plain(tmp_path / "features", {"1.png": encode_png(picture(8), record(None))})
    for arms, words in (
        ((f"a={one}", f"b={other}"), "no prompt, seed and number is in all arms"),
        ((f"a={one}", f"b={tmp_path / 'empty'}"), "no picture in this folder"),
        ((f"a={one}", f"b={tmp_path / 'nowhere'}"), "b=.*nowhere: no such folder"),
        ((f"a={one}", f"b={tmp_path / 'one' / '000000.png'}"), "is a file, and a folder is wanted"),
        ((f"a={one}", f"b={broken}"), "broken.0000"),
        ((f"a={one}", f"b={twice}"), "drawings of the same prompt, seed and number"),
        ((f"a={one}", f"a={one}"), "same name"),
        ((f"a={one}",), "2 to 20"),
        ((f"a={one}", f"b={one}"), "every picture is the same"),
        ((f"a={features}", f"b={features}"), "--question"),
        ((f"a={one}", f"b={drawings(tmp_path / 'b', 1)}", "--pairs", "6"), "there are 5"),
        ((f"a={one}", f"b={tmp_path / 'b'}", "--checks", "6"), "--checks 6"),
        ((f"a={one}", f"b={tmp_path / 'b'}", "--question", " "), "--question has 1 characters"),
        ((f"a={one}", f"b={tmp_path / 'b'}", "--question", "x" * 1001), "--question has 1001 characters: .* at most 1000"),
    ):
        assert_refused(tmp_path, arms, words)


def assert_refused(tmp_path: Path, arms: tuple[str, ...], words: str) -> None:
    """One line that says it, and nothing that is half written."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=words):
        run_build(tmp_path, arms)
    assert sorted(tmp_path.iterdir()) == before


def run_build(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    from oar_scale.cli import _parser

    parsed = _parser().parse_args(["study", "build", *arguments, "--out", str(tmp_path / "study")])
    parsed.run(parsed)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("s3://bucket/study", "--out s3://bucket/study: a study is served from a local folder"),
        ("a/000000.png/study", r"a/000000\.png/study: (File exists|Not a directory)\. .*--out"),
    ],
)
def test_a_place_where_no_folder_can_be_is_named(out: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arms = [(name, drawings(Path(name), number)) for number, name in enumerate("ab")]
    with pytest.raises(UserError, match=words):
        build_study(BuildRequest(arms=arms, out=out), lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_study_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    assert small_study(tmp_path) == read_study(str(tmp_path / "study"))
    arms = [("a", str(tmp_path / "ordered")), ("b", str(tmp_path / "ordered"))]
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "none" / "study", tmp_path / "empty"):
        with pytest.raises(UserError, match="nothing to compare"):
            build_study(BuildRequest(arms=arms, out=str(out)), lambda text: None)
    assert not [*tmp_path.rglob("*.tmp")] and not (tmp_path / "none" / "study").exists() and (tmp_path / "empty").is_dir()


def test_a_study_with_answers_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_study(tmp_path)
    assert build(tmp_path, f"a={tmp_path / 'ordered'}", f"b={tmp_path / 'control'}") == 2
    assert "may hold answers" in capsys.readouterr().err


def test_a_study_that_was_changed_is_refused(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    folder = tmp_path / "study"
    file = folder / "pictures" / f"{study.pairs[0].pictures[0]}.png"
    file.write_bytes(png(picture(99)))
    with pytest.raises(UserError, match="is not the picture that the study was built with"):
        read_pictures(str(folder), study)
    file.unlink()
    with pytest.raises(UserError, match="Copy the whole folder again"):
        read_pictures(str(folder), study)
    manifest = json.loads((folder / "study.json").read_text())
    for change, words in (
        ({"question": "Which is worse?"}, "changed"),
        ({"format": 2}, "format"),
        ({"pairs": []}, "pairs"),
        ({"pairs": [{**manifest["pairs"][0], "pictures": ["../../etc/passwd", "x"]}]}, "pictures"),
    ):
        (folder / "study.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(UserError, match=words):
            read_study(str(folder))
    (folder / "study.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_study(str(folder))
    with pytest.raises(UserError, match="no study is here"):
        read_study(str(tmp_path))
