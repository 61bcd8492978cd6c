"""``oar doctor``: checks whether this machine is fit for a run. One line an item, with the remedy in it.

    ok   torch: 2.15.0
    warn torch.compile: no C++ compiler on the PATH; apt-get install g++
    FAIL storage root: /data/runs/.oar-doctor-1f: Permission denied. Use a folder that this user may write, or change its owner.

What can be tried is tried: kernels are run and profiled, a process group is started, an object is written to the storage
and read back. A check that raises becomes a FAIL line, and the other checks still run. Only the standard library is imported
at the top of these files: the doctor must be able to say that a package is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from oar_scale.doctor import kernels, machine, storage_checks
from oar_scale.doctor.finding import INSTALL, Finding, guarded

if TYPE_CHECKING:
    from oar_scale.config.schema import Recipe


def run_doctor(recipe_path: str | None, overrides: Sequence[str], *, as_json: bool) -> int:
    """Print the report: lines as they come, or one JSON list at the end.

    Returns:
        0, or 1 when something FAILed.

    Raises:
        UserError: the recipe cannot be read.
    """
    return report(examine(recipe_path, overrides), as_json=as_json)


def report(findings: Iterable[Finding], *, as_json: bool) -> int:
    """Print findings as they come, or as one JSON list at the end; returns 1 when something FAILed, else 0."""
    printed = []
    for finding in findings:
        printed.append(finding)
        if not as_json:
            print(finding, flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in printed], indent=2, ensure_ascii=False))
    return int(any(finding.status == "FAIL" for finding in printed))


def examine(recipe_path: str | None = None, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """All checks of this machine; with a recipe, its attention shapes, its storage, its disk and its W&B mode.

    Raises:
        UserError: the recipe cannot be read.
    """
    recipe: Recipe | None = None
    if recipe_path is not None:
        try:
            from oar_scale.config.loading import load_recipe
        except ImportError as error:
            yield Finding("FAIL", "recipe", f"not read, for an import failed ({error}); {INSTALL}")
        else:
            recipe = load_recipe(recipe_path, overrides)
    shape = kernels.shape_of(recipe) if recipe else kernels.DEFAULT_SHAPE
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "packages": machine.versions,
        "devices": machine.devices,
        "CUDA toolkit": machine.cuda_toolkit,
        "process group": machine.process_group,
        "attention": partial(kernels.attention, shape),
        "decoding attention": partial(kernels.decoding_attention, shape),
        "bf16 matmul": kernels.bf16_matmul,
        "fused AdamW": kernels.fused_adamw,
        "torch.compile": partial(machine.compilation, bool(recipe and recipe.parallel.compile)),
    }
    if recipe:
        checks |= {
            "storage root": partial(storage_checks.storage_root, recipe.root),
            "run_dir": partial(storage_checks.disk, recipe.local_dir),
            "/dev/shm": storage_checks.shared_memory,
            "W&B": partial(storage_checks.weights_and_biases, recipe.observe.wandb),
        }
    with storage_checks.remove_created_folders(recipe.root if recipe else None):
        for item, check in checks.items():
            yield from guarded(item, check)


__all__ = ["Finding", "examine", "report", "run_doctor"]
