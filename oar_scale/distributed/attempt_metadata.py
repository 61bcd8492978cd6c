"""What an attempt says of itself at its start: settings, versions, place."""

from __future__ import annotations

import os
import socket
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from oar_scale import __version__
from oar_scale.training.job import TrainingJob

PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "wandb")


def about(job: TrainingJob, world: int) -> dict[str, Any]:
    """The fields of a ``start`` event that do not depend on the engine."""
    parallel, training = job.recipe.parallel, job.training
    return {
        "steps": training.steps,
        "world_size": world,
        "zero_stage": parallel.zero_stage,
        "precision": parallel.precision,
        "global_batch": training.global_batch,
        "micro_batch": parallel.micro_batch,
        "accumulation": training.global_batch // (parallel.micro_batch * world),
        "seed": job.recipe.seed,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "code": code_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "recipe": job.recipe.model_dump(mode="json"),
    }


@cache
def code_version() -> str:
    """The commit of a source checkout, with ``-dirty`` where it was changed; else the package's version."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return __version__
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{found.stdout.strip()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
