"""What a user of a tool can fix is one line, without a traceback."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tools import minimal, mirrored_orders

REPOSITORY = Path(__file__).resolve().parents[2]
WEIGHTS, BENCHMARKS = str(REPOSITORY / "recipes" / "weights" / "emoji"), REPOSITORY / "tools" / "benchmarks"


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


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("layouts", ["{folder}/none", "{folder}/out"]),
        ("continuous", ["--model", "{folder}/none"]),
        ("own_order_drafts", ["--model", "{folder}/none"]),
    ],
)
def test_a_benchmark_ends_as_the_command_line_does(
    script: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line about a folder that is not there, and exit code 2."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [script, *(argument.format(folder=tmp_path) for argument in arguments)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith(f"error: {tmp_path}/none") and error.count("\n") == 1


def test_every_benchmark_runs_as_such_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What a process of it has said is not said again."""
    programs = [path.read_text() for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()]
    assert len(programs) > 10 and all(text.endswith('if __name__ == "__main__":\n    program(main)\n') for text in programs)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import in_fresh_process

    child = tmp_path / "child.py"
    child.write_text("import sys; print('error: no folder', file=sys.stderr); sys.exit(2)")
    with pytest.raises(SystemExit) as left:
        in_fresh_process(str(child), [], 1)
    assert left.value.code == 2 and capfd.readouterr().err == "error: no folder\n"
