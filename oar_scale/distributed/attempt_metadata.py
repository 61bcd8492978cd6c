"""Metadata of a training attempt, recorded at its start: settings, versions, host."""

from __future__ import annotations

import os
import socket
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from oar_scale import __version__
from oar_scale.config.schema import ParallelConfig
from oar_scale.json_object import JsonObject
from oar_scale.runtime.gpu_peaks import peak_flops
from oar_scale.training.job import TrainingJob

PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "wandb")


def attempt_metadata(job: TrainingJob, world: int, device: torch.device) -> JsonObject:
    """Return the fields of a ``start`` event that do not depend on the engine."""
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
        "versions": {name: number for name in PACKAGES if (number := _version(name))},
        "recipe": job.recipe.model_dump(mode="json"),
        "notices": notices(parallel, torch.cuda.get_device_name(device) if device.type == "cuda" else None),
    }


def notices(parallel: ParallelConfig, gpu: str | None) -> list[str]:
    """What should be known before hours are spent: settings that cost speed without need, and figures that will be missing."""
    found = [] if parallel.slow_compilation is None else [parallel.slow_compilation]
    if gpu is not None and parallel.precision == "bf16" and peak_flops(gpu, "bf16") is None:
        found.append(f"no MFU: the peak of {gpu} is not known (a GPU that is not in oar_scale/runtime/gpu_peaks.py, or a part of one)")
    return found


@cache
def code_version() -> str:
    """Return the commit of a source checkout, with ``-dirty`` where it was changed; else the package's version."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return __version__
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{described.stdout.strip()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
