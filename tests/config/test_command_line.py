"""What the command line does when nobody reads its output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("words", [["recipe", "smoke.yaml"], ["plan", "smoke.yaml"]])
def test_a_reader_that_leaves_ends_the_command_quietly(words: list[str]) -> None:
    """As in ``oar plan RECIPE | head -1``."""
    with subprocess.Popen(
        [sys.executable, "-m", "oar_scale.cli", *words], cwd=RECIPES, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None and command.stderr is not None
        command.stdout.close()
        complaints = command.stderr.read()
    assert (command.returncode, complaints) == (141, "")
