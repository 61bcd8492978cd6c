"""The files of a checkpoint, and the marker that makes it valid.

    checkpoints/pretrain/step-00000100/
        20261123T085016Z-3f9a2c1b/          one attempt at saving this step: time and a random part
            zero_pp_rank_0_..._states.pt    DeepSpeed's shards, each written and uploaded by its rank
            manifest.json                   files, sizes, crc32c, world size, ZeRO stage, step, identity, model, the loop's state
        COMMITTED                           names the attempt and the crc32c of its manifest; written last, atomically
        latest                              the attempt's name again, for DeepSpeed's own tools; nothing here reads it

Two attempts at one step (a worker that was wrongly considered dead) never write to the same names. Manifest and marker are written only
where there is none. So the first attempt to write the marker is the step's checkpoint, and the others remove their files. Who removes what
an attempt has left first writes a manifest in its place, which makes it unable to commit; one that has its manifest is complete, and is
committed instead. tests/distributed/test_checkpoint_races.py tries every interleaving.
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

import crc32c

from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject, parse_object
from oar_scale.names import file_name
from oar_scale.storage import Missing, join, open_storage
from oar_scale.text import cut, shown

MARKER = "COMMITTED"
MANIFEST = "manifest.json"
LATEST = "latest"
"""The file in which DeepSpeed looks for the folder of a checkpoint's shards."""
FORMAT = 2
SHARD = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(?P<rank>[0-9]{1,7})_)?mp_rank_00_(?P<kind>model|optim)_states\.pt")
"""The names of DeepSpeed's files. A manifest that names any other one is not used: whoever may write to the bucket chose them."""
_COUNTS, _OBJECTS = ("step", "world_size", "zero_stage"), ("state", "identity", "model_spec", "files")
_GIVEN_UP = b'{"given_up": true}\n'
"""The manifest of an attempt that must not commit any more."""
_STEP = re.compile(r"/step-([0-9]{8,})$")
_SAVE = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")
_LARGEST = 2**63
"""Numbers in a manifest are below it."""
_TIME = "%Y%m%dT%H%M%SZ"


class DamagedCheckpoint(Exception):
    """A checkpoint cannot be used; the text, which follows the checkpoint's name, says why. ``file`` names the shard, where it is one."""

    def __init__(self, why: str, file: str | None = None) -> None:
        super().__init__(why)
        self.file = file


class NotCommitted(DamagedCheckpoint):
    """A step has no commit marker."""

    def __init__(self) -> None:
        super().__init__("is not committed: it is not there, is being written, or was interrupted")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, as its manifest describes it."""

    uri: str
    """``.../step-00000100``."""
    save: str
    """The attempt that the marker names."""
    manifest: JsonObject

    @property
    def folder(self) -> str:
        """The folder of its files."""
        return join(self.uri, self.save)

    @property
    def step(self) -> int:
        """The training step."""
        return int(self.manifest["step"])

    @property
    def files(self) -> dict[str, dict[str, int]]:
        """For each file its ``bytes``, its ``crc32c`` and the ``rank`` that wrote it."""
        files: dict[str, dict[str, int]] = self.manifest["files"]
        return files

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(entry["bytes"] for entry in self.files.values())

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return int(self.manifest["world_size"])

    @property
    def zero_stage(self) -> int:
        """ZeRO stage under which it was written."""
        return int(self.manifest["zero_stage"])

    @property
    def state(self) -> JsonObject:
        """The state of the training loop: batch offset, metrics, state of the callbacks."""
        state: JsonObject = self.manifest["state"]
        return state

    @property
    def metrics(self) -> dict[str, float]:
        """Held-out likelihoods at its step; empty where none was measured."""
        metrics: dict[str, float] = self.state.get("metrics", {})
        return metrics


@dataclass(frozen=True)
class CheckpointLocation:
    """One step's folder, as a listing of the storage shows it."""

    uri: str
    step: int
    names: frozenset[str]
    """Names of all objects below ``uri``."""

    @property
    def committed(self) -> bool:
        """Whether there is a commit marker."""
        return MARKER in self.names

    @property
    def saves(self) -> set[str]:
        """The attempts that have written files here."""
        return {save for save in {name.split("/")[0] for name in self.names} if _is_save(save)}


def new_save(now: float | None = None) -> str:
    """A new name of an attempt at saving, unique and ordered by time."""
    return f"{datetime.fromtimestamp(now or time.time(), UTC).strftime(_TIME)}-{uuid.uuid4().hex[:8]}"


