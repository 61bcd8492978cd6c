"""``run_pool``: from a ledger with gaps to one without."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from oar_scale.data.pool.actor import Actor, Worker
from oar_scale.data.pool.backends import ProcessActors, RayActors
from oar_scale.data.pool.driver import Driver
from oar_scale.data.pool.ledger import Ledger
from oar_scale.data.pool.signals import StopSignals
from oar_scale.data.pool.terms import ArrayTask, Bounds, OnEvent, OnProgress, PoolReport, Timing
from oar_scale.data.ray_session import ray_session


def run_pool(
    make_worker: Callable[[], Worker],
    shards: Sequence[str],
    ledger: str,
    *,
    actors: int | Bounds,
    gpus_per_actor: float = 0,
    gpu_type: str | None = None,
    cpu_threads: int = 1,
    max_retries: int = 3,
    what: Mapping[str, str] | None = None,
    array: ArrayTask | None = None,
    timing: Timing | None = None,
    on_progress: OnProgress | None = None,
    on_event: OnEvent | None = None,
) -> PoolReport:
    """Do every shard that is not in the ledger yet.

    Args:
        make_worker: called once in each actor's process; picklable, and small when pickled.
        shards: names, unique; they also name the ledger's entries.
        ledger: folder URI of the ledger; the folder ``{ledger}-pool`` beside it is the pool's as well.
        cpu_threads: cores an actor takes; Ray sets ``OMP_NUM_THREADS`` to it where that is unset.
        max_retries: how often a shard is tried again after its actor died or its worker failed.
        what: what the shards are made into; another pool on the same ledger must say the same.
        array: be one of several processes, with one actor and without Ray; ``actors`` does not matter then.

    Raises:
        UserError: a worker could not be made and it is the user's to mend, or the ledger is for something else.
        RuntimeError: workers could not be made more than ``max_retries`` times in a row.
        Requeue: stopped by a signal; what is done is in the ledger.
    """
    book, report, timing = Ledger(ledger), PoolReport(), timing or Timing()
    for shard, entry in book.entries(shards).items():
        report.done[shard] = entry.facts
        if on_progress:
            on_progress(shard, entry.facts, report)
    report.found = len(report.done)
    missing = [shard for shard in shards if shard not in report.done]
    if missing:
        if what:
            book.bind(what)
        bounds = Bounds(1, 1) if array else _bounds(actors, len(missing), cpu_threads)
        with StopSignals() as signals, ExitStack() as stack:
            if not array:
                stack.enter_context(ray_session(cpus=bounds.most * cpu_threads, gpus=math.ceil(bounds.most * gpus_per_actor)))
                signals.arm()
            driver = Driver(book, missing, bounds, max_retries, timing, report, signals, array, on_progress, on_event)
            make_actor = partial(Actor, make_worker, book, driver.holder.id, timing.patience_s)
            driver.do(ProcessActors(make_actor) if array else RayActors(make_actor, cpu_threads, gpus_per_actor, gpu_type))
    report.done = {shard: report.done[shard] for shard in shards if shard in report.done}
    return report


def _bounds(actors: int | Bounds, missing: int, cpu_threads: int) -> Bounds:
    """No more than there are shards; a Ray of our own has the room that this machine has."""
    if isinstance(actors, int):
        return Bounds(min(actors, missing), min(actors, missing))
    most = actors.most if "RAY_ADDRESS" in os.environ else max(actors.least, min(actors.most, (os.cpu_count() or 1) // cpu_threads))
    return Bounds(min(actors.least, missing), min(most, missing))
