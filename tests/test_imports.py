"""What must stay light: reading a recipe needs no torch, the method needs no Ray, `oar --help` answers at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "deepspeed", "open_clip", "matplotlib")
METHOD = (
    "oar_scale.model",
    "oar_scale.generation.pretrained",
    "oar_scale.orders.extraction",
    "oar_scale.tokenizers.clip_text",
    "oar_scale.training.loop",
)

PRINT_LOADED = f"import json, sys; print('loaded:' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def heavy_modules_after(code: str, *arguments: str) -> set[str]:
    """Run ``code`` in a fresh Python; return which heavy packages it has loaded at its end."""
    program = f"try:\n    {code}\nfinally:\n    {PRINT_LOADED}"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    return set(json.loads(last.removeprefix("loaded:")))


def test_the_probe_sees_a_heavy_import() -> None:
    assert heavy_modules_after("import torch") == {"torch"}


def test_reading_recipes_imports_no_torch_ray_or_deepspeed() -> None:
    assert heavy_modules_after("import oar_scale.config.loading") == set()


@pytest.mark.parametrize("module", ["oar_scale.pipeline", "oar_scale.launch.job_specs", "oar_scale.planning.plan"])
def test_what_answers_at_once_imports_no_torch(module: str) -> None:
    """A stage's module, and torch or Ray with it, is imported when the stage runs."""
    assert heavy_modules_after(f"import {module}") == set()


def test_the_method_imports_nothing_heavy_but_torch() -> None:
    """All of it in one process, which takes seconds to start. What it may need besides is imported where it is used."""
    assert heavy_modules_after(f"import {', '.join(METHOD)}") == {"torch"}


def test_help_imports_no_torch_ray_or_deepspeed() -> None:
    run_cli = "import runpy; runpy.run_module('oar_scale.cli', run_name='__main__', alter_sys=True)"
    program_exits_0 = f"exec({run_cli!r})"
    assert heavy_modules_after(program_exits_0, "--help") == set()
