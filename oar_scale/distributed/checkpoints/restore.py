"""Going on from a checkpoint: the newest whole one, into an engine of any ZeRO stage and number of ranks.

    rank 0      lists, reads markers and manifests, compares the settings: newest first
    each host   fetches the files that its ranks need, once, its ranks sharing them out; checksums are taken as they come
    all         agree: one fault anywhere, and the checkpoint is passed over for the one before
    engine      same stage and ranks: DeepSpeed's own load; else parameter by parameter, and then compared with the shards

Other hosts' disks are never needed. A storage that does not answer is an error, not a fault of the checkpoint.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from oar_scale.distributed.checkpoints import layout
from oar_scale.distributed.checkpoints.fetch import local_folder, obtain
from oar_scale.distributed.checkpoints.layout import Checkpoint, CheckpointLocation, DamagedCheckpoint
from oar_scale.distributed.checkpoints.scratch import Scratch, clear_dead
from oar_scale.distributed.checkpoints.shard_tensors import WEIGHTS, read_shards
from oar_scale.errors import UserError
from oar_scale.training.job import TrainingJob


@dataclass(frozen=True)
class Rejected:
    """A committed checkpoint that cannot be used, and why."""

    uri: str
    fault: str


@dataclass(frozen=True)
class Restored:
    """What an engine has been brought to."""

    step: int
    uri: str
    state: dict[str, Any]
    """What the loop gave to ``Saver.save``."""
    rejected: tuple[Rejected, ...]
    """Newer ones that were passed over; they are no longer committed."""
    converted: bool
    """It was written by another number of ranks, or under another ZeRO stage."""
    world_size: int
    zero_stage: int
    """By how many ranks, and under which stage."""
    seconds: float


def restore(engine: Any, job: TrainingJob, *, at_most: int | None = None) -> Restored | None:
    """Bring a rank's engine to the newest committed checkpoint that is whole; None when the stage has none. Collective.

    Args:
        engine: fresh, or in the middle of training: all that it held is replaced.
        at_most: go back to this step or before it. Checkpoints of later steps then lose their commitment.

    Raises:
        UserError: none of the checkpoints can be used, they belong to other settings than the job's, or the storage does not answer.
    """
    started = time.monotonic()
    candidates = _from_rank_0(lambda: _candidates(job, at_most))
    rejected: list[Rejected] = []
    scratch = _HostScratch(job)
    try:
        for location in candidates:
            checkpoint, fault = _from_rank_0(lambda location=location: _examine(job, location))  # type: ignore[misc]
            fault = fault or scratch.obtain(checkpoint, engine)
            if fault is not None:
                rejected.append(Rejected(location.uri, fault))
                continue
            converted = not _fits(checkpoint, engine)
            _load(engine, checkpoint, scratch.folder(checkpoint), converted)
            _from_rank_0(lambda: _settle(job, rejected, at_most))
            return Restored(
                step=checkpoint.step,
                uri=checkpoint.uri,
                state=checkpoint.state,
                rejected=tuple(rejected),
                converted=converted,
                world_size=checkpoint.world_size,
                zero_stage=checkpoint.zero_stage,
                seconds=time.monotonic() - started,
            )
    finally:
        scratch.remove()
    if rejected:
        raise UserError(
            "no checkpoint of this stage can be used:\n"
            + "\n".join(f"{each.uri}: {each.fault}" for each in rejected)
            + f"\nStart it anew with: oar run RECIPE --from {job.stage}"
        )
    return None


def _candidates(job: TrainingJob, at_most: int | None) -> list[CheckpointLocation]:
    """Steps with a marker, newest first."""
    committed = [location for location in layout.checkpoint_locations(job.checkpoints) if location.committed]
    return [location for location in reversed(committed) if at_most is None or location.step <= at_most]


def _examine(job: TrainingJob, location: CheckpointLocation) -> tuple[Checkpoint | None, str | None]:
    """A step's checkpoint, or what can be seen to be wrong with it before its files are read."""
    try:
        checkpoint = layout.read_checkpoint(location.uri)
    except DamagedCheckpoint as error:
        return None, str(error)
    missing = sorted(name for name in checkpoint.files if f"{checkpoint.save}/{name}" not in location.names)
    if missing:
        return None, f"{missing[0]} is missing"
    _same_identity(job, checkpoint)
    return checkpoint, None


def _settle(job: TrainingJob, rejected: list[Rejected], at_most: int | None) -> None:
    """Take back the commitment of what nobody is to go on from: it would count among those that are kept, or be the newest."""
    undone = [
        location.uri
        for location in layout.checkpoint_locations(job.checkpoints)
        if location.committed and at_most is not None and location.step > at_most
    ]
    for uri in [*undone, *(each.uri for each in rejected)]:
        layout.uncommit(uri)


def _fits(checkpoint: Checkpoint, engine: Any) -> bool:
    return (checkpoint.world_size, checkpoint.zero_stage) == (dist.get_world_size(), engine.zero_optimization_stage())


def _needed(checkpoint: Checkpoint, ranks: list[int], engine: Any) -> list[str]:
    """The files that these ranks read: of a checkpoint that fits, their own and those that belong to no rank."""
    names = sorted(checkpoint.files)
    if not _fits(checkpoint, engine):
        return names
    return [name for name in names if checkpoint.files[name]["rank"] in ranks or name.startswith("mp_rank_")]


