"""``oar checkpoint list | verify | prune``: which checkpoints a run has, whether they are intact, and which may be removed.

None of these commands needs the run's workers, or a GPU. They take a recipe, a run's folder, any folder or ``s3://`` prefix above
checkpoints, or a single checkpoint (``.../step-00000100``).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.distributed.checkpoints.fetch import check, check_content
from oar_scale.distributed.checkpoints.layout import (
    Checkpoint,
    CheckpointLocation,
    DamagedCheckpoint,
    checkpoint_locations,
    read_checkpoint,
    require_fields,
    save_started,
)
from oar_scale.distributed.checkpoints.retention import Keep, Removal, Retention, prune
from oar_scale.errors import Unreachable, UserError
from oar_scale.generation.model_bundle import RECIPE
from oar_scale.run.context import Run
from oar_scale.runtime.tables import text_table
from oar_scale.storage import absolute, join, open_storage
from oar_scale.storage.background import in_order
from oar_scale.text import cut

_THREADS = 4


@dataclass(frozen=True)
class CheckpointRoot:
    """The folder that a user means by the name of a recipe, a run or a checkpoint."""

    uri: str
    """All checkpoints that are meant lie below it."""
    recipe: Recipe | None
    """The recipe of the run that they belong to, where there is one beside them."""


def list_checkpoints(where: str, now: float | None = None) -> str:
    """A table of all checkpoints, and of the files that interrupted saves have left.

    Args:
        where: as :func:`find_checkpoint_root`.
        now: unix seconds, from which ages are counted; default: the clock.

    Raises:
        UserError: there are no checkpoints at ``where``.
    """
    rows = [row for location in _locations(where)[1] for row in _rows(location, now or time.time())]
    metrics = sorted({name for row in rows for name in row if name.islower()})
    columns = ["STAGE", "STEP", "COMMITTED", "WORKERS", "ZERO", "BYTES", "AGE", *metrics]
    return "\n".join(text_table([columns, *([row.get(column, "") for column in columns] for row in rows)], align="numbers right"))


def verify_checkpoints(where: str) -> Iterator[tuple[str, str | None]]:
    """Read every byte of every committed checkpoint and compare it with the manifest.

    Yields:
        A line about the checkpoint and None, or its URI and what is wrong with it.

    Raises:
        UserError: nothing is committed at ``where``; or, once all are read, names the files that ask for code to be run.
    """
    committed = [location for location in _locations(where)[1] if location.committed]
    if not committed:
        raise UserError(f"{where}: nothing is committed here. oar checkpoint list shows what there is.")
    hostile: list[str] = []
    for location in committed:
        try:
            checkpoint = read_checkpoint(location.uri)
            require_fields(checkpoint, "files")
            deque(in_order(partial(check, checkpoint), sorted(checkpoint.files), _THREADS), maxlen=0)
        except DamagedCheckpoint as fault:
            yield location.uri, str(fault)
            continue
        try:
            for name in sorted(checkpoint.files):
                check_content(checkpoint, name)
        except Unreachable:
            raise
        except UserError as refused:
            hostile.append(str(refused))
        else:
            yield f"{location.uri}: {len(checkpoint.files)} files, {checkpoint.bytes:,} bytes, all as they were written", None
    if hostile:
        raise UserError("\n".join(hostile))


def prune_checkpoints(where: str, keep: Keep | None, *, dry_run: bool = False) -> list[str]:
    """Remove checkpoints that are not kept, and what interrupted saves left an hour ago or earlier.

    Args:
        where: as :func:`find_checkpoint_root`.
        keep: which checkpoints stay; None: those that the run's recipe keeps.
        dry_run: only say what would be removed.

    Returns:
        A line for each removal.
    """
    root, locations = _locations(where)
    lines = []
    for stage in sorted({each.uri.rpartition("/")[0] for each in locations}):
        retention = Retention(keep or _kept_by(root, stage))
        here = [each for each in locations if each.uri.rpartition("/")[0] == stage]
        removals = retention.removals(here, time.time()) if dry_run else prune(here, retention, time.time())
        lines += [_removal_line(removal, dry_run) for removal in removals]
    return lines


def find_checkpoint_root(where: str) -> CheckpointRoot:
    """The checkpoints that a user means by the name of a recipe, a run, a folder of checkpoints or a single one.

    Raises:
        UserError: the recipe is not valid.
    """
    if where.endswith((".yaml", ".yml")):
        recipe = load_recipe(where)
        return CheckpointRoot(Run(recipe).at("checkpoints"), recipe)
    if not open_storage(where).exists(join(where, RECIPE)):
        return CheckpointRoot(absolute(where), None)
    recipe = load_recipe(join(where, RECIPE))
    return CheckpointRoot(join(absolute(recipe.storage.root or where), "checkpoints"), recipe)


def _locations(where: str) -> tuple[CheckpointRoot, list[CheckpointLocation]]:
    root = find_checkpoint_root(where)
    locations = checkpoint_locations(root.uri)
    if not locations:
        raise UserError(f"{where}: no checkpoints here. Name a recipe, a run's folder, or a folder above .../step-00000100")
    return root, locations


def _rows(location: CheckpointLocation, now: float) -> Iterator[dict[str, str]]:
    """The row of a step's committed checkpoint, and one for each interrupted save beside it."""
    stage, step = os.path.basename(os.path.dirname(location.uri)), str(location.step)
    committed_save = None
    if location.committed:
        try:
            checkpoint = read_checkpoint(location.uri)
            committed_save = checkpoint.save
            require_fields(checkpoint, "step", "world_size", "zero_stage", "state")
            yield {"STAGE": stage, "STEP": step, "COMMITTED": "yes", **_manifest_columns(checkpoint, now)}
        except DamagedCheckpoint as fault:
            yield {"STAGE": stage, "STEP": step, "COMMITTED": f"damaged: {fault}"}
            return
    for save in sorted(location.saves - {committed_save}):
        yield {"STAGE": stage, "STEP": step, "COMMITTED": "no", "AGE": _age(now - save_started(save))}


def _manifest_columns(checkpoint: Checkpoint, now: float) -> dict[str, str]:
    metrics = {cut(name, lines=1, characters=30): cut(f"{value:.4f}", lines=1, characters=30) for name, value in checkpoint.metrics.items()}
    return {
        "WORKERS": str(checkpoint.world_size),
        "ZERO": str(checkpoint.zero_stage),
        "BYTES": f"{checkpoint.bytes:,}",
        "AGE": _age(now - checkpoint.manifest.get("saved_at", now)),
        **metrics,
    }


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _kept_by(root: CheckpointRoot, stage: str) -> Keep:
    if root.recipe is None:
        raise UserError(f"{stage}: belongs to no run whose recipe states how many are kept. Set it: --keep N")
    return Keep.of(root.recipe.pretrain if stage.endswith("/pretrain") else root.recipe.finetune)


def _removal_line(removal: Removal, dry_run: bool) -> str:
    return f"{'would remove' if dry_run else 'removed'} {removal.location.uri}: {len(removal.names)} files, {removal.why}"
