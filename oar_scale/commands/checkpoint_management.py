"""``oar checkpoint list | verify | prune``: what a run's trainings have saved, whether it is still whole, and what may go.

None of it needs the run's workers, or a GPU. A place is a recipe, a run's folder, any folder or ``s3://`` prefix above checkpoints, or one
checkpoint (``.../step-00000100``).
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.distributed.checkpoints.fetch import check
from oar_scale.distributed.checkpoints.layout import Checkpoint, Damaged, Place, begun, places, read
from oar_scale.distributed.checkpoints.retention import Keep, Removal, Retention, prune
from oar_scale.errors import UserError
from oar_scale.generation.model_bundle import RECIPE
from oar_scale.run.context import Run
from oar_scale.storage import join, open_storage
from oar_scale.storage.background import in_order

_THREADS = 4


@dataclass(frozen=True)
class Where:
    """A place that the user named."""

    uri: str
    """All checkpoints that are meant lie below it."""
    recipe: Recipe | None
    """Of the run that it belongs to, if it says so."""


def run_list(where: str, now: float | None = None) -> str:
    """A table of all checkpoints, and of what interrupted saves have left."""
    rows = [row for place in _found(where)[1] for row in _rows(place, now or time.time())]
    metrics = sorted({name for row in rows for name in row if name.islower()})
    columns = ["STAGE", "STEP", "COMMITTED", "WORKERS", "ZERO", "BYTES", "AGE", *metrics]
    return table([columns, *([row.get(column, "") for column in columns] for row in rows)])


def run_verify(where: str) -> Iterator[tuple[str, str | None]]:
    """Read every byte of every committed checkpoint: what there is to say of each, and what is wrong with it."""
    committed = [place for place in _found(where)[1] if place.committed]
    if not committed:
        raise UserError(f"{where}: nothing is committed here. oar checkpoint list shows what there is.")
    for place in committed:
        try:
            checkpoint = read(place.uri)
            deque(in_order(partial(check, checkpoint), sorted(checkpoint.files), _THREADS), maxlen=0)
        except Damaged as fault:
            yield place.uri, str(fault)
        else:
            yield f"{place.uri}: {len(checkpoint.files)} files, {checkpoint.bytes:,} bytes, all as they were written", None


def run_prune(where: str, keep: Keep | None, *, dry_run: bool = False) -> list[str]:
    """Remove what is not kept, and what interrupted saves left an hour ago or earlier; a line for each removal.

    Args:
        keep: ``None``: as the run's recipe says.
    """
    place, found = _found(where)
    lines = []
    for stage in sorted({each.uri.rpartition("/")[0] for each in found}):
        retention = Retention(keep or _kept_by(place, stage))
        here = [each for each in found if each.uri.rpartition("/")[0] == stage]
        removals = retention.removals(here, time.time()) if dry_run else prune(here, retention, time.time())
        lines += [_said(removal, dry_run) for removal in removals]
    return lines


def locate(where: str) -> Where:
    """What a user means by the name of a recipe, a run, a folder of checkpoints or a single one.

    Raises:
        UserError: the recipe is not valid.
    """
    if where.endswith((".yaml", ".yml")):
        recipe = load_recipe(where)
        return Where(Run(recipe).at("checkpoints"), recipe)
    if not open_storage(where).exists(join(where, RECIPE)):
        return Where(where if where.startswith("s3://") else os.path.abspath(where), None)
    recipe = load_recipe(join(where, RECIPE))
    root = recipe.storage.root or where
    return Where(join(root if root.startswith("s3://") else os.path.abspath(root), "checkpoints"), recipe)


def table(rows: list[list[str]]) -> str:
    """Columns side by side; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(_cell, row, widths)).rstrip() for row in rows)


def _cell(text: str, width: int) -> str:
    return text.rjust(width) if re.match(r"[-\d.]", text) else text.ljust(width)


def _found(where: str) -> tuple[Where, list[Place]]:
    place = locate(where)
    found = places(place.uri)
    if not found:
        raise UserError(f"{where}: no checkpoints here. Name a recipe, a run's folder, or a folder above .../step-00000100")
    return place, found


def _rows(place: Place, now: float) -> Iterator[dict[str, str]]:
    """A step's checkpoint, and the left-overs beside it."""
    stage, step = os.path.basename(os.path.dirname(place.uri)), str(place.step)
    counts = None
    if place.committed:
        try:
            checkpoint = read(place.uri)
            counts = checkpoint.save
            yield {"STAGE": stage, "STEP": step, "COMMITTED": "yes", **_facts(checkpoint, now)}
        except Damaged as fault:
            yield {"STAGE": stage, "STEP": step, "COMMITTED": f"damaged: {fault}"}
            return
    for save in sorted(place.saves - {counts}):
        yield {"STAGE": stage, "STEP": step, "COMMITTED": "no", "AGE": _age(now - begun(save))}


def _facts(checkpoint: Checkpoint, now: float) -> dict[str, str]:
    metrics = {name: f"{value:.4f}" for name, value in checkpoint.metrics.items()}
    return {
        "WORKERS": str(checkpoint.world_size),
        "ZERO": str(checkpoint.zero_stage),
        "BYTES": f"{checkpoint.bytes:,}",
        "AGE": _age(now - checkpoint.manifest["saved_at"]),
        **metrics,
    }


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _kept_by(place: Where, stage: str) -> Keep:
    if place.recipe is None:
        raise UserError(f"{stage}: belongs to no run that says how much is kept. Say it: --keep N")
    return Keep.of(place.recipe.pretrain if stage.endswith("/pretrain") else place.recipe.finetune)


def _said(removal: Removal, dry_run: bool) -> str:
    return f"{'would remove' if dry_run else 'removed'} {removal.place.uri}: {len(removal.names)} files, {removal.why}"
