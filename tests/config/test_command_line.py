"""How the program ``oar`` ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("arguments", [["recipe", "smoke.yaml"], ["plan", "smoke.yaml"]])
def test_a_reader_that_leaves_ends_the_command_quietly(arguments: list[str]) -> None:
    """As in ``oar plan RECIPE | head -1``."""
    with subprocess.Popen(
        [sys.executable, "-m", "oar_scale.cli", *arguments], cwd=RECIPES, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None and command.stderr is not None
        command.stdout.close()
        complaints = command.stderr.read()
    assert (command.returncode, complaints) == (141, "")


ENDS_BADLY = """
import ctypes, sys
c = ctypes.CDLL(None)
c.__cxa_atexit(c.abort, None, None)  # as the destructor of a static object that a thread still uses
import ray
from oar_scale.cli import command
sys.argv = ["oar", *sys.argv[1:]]
command()
"""


@pytest.mark.parametrize(("arguments", "code"), [("recipe smoke.yaml", 0), ("recipe none.yaml", 2), ("--version", 0), ("walk", 2)])
def test_native_threads_at_the_end_keep_the_exit_code(arguments: str, code: int) -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS_BADLY, *arguments.split()], cwd=RECIPES, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr if code else ended.stdout.endswith("\n")
