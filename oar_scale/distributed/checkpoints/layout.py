"""What lies where in a checkpoint, and when it counts.

    checkpoints/pretrain/step-00000100/
        20261123T085016Z-3f9a2c1b/          one attempt at saving this step: the time, and a random part
            zero_pp_rank_0_..._states.pt    DeepSpeed's shards, each written and uploaded by its rank
            manifest.json                   files, sizes, crc32c, world size, ZeRO stage, step, identity, model, the loop's state
        COMMITTED                           names the attempt, and the crc32c of its manifest; written last, in one piece

Two attempts at one step (a worker that was taken for dead, a step done again after a roll-back) never write to the same name: the
marker says which one counts, and putting another there replaces the whole checkpoint at once. What no marker names is a left-over.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import crc32c

from oar_scale.errors import UserError
from oar_scale.storage import Missing, join, open_storage

MARKER = "COMMITTED"
MANIFEST = "manifest.json"
FORMAT = 2
_STEP = re.compile(r"/step-(\d{8,})$")
_SAVE = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
_TIME = "%Y%m%dT%H%M%SZ"


class DamagedCheckpoint(Exception):
    """What is wrong with a checkpoint; the text goes behind its name."""


class NotCommitted(DamagedCheckpoint):
    """It has no marker."""

    def __init__(self) -> None:
        super().__init__("is not committed: it is being written, or was interrupted")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, as its manifest describes it."""

    uri: str
    """``.../step-00000100``."""
    save: str
    """The attempt that counts."""
    manifest: dict[str, Any]

    @property
    def folder(self) -> str:
        """Where its files lie."""
        return join(self.uri, self.save)

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def files(self) -> dict[str, dict[str, int]]:
        """``bytes``, ``crc32c`` and the ``rank`` that wrote it, of each file."""
        files: dict[str, dict[str, int]] = self.manifest["files"]
        return files

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())

    @property
    def world_size(self) -> int:
        return int(self.manifest["world_size"])

    @property
    def zero_stage(self) -> int:
        return int(self.manifest["zero_stage"])

    @property
    def state(self) -> dict[str, Any]:
        """What the training loop gave to be kept."""
        state: dict[str, Any] = self.manifest["state"]
        return state

    @property
    def metrics(self) -> dict[str, float]:
        """Held-out likelihoods at its step, as far as they were known."""
        metrics: dict[str, float] = self.state.get("metrics", {})
        return metrics


@dataclass(frozen=True)
class CheckpointLocation:
    """What a listing shows of one step."""

    uri: str
    step: int
    names: frozenset[str]
    """Of all its objects, below ``uri``."""

    @property
    def committed(self) -> bool:
        return MARKER in self.names

    @property
    def saves(self) -> set[str]:
        """The attempts that have left something here."""
        return {name.split("/")[0] for name in self.names if _SAVE.match(name)}


def new_save(now: float | None = None) -> str:
    """A name for an attempt at saving."""
    return f"{datetime.fromtimestamp(now or time.time(), UTC).strftime(_TIME)}-{uuid.uuid4().hex[:8]}"


def save_started(save: str) -> float:
    """When an attempt began, in unix seconds."""
    return datetime.strptime(save.split("-")[0], _TIME).replace(tzinfo=UTC).timestamp()


def step_uri(checkpoints: str, step: int) -> str:
    """The place of a step below ``.../checkpoints/STAGE``."""
    return join(checkpoints, f"step-{step:08d}")


def is_step_uri(uri: str) -> bool:
    """Whether ``uri`` is the name of one step's place."""
    return _STEP.search(f"/{uri.rstrip('/')}") is not None


def checkpoint_locations(uri: str) -> list[CheckpointLocation]:
    """All steps below ``uri``, a folder at any height above them or a step itself; ordered by folder, then step. One listing."""
    found: dict[str, set[str]] = {}
    for name in open_storage(uri).list(uri):
        place, below = _split(name)
        if place:
            found.setdefault(place, set()).add(below)
    steps = ((place, _STEP.search(place), frozenset(names)) for place, names in found.items())
    return sorted(
        (CheckpointLocation(place, int(match[1]), names) for place, match, names in steps if match),
        key=lambda p: (p.uri.rpartition("/")[0], p.step),
    )


def committed_steps(checkpoints: str) -> list[int]:
    """The steps with a committed checkpoint below ``.../checkpoints/STAGE``, oldest first. One listing; nothing is verified."""
    return [location.step for location in checkpoint_locations(checkpoints) if location.committed]


def commit(uri: str, save: str, manifest: dict[str, Any]) -> None:
    """Make ``save`` the checkpoint of its step: its manifest, then the marker, which replaces another attempt's in one piece.

    Raises:
        DamagedCheckpoint: its files are not all there any more.
    """
    data = (json.dumps({"format": FORMAT, **manifest}, indent=2) + "\n").encode()
    storage = open_storage(uri)
    storage.write(join(uri, save, MANIFEST), data)
    missing = {join(uri, save, name) for name in manifest["files"]}.difference(storage.list(join(uri, save)))
    if missing:
        raise DamagedCheckpoint(f"{min(missing)} was removed by someone else before the checkpoint was committed")
    storage.write(join(uri, MARKER), (json.dumps({"save": save, "crc32c": crc32c.crc32c(data)}) + "\n").encode())


def read_checkpoint(uri: str) -> Checkpoint:
    """The committed checkpoint of a step.

    Raises:
        NotCommitted: there is none.
        DamagedCheckpoint: its marker or manifest is not what was written.
    """
    storage = open_storage(uri)
    try:
        marker = storage.read(join(uri, MARKER))
    except Missing:
        raise NotCommitted from None
    try:
        fields = json.loads(marker)
        save, expected = str(fields["save"]), int(fields["crc32c"])
        if not _SAVE.fullmatch(save):
            raise ValueError(f"{save!r} is no attempt's name")
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{MARKER} is damaged ({error or 'it is empty'})") from None
    try:
        data = storage.read(join(uri, save, MANIFEST))
    except Missing:
        raise DamagedCheckpoint(f"{save}/{MANIFEST} is missing") from None
    found = crc32c.crc32c(data)
    if found != expected:
        raise DamagedCheckpoint(f"{save}/{MANIFEST} is damaged (crc32c {found:08x}; {MARKER} says {expected:08x})")
    manifest = json.loads(data)
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{uri}: is of format {manifest['format']}, this version of oar_scale reads {FORMAT}. Use the version that wrote it."
        )
    return Checkpoint(uri, save, manifest)


def uncommit(uri: str) -> None:
    """Take back the commitment of a step: from then on nobody reads it."""
    open_storage(uri).delete(join(uri, MARKER))


def delete(uri: str, names: Iterable[str]) -> None:
    """Delete objects of a step; the marker first, so that no half is ever taken for whole."""
    storage = open_storage(uri)
    names = sorted(names, key=lambda name: (name != MARKER, name))
    for name in names:
        storage.delete(join(uri, name))
    if not uri.startswith("s3://"):
        for folder in [*sorted({os.path.dirname(join(uri, name)) for name in names}, reverse=True), uri]:
            with suppress(OSError):  # it holds something else, or is gone
                os.rmdir(folder)


def _split(name: str) -> tuple[str, str]:
    """A place and what lies below it."""
    match = re.match(r"(.*/step-\d{8,})/(.+)$", name)
    return (match[1], match[2]) if match else ("", "")
