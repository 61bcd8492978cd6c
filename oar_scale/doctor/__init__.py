"""``oar doctor``: is this machine fit for a run? One line an item, with the remedy in it.

    ok   torch: 2.15.0
    warn torch.compile: no C++ compiler on the PATH; apt-get install g++
    FAIL storage root: /data/runs/.oar-doctor-1f: Permission denied. Use a folder that this user may write, or change its owner.

Nothing is believed that can be tried: kernels are run and watched, a process group is started, an object is written to the
storage and read back. A check that raises becomes a FAIL line and the others go on. Only the standard library is imported
at the top of these files: the doctor must be able to say that a package is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from oar_scale.doctor import kernels, machine
from oar_scale.doctor import storage_checks as places
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


def report(found: Iterable[Finding], *, as_json: bool) -> int:
    """Print findings as they come; 1 when something FAILed, else 0."""
    findings = []
    for finding in found:
        findings.append(finding)
        if not as_json:
            print(finding, flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    return int(any(finding.status == "FAIL" for finding in findings))


def examine(recipe_path: str | None = None, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """All checks of this machine; with a recipe, its attention shapes and the places it names.

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
        "process group": machine.process_group,
        "attention": partial(kernels.attention, shape),
        "decoding attention": partial(kernels.decoding_attention, shape),
        "bf16 matmul": kernels.bf16_matmul,
        "fused AdamW": kernels.fused_adamw,
        "torch.compile": machine.compilation,
    }
    if recipe:
        checks |= {
            "storage root": partial(places.storage_root, recipe.root),
            "run_dir": partial(places.disk, recipe.local_dir),
            "/dev/shm": places.shared_memory,
            "W&B": partial(places.weights_and_biases, recipe.observe.wandb),
        }
    with places.left_as_found(recipe.root if recipe else None):
        for item, check in checks.items():
            yield from guarded(item, check)


__all__ = ["Finding", "examine", "report", "run_doctor"]
