"""Options that would do nothing beside the others are refused, before anything is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from oar_scale.cli import main

RECIPE = str(Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml")


@pytest.mark.parametrize(
    ("verb", "options", "complaint"),
    [
        ("extract", ["--images", "3"], "--images means nothing without --compare"),
        ("extract", ["--status", "--out", "a.json"], "--out means nothing without --compare"),
        ("extract", ["--verify", "--finetune", "3"], "--finetune means nothing without --compare"),
        ("extract", ["--compare", "--stage", "extract_gt"], "--stage means nothing with --compare"),
        ("orders", ["--train-head", "--against", "other"], "--against means nothing with --train-head and --predict"),
        ("orders", ["--predict", "--out", "page"], "--out means nothing with --train-head and --predict"),
        ("orders", ["--predict", "--model", "ordered"], "--model means nothing with --predict"),
        ("orders", ["--train-head", "--predict", "--model", "ordered"], "--model means nothing with --predict"),
        ("orders", ["--model", "ordered"], "--model means nothing without --train-head"),
        ("run", ["--undo", "--minutes", "3"], "--minutes means nothing with --undo"),
        ("doctor", ["-p", "nodes=2"], "-p nodes=2 means nothing without --cluster"),
        ("data stats", ["--tokenizer", "vq.safetensors"], "--tokenizer means nothing without --grid"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    verb: str, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb.split(), RECIPE, *options]) == 2
    assert f"error: {complaint}" in capsys.readouterr().err
