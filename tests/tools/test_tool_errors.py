"""What a user of a tool can fix is one line, without a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tools import minimal, mirrored_orders

WEIGHTS = str(Path(__file__).resolve().parents[2] / "recipes" / "weights" / "emoji")


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [(minimal, ["{folder}/out", "{folder}/none"]), (mirrored_orders, [WEIGHTS, "{folder}/none"])],
    ids=["minimal", "mirrored_orders"],
)
def test_a_folder_that_is_not_there_is_named_in_one_line(
    tool: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *(argument.format(folder=tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit, match=f"{tmp_path}/none") as left:
        tool.main()
    assert "\n" not in str(left.value)


def test_too_few_images_for_standard_errors_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", WEIGHTS, str(tmp_path), "--images", "3"])
    with pytest.raises(SystemExit, match=r"--images 3: .* at least 4"):
        mirrored_orders.main()
