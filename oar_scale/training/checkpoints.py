"""Sharded checkpoints that are either whole or not there.

    checkpoints/pretrain/step-00000100/
        mp_rank_00_model_states.pt, *_optim_states.pt      DeepSpeed's shards, each written and uploaded by its rank
        manifest.json                                      files, sizes, crc32c, world size, ZeRO stage, step, identity, model
        COMMITTED                                          last; without it nobody reads the rest

Loading verifies every file against the manifest first and falls back to the checkpoint before, saying so. DeepSpeed's
shards are pickles: they are opened only after their checksum held.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import crc32c
import torch.distributed as dist

from oar_scale.errors import UserError
from oar_scale.storage import Missing, join, open_storage, write_json
from oar_scale.training.job import TrainingJob

TAG = "shards"


@dataclass(frozen=True)
class Saved:
    """What saving cost."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Rejected:
    """A committed checkpoint that cannot be used, and why."""

    uri: str
    fault: str


@dataclass(frozen=True)
class Found:
    """A committed, verified checkpoint: its step, and its manifest."""

    step: int
    uri: str
    manifest: dict[str, Any]
    rejected: tuple[Rejected, ...]
    """Newer ones that failed verification."""


def save_checkpoint(engine: Any, job: TrainingJob, step: int) -> Saved:
    """Save all ranks' shards of ``step`` and commit them. Collective: every rank calls it."""
    started = time.monotonic()
    target = join(job.checkpoints, f"step-{step:08d}")
    scratch = tempfile.mkdtemp(prefix="oar-checkpoint-")
    try:
        engine.save_checkpoint(scratch, tag=TAG, client_state={"step": step}, save_latest=False)
        mine = {
            name: _upload(os.path.join(scratch, TAG, name), join(target, name)) for name in sorted(os.listdir(os.path.join(scratch, TAG)))
        }
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    gathered: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    files = {name: entry for part in gathered for name, entry in part.items()}
    if dist.get_rank() == 0:
        manifest = {
            "step": step,
            "world_size": dist.get_world_size(),
            "zero_stage": job.recipe.parallel.zero_stage,
            "identity": job.identity,
            "model_spec": engine.module.model.spec.model_dump(mode="json"),
            "files": files,
        }
        write_json(join(target, "manifest.json"), manifest)
        open_storage(target).write(join(target, "COMMITTED"), b"")
        _prune(job)
    dist.barrier()
    return Saved(time.monotonic() - started, sum(entry["bytes"] for entry in files.values()))


def load_checkpoint(engine: Any, job: TrainingJob, found: Found) -> None:
    """Bring a rank's engine to a found checkpoint.

    Raises:
        UserError: it was written by another number of workers or ZeRO stage.
    """
    here = {"world_size": dist.get_world_size(), "zero_stage": job.recipe.parallel.zero_stage}
    for name, value in here.items():
        if found.manifest[name] != value:
            raise UserError(
                f"{found.uri}: written with {name} {found.manifest[name]}, this run has {value}. "
                f"Continue with {name} {found.manifest[name]}, or start the stage anew in another run_dir."
            )
    scratch = tempfile.mkdtemp(prefix="oar-resume-")
    try:
        os.makedirs(os.path.join(scratch, TAG))
        for name in found.manifest["files"]:
            open_storage(found.uri).download(join(found.uri, name), os.path.join(scratch, TAG, name))
        engine.load_checkpoint(scratch, tag=TAG)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def latest_checkpoint(job: TrainingJob) -> Found | None:
    """The newest committed checkpoint whose files all match their checksums; None when there is none.

    Raises:
        UserError: it belongs to other settings than the job's.
    """
    rejected: list[Rejected] = []
    for step in sorted(_committed(job), reverse=True):
        uri = join(job.checkpoints, f"step-{step:08d}")
        manifest, fault = _read_manifest(uri)
        fault = fault or _verify(uri, manifest)
        if fault is None:
            _same_identity(job, uri, manifest["identity"])
            return Found(step, uri, manifest, tuple(rejected))
        rejected.append(Rejected(uri, fault))
    if rejected:
        raise UserError(
            "no checkpoint of this stage can be used:\n"
            + "\n".join(f"{each.uri}: {each.fault}" for each in rejected)
            + f"\nStart it anew with: oar run RECIPE --from {job.stage}"
        )
    return None


