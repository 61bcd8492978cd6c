"""Resume from the newest intact checkpoint, with an engine of any ZeRO stage and number of ranks.

    rank 0      lists checkpoints, reads markers and manifests, compares the settings: newest first
    each host   fetches the files that its ranks need, once, divided among its ranks; checksums are verified during the download
    all         agree: a fault that one rank finds is looked for by a rank of another host, in the storage. Where that finds it too, the
                checkpoint is rejected and the one before is tried; else the first host's memory or disk is damaged, which is an error
    engine      same stage and ranks: DeepSpeed's own load; otherwise parameter by parameter, and then compared with the shards

Disks of other hosts are never needed. A storage that does not answer is an error, not a fault of the checkpoint.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from oar_scale.distributed.checkpoints import layout
from oar_scale.distributed.checkpoints.deepspeed_types import ShardedEngine
from oar_scale.distributed.checkpoints.fetch import check, discard, local_folder, obtain
from oar_scale.distributed.checkpoints.layout import Checkpoint, CheckpointLocation, DamagedCheckpoint
from oar_scale.distributed.checkpoints.scratch import Scratch, clear_dead
from oar_scale.distributed.checkpoints.shard_keys import WEIGHTS
from oar_scale.distributed.checkpoints.shard_tensors import read_shards
from oar_scale.errors import Unreachable, UserError
from oar_scale.json_object import JsonObject
from oar_scale.runtime.retry import retry_transient
from oar_scale.storage.patience import patience_s, patient
from oar_scale.training.job import TrainingJob

T = TypeVar("T")
_Fault = tuple[str | None, str]
"""The file that is damaged, None for marker, manifest or list of files; and the fault."""
Changes = dict[str, tuple[object, object]]
"""Of settings by their names in the recipe: what they were, and what they are."""
_SentError = tuple[str, str]
"""Of an error at another rank: which kind, and its text."""


@dataclass(frozen=True)
class Rejected:
    """A committed checkpoint that cannot be used, and why."""

    uri: str
    fault: str


@dataclass(frozen=True)
class Restored:
    """The state to which an engine was restored."""

    step: int
    uri: str
    state: JsonObject
    """The loop's state that was given to ``Saver.save``."""
    streams: tuple[int, int]
    """``data.canonical_streams`` and ``data.shuffle_window_shards`` that it was written with."""
    changed: Changes
    """Settings that were others when it was written: what they were, and what they are."""
    rejected: tuple[Rejected, ...]
    """Newer checkpoints that are damaged in the storage; they are no longer committed."""
    converted: bool
    """It was written by another number of ranks, or under another ZeRO stage."""
    world_size: int
    zero_stage: int
    """Number of ranks and ZeRO stage that wrote it."""
    seconds: float


def restore(engine: ShardedEngine, job: TrainingJob, *, at_most: int | None = None) -> Restored | None:
    """Load the newest committed checkpoint that is intact into the engines of all ranks. Collective.

    Args:
        engine: new, or in the middle of training; its whole state is replaced.
        job: the stage, whose settings must be those of the checkpoint.
        at_most: go back to this step or an earlier one. Checkpoints of later steps then lose their commit marker.

    Returns:
        What was restored; None when the stage has no checkpoint.

    Raises:
        UserError: none of the checkpoints can be used, they belong to settings that a training cannot go on without, or the storage does
            not answer.
        RuntimeError: a host reads something as damaged that another one reads as it was written.
    """
    with patient(job.recipe.storage.patience_s):
        return _restore(engine, job, at_most)


