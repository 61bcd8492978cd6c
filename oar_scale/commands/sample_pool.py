"""``oar sample MODEL --prompts FILE --out FOLDER --actors N``: many pictures, by a pool of Ray actors, as WebDataset shards."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

from oar_scale.commands.drawing_target import find_target
from oar_scale.commands.sample import SampleRequest, given_prompts
from oar_scale.errors import UserError
from oar_scale.observe.console import Console
from oar_scale.observe.formatting import duration
from oar_scale.shard_pool import PoolReport
from oar_scale.shard_pool.ledger import Record
from oar_scale.shard_pool.pool_messages import event_message
from oar_scale.shard_pool.pool_status import read_status, status_lines
from oar_scale.shard_pool.sampling_pool import SamplingJob, sample_all, shard_sizes
from oar_scale.storage import Missing, absolute, join

NAMED = 20


def sample_with_actors(request: SampleRequest, actors: int, gpus_per_actor: float, shard_pictures: int, say: Callable[[str], None]) -> int:
    """Draw the pictures for all prompts of a file; what an interrupted pool has finished stays.

    Args:
        actors, gpus_per_actor, shard_pictures: as for :func:`oar_scale.shard_pool.sampling_pool.sample_all`.
        say: called with each line for people.

    Returns:
        1 where the model cannot take some of the prompts, which are named, else 0.

    Raises:
        UserError: as :func:`oar_scale.shard_pool.sampling_pool.sample_all`, or no file of prompts, or no folder for the shards.
    """
    if (request.prompts is None and request.images is None) or request.captions:
        raise UserError("--actors: prompts come from a file: --prompts FILE; of a model of classes also --labels balanced --images N")
    if not 0 <= gpus_per_actor < math.inf:
        raise UserError(f"--gpus-per-actor {gpus_per_actor} must be a number from 0")
    out = pool_folder(request)
    target, began = find_target(absolute(request.target), request.overrides, request.model), time.monotonic()
    given = given_prompts(request, target)
    parallel = target.run.recipe.parallel if target.run else None
    job = SamplingJob(
        bundle=target.bundle,
        out=out,
        dtype=target.dtype(request.precision),
        order=request.order,
        count=request.count or 1,
        batch=request.batch,
        cpu_threads=parallel.cpu_threads if parallel else 1,
        cuda=gpus_per_actor > 0,
    )
    with Console(sys.stderr).progress(len(given) * job.count, "pictures") as tally:

        def progress(done: int, _: int, __: PoolReport) -> None:
            tally.update(done)

        def event(kind: str, fields: Record) -> None:
            if message := event_message(kind, fields):
                tally.note(message)

        manifest = sample_all(
            job,
            given,
            shard_pictures=shard_pictures,
            actors=actors,
            gpus_per_actor=gpus_per_actor,
            gpu_type=parallel.gpu_type if parallel and gpus_per_actor else None,
            on_progress=progress,
            on_event=event,
        )
    where = {f"{each.number:06d}": each.where for each in given} if manifest.skipped else {}
    for key, reason in list(manifest.skipped.items())[:NAMED]:
        say(f"{where[key]}: left out: {reason}")
    if len(manifest.skipped) > NAMED:
        say(f"... and {len(manifest.skipped) - NAMED} more prompts; {join(out, 'manifest.json')} names them all")
    took = duration(time.monotonic() - began)
    left_out = f", {len(manifest.skipped)} prompts left out" if manifest.skipped else ""
    say(f"{out}: {manifest.samples} pictures in {len(manifest.shards)} shards, in {took}{left_out}")
    return 1 if manifest.skipped else 0


def show_sampling_status(request: SampleRequest, say: Callable[[str], None]) -> None:
    """Print how far a pool is that writes into a folder, from any machine. Raises UserError where none has begun."""
    out = pool_folder(request)
    try:
        sizes = shard_sizes(out)
    except Missing as error:
        raise UserError(f"{out}: no pool has begun to draw into this folder") from error
    say("\n".join(status_lines(read_status(join(out, "ledger"), sizes), out)))


def pool_folder(request: SampleRequest) -> str:
    """The folder of a pool's shards, as all hosts know it. Raises UserError where none is named."""
    if request.out is None or request.out.lower().endswith(".png"):
        raise UserError("--actors and --status are of shards in a folder: --out FOLDER or --out s3://bucket/prefix")
    return absolute(request.out)