@contextmanager
def local_checkpoint(uri: str) -> Iterator[Found]:
    """A checkpoint by its name, verified, as a local folder (``uri`` of what is yielded): itself, or a copy for the block.

    Raises:
        UserError: it is not committed, or a file is missing or damaged.
    """
    storage = open_storage(uri)
    manifest, fault = _read_manifest(uri)
    if fault is None and not storage.exists(join(uri, "COMMITTED")):
        fault = "is not committed: it is being written, or was interrupted"
    with tempfile.TemporaryDirectory(prefix="oar-checkpoint-") as scratch:
        folder = uri
        if fault is None and uri.startswith("s3://"):
            folder = os.path.join(scratch, TAG)
            for name in manifest["files"]:
                storage.download(join(uri, name), os.path.join(folder, name))
        fault = fault or _verify(folder, manifest)  # of the very files that are opened
        if fault is not None:
            raise UserError(f"{uri}: {fault}. Use another checkpoint.")
        yield Found(int(manifest["step"]), folder, manifest, ())


def discard_rejected(found: Found) -> None:
    """Take back the commitment of checkpoints that failed verification, or they would count among those that are kept."""
    for rejected in found.rejected:
        open_storage(rejected.uri).delete(join(rejected.uri, "COMMITTED"))


def _upload(path: str, uri: str) -> dict[str, int]:
    with open(path, "rb") as file:
        checksum = crc32c.crc32c(file.read())
    open_storage(uri).upload(path, uri)
    return {"bytes": os.path.getsize(path), "crc32c": checksum}


def _committed(job: TrainingJob) -> list[int]:
    pattern = re.compile(r"step-(\d{8})/COMMITTED$")
    return [int(match[1]) for uri in open_storage(job.checkpoints).list(job.checkpoints) if (match := pattern.search(uri))]


def _read_manifest(uri: str) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's manifest, or what is wrong with it."""
    try:
        return json.loads(open_storage(uri).read(join(uri, "manifest.json"))), None
    except Missing:
        return {}, "manifest.json is missing"
    except ValueError as error:
        return {}, f"manifest.json is damaged ({error})"


def _verify(uri: str, manifest: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    for name, entry in manifest["files"].items():
        try:
            data = open_storage(uri).read(join(uri, name))
        except Missing:  # an outage is no fault of the checkpoint: it ends the attempt
            return f"{name} is missing"
        checksum = crc32c.crc32c(data)
        if len(data) != entry["bytes"] or checksum != entry["crc32c"]:
            written = f"{entry['bytes']}, {entry['crc32c']:08x}"
            return f"{name} is damaged ({len(data)} bytes, crc32c {checksum:08x}; the manifest says {written})"
    return None


def _same_identity(job: TrainingJob, uri: str, written: dict[str, Any]) -> None:
    for section, value in job.identity.items():
        then = written.get(section)
        if then == value:
            continue
        if isinstance(then, dict) and isinstance(value, dict):
            key = next(k for k in sorted(then.keys() | value.keys()) if then.get(k, "absent") != value.get(k, "absent"))
            section, then, value = f"{section}.{key}", then.get(key), value.get(key)
        raise UserError(
            f"{uri}: was written with {section} = {then!r}, the recipe now says {value!r}. "
            f"Set it back, do the stage again with: oar run RECIPE --from {job.stage}, or use another run_dir (and storage.root)."
        )


def _prune(job: TrainingJob) -> None:
    """Delete all but the newest committed checkpoints, and what kills left; the marker goes first, so that no half is ever
    taken for whole."""
    committed = sorted(_committed(job))
    kept = {f"step-{step:08d}" for step in committed[-job.training.keep_checkpoints :]}
    storage = open_storage(job.checkpoints)
    names = storage.list(job.checkpoints)
    for uri in sorted(names, key=lambda uri: not uri.endswith("/COMMITTED")):
        if uri.removeprefix(job.checkpoints).strip("/").split("/")[0] not in kept:
            storage.delete(uri)
