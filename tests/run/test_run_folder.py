"""Whose folder a run's folder is: a recipe that was wrong from the start leaves it to the corrected one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from oar_scale.cli import main

RECIPE = """name: mine
data:
  source: {type: folder, path: PLACE}
  heldout_fraction: 0.4
  image_size: 8
  canonical_streams: 2
tokenizer: {text: {type: labels, classes: 4}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe of a folder of ten pictures with labels; it is the working folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "other"):
        (tmp_path / folder).mkdir()
        for number in range(10):
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{number}.png")
            (tmp_path / folder / f"{number}.cls").write_text(str(number % 4))
    Path("mine.yaml").write_text(RECIPE.replace("PLACE", "in"))
    return "mine.yaml"


def test_a_typing_error_and_then_the_right_path(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("data.source.path=inn", "seed=5"):
        assert main(["prepare", recipe, "-o", "data.source.path=inn", "-o", wrong]) == 2
        assert "data.source.path inn: no such folder" in capsys.readouterr().err
    assert main(["prepare", recipe]) == 0
    assert json.loads(Path("runs/mine/run.json").read_text())["source"]["path"] == "in"
    assert main(["prepare", recipe, "-o", "data.source.path=other"]) == 2
    error = capsys.readouterr().err
    assert "this folder belongs to another run: data.source.path was 'in', the recipe says 'other'." in error


def test_labels_that_a_model_does_not_have_end_the_first_stage(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They passed three stages and ended the training."""
    Path("in/3.cls").write_text("three")
    assert main(["prepare", recipe]) == 2
    assert "its label 'three' is no whole number" in capsys.readouterr().err
    assert main(["prepare", recipe, "-o", "data.max_bad_fraction=0.2"]) == 0
    assert "1 bad samples, left out (" in capsys.readouterr().out
