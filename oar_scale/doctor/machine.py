"""What is installed and what the machine has: packages, devices, process groups, a compiler."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from oar_scale import __version__
from oar_scale.doctor.finding import INSTALL, Finding, guarded
from oar_scale.errors import error_line

if TYPE_CHECKING:
    import torch

OPTIONAL = {"open-clip-torch": "CLIP text towers", "wandb": "W&B", "boto3": "s3:// storage"}
"""Packages that only some recipes need, and for what."""
PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "sentencepiece", *OPTIONAL)


def device() -> torch.device:
    """Where the checks run: the first GPU, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def versions() -> Iterator[Finding]:
    """Python and the packages, against the bounds of the installation and the versions of ``constraints.txt``."""
    try:
        required = importlib.metadata.requires("oar_scale") or []
        python = str(importlib.metadata.metadata("oar_scale")["Requires-Python"])
        yield Finding("ok", "oar_scale", __version__)
    except importlib.metadata.PackageNotFoundError:
        required, python = [], ""
        yield Finding("warn", "oar_scale", f"{__version__}, not installed, so the bounds of its packages are unknown; {INSTALL}")
    tested = _tested_versions()
    yield from guarded("python", partial(_version, "python", platform.python_version(), [f"python{python}"], None))
    for name in PACKAGES:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in OPTIONAL:
                yield Finding("warn", name, f"not installed; a recipe with {OPTIONAL[name]} needs it: {INSTALL}")
            else:
                yield Finding("FAIL", name, f"not installed; {INSTALL}")
            continue
        yield from guarded(name, partial(_version, name, installed, required, tested.get(name)))


def _version(name: str, installed: str, required: Sequence[str], tested: str | None) -> Iterator[Finding]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    bound = next((wanted.specifier for wanted in map(Requirement, required) if wanted.name == name), SpecifierSet())
    if not bound.contains(installed, prereleases=True):
        remedy = "use a Python that fits" if name == "python" else INSTALL
        yield Finding("FAIL", name, f"{installed}, and oar_scale needs {bound}; {remedy}")
    elif tested is not None and Version(installed).public != tested:
        yield Finding("warn", name, f"{installed}, and oar_scale was tested with {tested}; if something fails: {INSTALL}")
    else:
        yield Finding("ok", name, installed)


def _tested_versions() -> dict[str, str]:
    """``constraints.txt`` of the source folder; empty where the package was installed without it."""
    path = Path(__file__).resolve().parents[2] / "constraints.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    pinned = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.replace("_", "-").lower(): version for name, _, version in pinned}


def devices() -> Iterator[Finding]:
    """GPUs with memory, driver and CUDA; without one, the CPU."""
    import torch

    driver, cuda = _driver(), torch.version.cuda
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
            yield Finding("ok", f"GPU {index}", f"{text}, driver {driver or 'unknown'}, CUDA {cuda}")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    yield Finding("ok", "devices", f"no GPU: CPU, {cores} cores, {memory:.0f} GiB, {torch.backends.cpu.get_cpu_capability()}")
    if driver:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        remedy = "install a newer driver, or a torch that fits this one"
        if hidden is not None:
            remedy = f"unset CUDA_VISIBLE_DEVICES (now {hidden!r})"
        yield Finding("warn", "devices", f"NVIDIA driver {driver} is here, and torch (CUDA {cuda}) sees no GPU; {remedy}")


def cuda_toolkit() -> Iterator[Finding]:
    """Whether the CUDA toolkit here is the one that torch was built with, as DeepSpeed wants it before it compiles a kernel."""
    import torch

    folder = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(folder, "bin"))
    if compiler is None or torch.version.cuda is None:
        return
    printed = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"release (\d+\.\d+)", printed)
    here, there = found[1] if found else "of an unknown version", torch.version.cuda
    if here == there or here.split(".")[0] == there.split(".")[0] == "12":  # DeepSpeed takes any 12 for another
        yield Finding("ok", "CUDA toolkit", here)
    else:
        remedy = f"module load cuda/{there} or the like, or set DS_SKIP_CUDA_CHECK=1"
        yield Finding("warn", "CUDA toolkit", f"{here}, and torch was built with {there}: DeepSpeed compiles no kernel with it; {remedy}")


def _driver() -> str:
    """Version of the NVIDIA driver, empty without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def process_group() -> Iterator[Finding]:
    """Start a group of this one process with the backend that training would use here."""
    import torch
    import torch.distributed as dist

    have = [name for name in ("nccl", "gloo") if dist.is_available() and getattr(dist, f"is_{name}_available")()]
    target = device()
    needed = "nccl" if target.type == "cuda" else "gloo"
    if needed not in have:
        yield Finding("FAIL", "process group", f"torch has no {needed}, which training on {target.type} needs; {INSTALL}")
        return
    try:
        dist.init_process_group(needed, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            dist.all_reduce(torch.ones(1, device=target))
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        remedy = f"if the network is the cause, name an interface in {needed.upper()}_SOCKET_IFNAME"
        yield Finding("FAIL", "process group", f"{needed} does not start ({error_line(error)}); {remedy}")
        return
    yield Finding("ok", "process group", f"{needed} works; torch has {' and '.join(have)}")


def compilation(needed: bool = False) -> Iterator[Finding]:
    """Check the requirements of ``torch.compile``: a C++ compiler that finds Python's headers, on a GPU also Triton.

    Args:
        needed: the recipe compiles, so that a training would end at its first step where this is missing.
    """
    missing: Literal["warn", "FAIL"] = "FAIL" if needed else "warn"
    leave_out = "; or leave parallel.compile out" if needed else ""
    compiler = next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)
    if compiler is None:
        yield Finding(missing, "torch.compile", f"no C++ compiler on the PATH; apt-get install g++{leave_out}")
        return
    command = [compiler, "-fsyntax-only", "-x", "c++", f"-I{sysconfig.get_paths()['include']}", "-"]
    done = subprocess.run(command, input="#include <Python.h>\n#include <vector>\n", capture_output=True, text=True, timeout=60)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        remedy = f"apt-get install g++ python3-dev{leave_out}"
        yield Finding(missing, "torch.compile", f"{compiler} cannot compile for this Python ({reason}); {remedy}")
    elif device().type == "cuda":
        yield Finding("ok", "torch.compile", f"{compiler} and triton {importlib.metadata.version('triton')}")
    else:
        yield Finding("ok", "torch.compile", f"{compiler} compiles for this Python")