class _HostScratch:
    """Where the ranks of a host keep what they fetch. Collective."""

    def __init__(self, job: TrainingJob) -> None:
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        host = hosts[dist.get_rank()]
        self._ranks = [rank for rank, name in enumerate(hosts) if name == host]
        self._index = self._ranks.index(dist.get_rank())
        name = f"{_from_rank_0(layout.new_save)}-{host}"
        self._path = os.path.join(job.scratch, f"checkpoint-{name}")
        self._own: Scratch | None = None
        if self._index == 0:
            clear_dead(job.scratch)
            self._own = Scratch(job.scratch, name)
        dist.barrier()

    def folder(self, checkpoint: Checkpoint) -> str:
        return local_folder(checkpoint, self._path)

    def obtain(self, checkpoint: Checkpoint, engine: Any) -> str | None:
        """Fetch and check what this host needs, each rank its share; what is wrong with it anywhere, or None. Collective."""
        names = _needed(checkpoint, self._ranks, engine)[self._index :: len(self._ranks)]
        fault: str | None = None
        error: Exception | None = None
        try:
            obtain(checkpoint, names, self._path)
        except DamagedCheckpoint as damaged:
            fault = str(damaged)
        except Exception as raised:  # all ranks are told
            error = raised
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, (fault, _told(error)))
        _raise_first(error, [told for _, told in answers])
        return next((fault for fault, _ in answers if fault is not None), None)

    def remove(self) -> None:
        if self._own is not None:
            self._own.remove()


def _load(engine: Any, checkpoint: Checkpoint, folder: str, convert: bool) -> None:
    if convert:
        _convert(engine, checkpoint, folder)
    else:
        from oar_scale.distributed.checkpoints.deepspeed_files import load_shards

        load_shards(engine, os.path.dirname(folder), os.path.basename(folder))
    dist.barrier()


def _convert(engine: Any, checkpoint: Checkpoint, folder: str) -> None:
    """Put the shards of other ranks, or of another stage, into the engine; then compare all that it holds with them.

    Each rank keeps its part of every parameter, and of them all one reads one at a time from the disk.
    """
    from oar_scale.distributed.checkpoints.live import LiveState

    shards, live = read_shards(folder, checkpoint.files), LiveState(engine)
    here = {name: live.shape(name) for name in live.parameters}
    for name in sorted(here.keys() | shards.shapes.keys()):
        if here.get(name) != shards.shapes.get(name):
            raise RuntimeError(f"{checkpoint.uri}: has {shards.shapes.get(name)} for {name}, the model {here.get(name)}")
    live.prepare(shards.moments, shards.step)
    kinds = (WEIGHTS, *shards.moments)
    for name in here:
        for kind in kinds:
            live.put(name, kind, shards.whole(name, kind))
    live.refresh(shards.counters)
    faults: list[str] = [] if live.steps() == {shards.step} else [f"the optimiser's count is {live.steps()}, not {shards.step}"]
    for number, name in enumerate(here):
        for kind in kinds:
            found = live.get(name, kind)
            if kind == WEIGHTS and not live.computes_with(name, found):
                faults.append(f"{name}: the model does not compute with its float32 weights, rounded")
            # Each is compared by one rank: the same whole tensor has come to all of them.
            mine = number % dist.get_world_size() == dist.get_rank()
            if mine and not _same(found.cpu(), shards.whole(name, kind)):
                faults.append(f"{name}: its {kind} are not those of the checkpoint")
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, faults)
    found_faults = [fault for part in answers for fault in part]
    if found_faults:
        raise RuntimeError(f"{checkpoint.uri}: was not converted faithfully: {'; '.join(found_faults[:5])}")


def _same(a: Any, b: Any) -> bool:
    """Equal in every value; minus zero, which a sum over ranks makes positive, and NaN count as themselves."""
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def _from_rank_0(action: Callable[[], Any]) -> Any:
    """What ``action`` gives at rank 0, or the error it raises there, on every rank. Collective."""
    answer: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except Exception as raised:  # all ranks are told
            error = raised
            answer[1] = _told(error)
    dist.broadcast_object_list(answer)
    _raise_first(error, [answer[1]])
    return answer[0]


def _told(error: Exception | None) -> tuple[bool, str] | None:
    """An error as other ranks hear of it: whether the user can mend it, and its text. Not every exception can be sent."""
    return None if error is None else (isinstance(error, UserError), str(error) if isinstance(error, UserError) else repr(error))


def _raise_first(own: Exception | None, told: list[tuple[bool, str] | None]) -> None:
    if own is not None:
        raise own
    for each in told:
        if each is not None:
            raise UserError(each[1]) if each[0] else RuntimeError(f"another rank: {each[1]}")


def _same_identity(job: TrainingJob, checkpoint: Checkpoint) -> None:
    for section, value in job.identity.items():
        then = checkpoint.manifest["identity"].get(section)
        if then == value:
            continue
        if isinstance(then, dict) and isinstance(value, dict):
            key = next(k for k in sorted(then.keys() | value.keys()) if then.get(k, "absent") != value.get(k, "absent"))
            section, then, value = f"{section}.{key}", then.get(key), value.get(key)
        raise UserError(
            f"{checkpoint.uri}: was written with {section} = {then!r}, the recipe now says {value!r}. "
            f"Set it back, do the stage again with: oar run RECIPE --from {job.stage}, or use another run_dir (and storage.root)."
        )
