"""What a user of a tool or a benchmark can fix is one message without a traceback, and exit code 2, as of ``oar``."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tools"
WEIGHTS, BENCHMARKS = str(REPOSITORY / "recipes" / "weights" / "emoji"), TOOLS / "benchmarks"


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("minimal", ["{folder}/out", "{folder}/none"], "{folder}/none"),
        ("minimal", ["{folder}/out", "--count", "3"], "--count 3: "),
        ("minimal", ["{folder}/out", "--steps", "0"], "--steps 0 "),
        ("mirrored_orders", [WEIGHTS, "{folder}/none"], "{folder}/none"),
        ("mirrored_orders", [WEIGHTS, "{folder}", "--images", "3"], "--images 3: "),
        ("flexibility_tables", ["{folder}/none"], "{folder}/none"),
        ("ship_weights", ["{folder}/none", "{folder}/out"], "{folder}/none"),
        ("quickstart_data", ["{folder}/none.yaml", "{folder}/out"], "{folder}/none.yaml"),
        ("fetch_emoji", ["{folder}/out", "--sets", "{folder}/none"], "{folder}/none"),
        ("fetch_emoji", ["{folder}/out", "--sets", "{folder}", "--size", "0"], "--size 0: "),
        ("recognition", ["count", "{folder}/none"], "{folder}/none"),
        ("wandb_replay", ["{folder}/none", "--offline"], "{folder}/none"),
        ("benchmarks/extraction", ["--at", "1"], "--at 1: "),
        ("benchmarks/extraction", ["--rounds", "0"], "--rounds 0: "),
        ("benchmarks/layouts", ["{folder}/none", "{folder}/out"], "{folder}/none"),
        ("benchmarks/continuous", ["--model", "{folder}/none"], "{folder}/none"),
        ("benchmarks/own_order_drafts", ["--model", "{folder}/none"], "{folder}/none"),
    ],
)
def test_a_tool_ends_as_the_command_line_does(
    script: str, arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is named is a folder that is not there, or an argument."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [script, *(argument.format(folder=tmp_path) for argument in arguments)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(TOOLS / f"{script}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and named.format(folder=tmp_path) in error and "Traceback" not in error


def test_every_tool_runs_as_such_a_program() -> None:
    programs = [path.read_text() for path in TOOLS.rglob("*.py") if "__main__" in path.read_text()]
    assert len(programs) > 20 and all(text.endswith('if __name__ == "__main__":\n    program(main)\n') for text in programs)


def test_what_a_process_of_a_benchmark_said_is_not_said_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import in_fresh_process

    child = tmp_path / "child.py"
    child.write_text("import sys; print('error: no folder', file=sys.stderr); sys.exit(2)")
    with pytest.raises(SystemExit) as left:
        in_fresh_process(str(child), [], 1)
    assert left.value.code == 2 and capfd.readouterr().err == "error: no folder\n"


RANKS = """
import time

from measure import run_ranks

from oar_scale.errors import UserError
from oar_scale.runtime.program import program


def work(rank: int, failing: set[int]) -> None:
    if rank in failing:
        raise UserError("runs/a: no folder")
    while failing:  # as a rank that waits for another
        time.sleep(0.1)


def main() -> None:
    run_ranks(work, 2, set())
    run_ranks(work, 3, {failing})


if __name__ == "__main__":
    program(main)
"""


@pytest.mark.parametrize("failing", [{1}, {0, 1, 2}], ids=["one rank", "all ranks"])
def test_an_error_of_ranks_is_said_once(failing: set[int], tmp_path: Path) -> None:
    """Ranks that wait for the one that raised it end with it."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.replace("{failing}", str(failing)))
    path = os.pathsep.join([str(BENCHMARKS), str(REPOSITORY)])
    ended = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: runs/a: no folder\n")
