"""Settings of torch for GPUs: what a process gets, and that whoever has set one has decided."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oar_scale.runtime.gpu_settings import gpu_settings
from oar_scale.runtime.ray_session import ray_session

SMOKE = str(Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml")
DEFAULTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_FR_BUFFER_SIZE": "2000", "TORCH_FR_DUMP_ON_TIMEOUT": "1"}


def test_what_is_set_already_stays_under_either_name() -> None:
    assert gpu_settings({}) == DEFAULTS
    given = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "TORCH_FR_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    assert gpu_settings(given) == {}


def test_commands_and_the_processes_that_they_start_have_them() -> None:
    program = f"from oar_scale.cli import main; main(['recipe', {SMOKE!r}])"
    look = f"import atexit, os; atexit.register(lambda: print([os.environ.get(name) for name in {list(DEFAULTS)}])); {program}"
    env = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    done = subprocess.run([sys.executable, "-c", look], env=env, capture_output=True, text=True)
    assert str(list(DEFAULTS.values())) in done.stdout, done.stderr


def test_workers_of_a_ray_have_them_and_keep_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "77")
    with ray_session(cpus=1):
        import ray

        @ray.remote
        def look() -> list[str | None]:
            return [os.environ.get(name) for name in DEFAULTS]

        assert ray.get(look.remote()) == ["expandable_segments:True", "77", "1"]