def save_started(save: str) -> float:
    """When an attempt started, in unix seconds."""
    return datetime.strptime(save.split("-")[0], _TIME).replace(tzinfo=UTC).timestamp()


def _is_save(name: str) -> bool:
    """Whether a name is one that :func:`new_save` makes."""
    try:
        return _SAVE.fullmatch(name) is not None and save_started(name) > 0
    except ValueError:  # 99999999T999999Z is no time
        return False


def step_uri(checkpoints: str, step: int) -> str:
    """The folder of a step below ``.../checkpoints/STAGE``."""
    return join(checkpoints, f"step-{step:08d}")


def is_step_uri(uri: str) -> bool:
    """Whether ``uri`` is the folder of one step."""
    return _STEP.search(f"/{uri.rstrip('/')}") is not None


def checkpoint_locations(uri: str) -> list[CheckpointLocation]:
    """All steps below ``uri``, any folder above them or a step itself; ordered by folder, then step. Lists the storage once."""
    names_by_step: dict[str, set[str]] = {}
    for name in open_storage(uri).list(uri):
        step, below = _split(name)
        if step:
            names_by_step.setdefault(step, set()).add(below)
    matches = ((step, _STEP.search(step), frozenset(names)) for step, names in names_by_step.items())
    locations = [CheckpointLocation(step, int(match[1]), names) for step, match, names in matches if match]
    return sorted(locations, key=lambda location: (location.uri.rpartition("/")[0], location.step))


def committed_steps(checkpoints: str) -> list[int]:
    """The steps with a committed checkpoint below ``.../checkpoints/STAGE``, oldest first. Lists the storage once; nothing is verified."""
    return [location.step for location in checkpoint_locations(checkpoints) if location.committed]


def commit(uri: str, save: str, manifest: JsonObject) -> None:
    """Make ``save`` the checkpoint of its step: writes its manifest, then the marker, unless the step has a checkpoint.

    Raises:
        DamagedCheckpoint: another attempt at the step was committed before, or this one has been given up, or some of its files are gone.
    """
    data = (json.dumps({"format": FORMAT, **manifest}, indent=2) + "\n").encode()
    if not _put_first(join(uri, save, MANIFEST), data):
        raise DamagedCheckpoint("this attempt at saving took so long that it was given up by whoever removes old checkpoints")
    _commit(uri, save, data)


def give_up(uri: str, save: str) -> bool:
    """Make an attempt without a marker, which may still be running, unable to commit, or commit it where only the marker is missing.

    Returns:
        Whether its files may be removed.
    """
    manifest_uri = join(uri, save, MANIFEST)
    if _put_first(manifest_uri, _GIVEN_UP):
        return True
    try:
        _commit(uri, save, open_storage(uri).read(manifest_uri))
    except Missing:  # somebody else is removing it
        return False
    except DamagedCheckpoint:
        return True
    return False


def _commit(uri: str, save: str, manifest: bytes) -> None:
    """Write the marker of an attempt that has its manifest."""
    try:
        files = parse_object(manifest)["files"]
        missing = {join(uri, save, name) for name in files}.difference(open_storage(uri).list(join(uri, save)))
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(f"{save}/{MANIFEST} is damaged, or the attempt was given up") from None
    if missing:
        raise DamagedCheckpoint(f"{min(missing)} was removed by someone else before the checkpoint was committed")
    if not _put_first(join(uri, MARKER), (json.dumps({"save": save, "crc32c": crc32c.crc32c(manifest)}) + "\n").encode()):
        raise DamagedCheckpoint("another attempt at saving this step was committed before")
    open_storage(uri).write(join(uri, LATEST), save.encode())


def _put_first(uri: str, data: bytes) -> bool:
    """Write an object where there is none; returns whether it holds ``data`` now, as it also does where the answer to a write was lost."""
    storage = open_storage(uri)
    if storage.write(uri, data, if_absent=True):
        return True
    try:
        return storage.read(uri) == data
    except Missing:
        return False