def _restore(engine: ShardedEngine, job: TrainingJob, at_most: int | None) -> Restored | None:
    started = time.monotonic()
    candidates = _from_rank_0(lambda: _candidates(job, at_most))
    rejected: list[Rejected] = []
    scratch = _HostScratch(job)
    try:
        for location in candidates:
            checkpoint, fault, changed = _from_rank_0(partial(_examine, job, location))
            faults: dict[int, _Fault] = {0: (None, fault)} if fault is not None else {}
            if checkpoint is not None:
                faults = scratch.obtain(checkpoint, engine)
            if checkpoint is None or faults:
                rejected.append(Rejected(location.uri, _confirmed(job, location, faults, scratch.hosts)))
                continue
            converted = not _fits(checkpoint, engine)
            with _own_settings(engine):
                _load(engine, checkpoint, scratch.folder(checkpoint), converted)
            _from_rank_0(lambda: _uncommit(job, rejected, at_most))
            return Restored(
                step=checkpoint.step,
                uri=checkpoint.uri,
                state=checkpoint.state,
                streams=tuple(checkpoint.manifest["identity"]["streams"]),
                changed=changed,
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
    """Committed steps, newest first."""
    committed = [location for location in layout.checkpoint_locations(job.checkpoints) if location.committed]
    return [location for location in reversed(committed) if at_most is None or location.step <= at_most]


def _examine(job: TrainingJob, location: CheckpointLocation) -> tuple[Checkpoint | None, str | None, Changes]:
    """A step's checkpoint, or None and the fault that shows before its files are read; and which settings were others then."""
    try:
        checkpoint = layout.read_checkpoint(location.uri)
        layout.require_fields(checkpoint)
    except DamagedCheckpoint as error:
        return None, str(error), {}
    missing = sorted(name for name in checkpoint.files if f"{checkpoint.save}/{name}" not in location.names)
    if missing:
        return None, f"{missing[0]} is missing", {}
    return checkpoint, None, _changed_settings(job, checkpoint)


def _uncommit(job: TrainingJob, rejected: list[Rejected], at_most: int | None) -> None:
    """Remove the markers of checkpoints that are not to be resumed: they would count as kept, or as the newest."""
    later = [
        location.uri
        for location in layout.checkpoint_locations(job.checkpoints)
        if location.committed and at_most is not None and location.step > at_most
    ]
    for uri in [*later, *(each.uri for each in rejected)]:
        layout.uncommit(uri)


def _fits(checkpoint: Checkpoint, engine: ShardedEngine) -> bool:
    return (checkpoint.world_size, checkpoint.zero_stage) == (dist.get_world_size(), engine.zero_optimization_stage())


def _needed(checkpoint: Checkpoint, ranks: list[int], engine: ShardedEngine) -> list[str]:
    """The files that these ranks read: all, or without conversion their own and those that belong to no rank."""
    names = sorted(checkpoint.files)
    if not _fits(checkpoint, engine):
        return names
    return [name for name in names if checkpoint.files[name]["rank"] in ranks or name.startswith("mp_rank_")]


def _confirmed(job: TrainingJob, location: CheckpointLocation, faults: Mapping[int, _Fault], hosts: list[str]) -> str:
    """A fault that is in the stored bytes: another rank than the one that found it, of another host if there is one, finds it as well.
    Collective.

    Args:
        faults: by the rank that found it.

    Raises:
        RuntimeError: none is. A host whose memory or disk is damaged must not take a checkpoint from all others.
    """
    found: list[str] = []
    error: Exception | None = None
    try:
        for rank, (name, _) in faults.items():
            if _judge(rank, hosts) == dist.get_rank() and (seen := _find_fault(job, location, name)) is not None:
                found.append(seen)
    except Exception as raised:  # raised on all ranks below
        error = raised
    answers = _all_gather((found, _sendable(error)))
    _raise_first(error, [sent for _, sent in answers])
    for seen in (fault for part, _ in answers for fault in part):
        return seen
    rank, (_, fault) = next(iter(faults.items()))
    raise RuntimeError(
        f"{location.uri}: rank {rank} on host {hosts[rank]} finds that {fault}; rank {_judge(rank, hosts)} on host "
        f"{hosts[_judge(rank, hosts)]} finds it intact. The memory or the disk of {hosts[rank]} may be damaged: take it out of the cluster."
    )


def _judge(rank: int, hosts: list[str]) -> int:
    """The rank that looks for a fault which ``rank`` has found."""
    others = [(rank + step) % len(hosts) for step in range(1, len(hosts))]
    return next((other for other in others if hosts[other] != hosts[rank]), others[0] if others else rank)


def _find_fault(job: TrainingJob, location: CheckpointLocation, name: str | None) -> str | None:
    """The fault of a checkpoint's marker, manifest, list of files, or of the file ``name``, as it shows from here; None where none does."""
    listed = layout.checkpoint_locations(location.uri)  # anew: a listing may have been damaged as well
    checkpoint, fault, _ = _examine(job, listed[0] if listed else location)
    if checkpoint is None or name is None:
        return fault
    try:
        check(checkpoint, name)
    except DamagedCheckpoint as damaged:
        return str(damaged)
    return None


class _HostScratch:
    """The folder in which the ranks of a host keep the files that they fetch. Collective."""

    def __init__(self, job: TrainingJob) -> None:
        self.hosts = hosts = _all_gather(socket.gethostname())
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
        """The local folder of a checkpoint's files."""
        return local_folder(checkpoint, self._path)

    def obtain(self, checkpoint: Checkpoint, engine: ShardedEngine) -> dict[int, _Fault]:
        """Fetch and verify the files that this host needs, each rank its share. Collective.

        Returns:
            By rank, the first fault that it has found.
        """
        names = _needed(checkpoint, self._ranks, engine)[self._index :: len(self._ranks)]
        fault: _Fault | None = None
        error: Exception | None = None
        try:
            retry_transient(lambda: obtain(checkpoint, names, self._path), patience_s())  # its threads know nothing of this one's patience
        except DamagedCheckpoint as damaged:
            fault = damaged.file, str(damaged)
        except Exception as raised:  # raised on all ranks below
            error = raised
        answers = _all_gather((fault, _sendable(error)))
        _raise_first(error, [sent for _, sent in answers])
        faults = {rank: fault for rank, (fault, _) in enumerate(answers) if fault is not None}
        if faults:  # the one before comes next, and there may be no room for both
            discard(checkpoint, names, self._path)
        return faults

    def remove(self) -> None:
        """Remove the folder."""
        if self._own is not None:
            self._own.remove()


@contextmanager
def _own_settings(engine: ShardedEngine) -> Iterator[None]:
    """Let the optimizer keep the settings that it was made with: DeepSpeed's load replaces them by those of the checkpoint."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in engine.optimizer.param_groups]
    clip = getattr(engine.optimizer, "clip_grad", None)  # of DeepSpeed's optimizers; ZeRO 1 and 2 load it
    yield
    if clip is not None:
        engine.optimizer.clip_grad = clip
    for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(settings)


def _load(engine: ShardedEngine, checkpoint: Checkpoint, folder: str, convert: bool) -> None:
    if convert:
        _convert(engine, checkpoint, folder)
    else:
        from oar_scale.distributed.checkpoints.deepspeed_files import load_shards

        load_shards(engine, os.path.dirname(folder), os.path.basename(folder))
    dist.barrier()


def _convert(engine: ShardedEngine, checkpoint: Checkpoint, folder: str) -> None:
    """Load shards of another number of ranks or another stage into the engine, then compare its whole state with them.

    Each rank reads one whole parameter at a time from the disk and keeps its part.
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
    faults: list[str] = [] if live.steps() == {shards.step} else [f"the optimizer's count is {live.steps()}, not {shards.step}"]
    for number, name in enumerate(here):
        for kind in kinds:
            loaded = live.get(name, kind)
            if kind == WEIGHTS and not live.computes_with(name, loaded):
                faults.append(f"{name}: the model does not compute with its float32 weights, rounded")
            # One rank compares each, since all of them have got the same whole tensor.
            mine = number % dist.get_world_size() == dist.get_rank()
            if mine and not _same(loaded.cpu(), shards.whole(name, kind)):
                faults.append(f"{name}: its {kind} are not those of the checkpoint")
    all_faults = [fault for part in _all_gather(faults) for fault in part]
    if all_faults:
        raise RuntimeError(f"{checkpoint.uri}: was not converted faithfully: {'; '.join(all_faults[:5])}")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal. 0 equals -0, which becomes 0 in a sum over ranks, and NaN equals NaN."""
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def _all_gather(value: T) -> list[T]:
    """The values of all ranks, by rank. Collective."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _from_rank_0(action: Callable[[], T]) -> T:
    """Call ``action`` at rank 0 only; its result, or the error that it raises, comes to every rank. Collective."""
    answer: list[T | _SentError | None] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except Exception as raised:  # raised on all ranks below
            error = raised
            answer[1] = _sendable(error)
    dist.broadcast_object_list(answer)
    _raise_first(error, [cast("_SentError | None", answer[1])])
    return cast(T, answer[0])


def _sendable(error: Exception | None) -> _SentError | None:
    """An error as it is sent to other ranks. Not every exception can be pickled."""
    match error:
        case None:
            return None
        case Unreachable():
            return "unreachable", str(error)
        case UserError():
            return "user error", str(error)
        case _:
            return "other", repr(error)


def _raise_first(own: Exception | None, sent: list[_SentError | None]) -> None:
    """Raise this rank's own error, or the first one of another rank, if there is any."""
    if own is not None:
        raise own
    for each in sent:
        if each is not None:
            match each:
                case "unreachable", text:
                    raise Unreachable(text)
                case "user error", text:
                    raise UserError(text)
                case _, text:
                    raise RuntimeError(f"another rank: {text}")


def _changed_settings(job: TrainingJob, checkpoint: Checkpoint) -> Changes:
    """The settings that have changed since. Raises UserError for one that a training cannot go on without."""
    changed = job.changed_since(checkpoint.manifest["identity"])
    for name, (then, now) in changed.items():
        if name not in job.changeable:
            raise UserError(
                f"{checkpoint.uri}: was written with {name} = {then!r}, now it is {now!r}. "
                f"Set it back, do the stage again with: oar run RECIPE --from {job.stage}, or use another run_dir (and storage.root)."
            )
    return changed