def read_checkpoint(uri: str) -> Checkpoint:
    """The committed checkpoint of a step; verifies marker and manifest, but not the other files.

    Raises:
        NotCommitted: there is none.
        DamagedCheckpoint: its marker or manifest is not what was written.
        UserError: another version of oar_scale wrote it in another format.
    """
    storage = open_storage(uri)
    try:
        marker = storage.read(join(uri, MARKER))
    except Missing:
        raise NotCommitted from None
    try:
        fields = parse_object(marker)
        save, expected = str(fields["save"]), fields["crc32c"]
        if not _is_save(save):
            raise ValueError(f"{shown(save)} is no attempt's name")
        if not _is_count(expected):
            raise ValueError(f"crc32c is {shown(expected)}")
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{MARKER} is damaged ({cut(str(error), lines=1, characters=200) or 'it is empty'})") from None
    try:
        data = storage.read(join(uri, save, MANIFEST))
    except Missing:
        raise DamagedCheckpoint(f"{save}/{MANIFEST} is missing") from None
    actual = crc32c.crc32c(data)
    if actual != expected:
        raise DamagedCheckpoint(f"{save}/{MANIFEST} is damaged (crc32c {actual:08x}; {MARKER} says {expected:08x})")
    try:
        manifest = parse_object(data)
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{uri}: is of format {manifest['format']}, this version of oar_scale reads {FORMAT}. Use the version that wrote it."
            )
        _check_manifest(manifest)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{save}/{MANIFEST} is not a checkpoint's ({cut(repr(error), lines=1, characters=200)})") from None
    return Checkpoint(uri, save, manifest)


def _check_manifest(manifest: JsonObject) -> None:
    """Raise where something is of the wrong kind, or a file would lie elsewhere."""
    for name in _COUNTS:
        if not _is_count(manifest.get(name, 0)):
            raise ValueError(f"{name} is {shown(manifest[name])}")
    for name in _OBJECTS:
        if not isinstance(manifest.get(name, {}), dict):
            raise ValueError(f"{name} is {shown(manifest[name])}")
    for name, value in manifest.get("state", {}).get("metrics", {}).items():
        if not _is_number(value):
            raise ValueError(f"metric {shown(name)} is {shown(value)}")
    if not _is_number(manifest.get("saved_at", 0.0)):
        raise ValueError(f"saved_at is {shown(manifest['saved_at'])}")
    for name, entry in manifest["files"].items():
        try:
            file_name(name)
        except ValueError:
            raise ValueError(f"{shown(name)} is not the name of a checkpoint's file") from None
        if not all(_is_count(entry.get(key, 0)) for key in ("bytes", "crc32c", "rank")):
            raise ValueError(f"{name} has {cut(repr(entry), lines=1, characters=100)}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: object) -> bool:
    """Whether it is a number that a float can be made of; NaN is."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST)


def require_fields(checkpoint: Checkpoint, *names: str) -> None:
    """What a reader of the files needs: raise DamagedCheckpoint where the manifest lacks one of these fields (by default, any), or the size
    or checksum of a file, or names a file that DeepSpeed does not write."""
    for name in checkpoint.files:
        if not SHARD.fullmatch(name):
            raise DamagedCheckpoint(f"{checkpoint.save}/{MANIFEST}: {shown(name)} is not the name of a checkpoint's file")
    of_files = ("bytes", "crc32c") if names else ("bytes", "crc32c", "rank")
    missing = [name for name in names or (*_COUNTS, *_OBJECTS) if name not in checkpoint.manifest]
    missing += [f"files.{name}.{key}" for name, entry in checkpoint.files.items() for key in of_files if key not in entry]
    if missing:
        raise DamagedCheckpoint(f"{checkpoint.save}/{MANIFEST} is not a checkpoint's: it has no {missing[0]}")


def uncommit(uri: str) -> None:
    """Remove the commit marker of a step, so that nobody reads it any more; its attempts are given up, or they would be committed again."""
    storage = open_storage(uri)
    for save in sorted({save for location in checkpoint_locations(uri) for save in location.saves}):
        storage.write(join(uri, save, MANIFEST), _GIVEN_UP)
    for name in (MARKER, LATEST):
        storage.delete(join(uri, name))


def delete(uri: str, names: Iterable[str]) -> None:
    """Delete objects of a step: the marker first, so that a part is never taken for the whole checkpoint, and manifests last, so that an
    attempt that was given up finds that it was, or that its files are gone."""
    storage = open_storage(uri)
    names = sorted(names, key=lambda name: (name != MARKER, name.endswith(f"/{MANIFEST}"), name))
    for name in names:
        storage.delete(join(uri, name))
    if not uri.startswith("s3://"):
        for folder in [*sorted({os.path.dirname(join(uri, name)) for name in names}, reverse=True), uri]:
            with suppress(OSError):  # it holds something else, or is gone
                os.rmdir(folder)


def _split(name: str) -> tuple[str, str]:
    """A step's folder and the rest of the name; both empty where the object belongs to no step."""
    match = re.match(r"(.*/step-\d{8,})/(.+)$", name)
    return (match[1], match[2]) if match else ("", "")
