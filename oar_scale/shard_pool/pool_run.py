"""``run_pool``: from a ledger with gaps to one without."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from oar_scale.errors import UserError
from oar_scale.runtime.ray_session import ray_session
from oar_scale.runtime.retry import retry_transient
from oar_scale.runtime.stop_signals import StopSignals
from oar_scale.shard_pool.actor import Actor, Worker
from oar_scale.shard_pool.backends import ProcessActors, RayActors
from oar_scale.shard_pool.driver import PoolDriver
from oar_scale.shard_pool.ledger import Ledger, LedgerEntry
from oar_scale.shard_pool.pool_types import ArrayTask, Bounds, FindLost, OnEvent, OnProgress, PoolReport, Timing
from oar_scale.storage import join, open_storage

EARLIER = 10
"""Shards of earlier pools that say what one takes until there are shards of our own."""


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
    config: Mapping[str, str] | None = None,
    array: ArrayTask | None = None,
    timing: Timing | None = None,
    find_lost: FindLost | None = None,
    on_progress: OnProgress | None = None,
    on_event: OnEvent | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> PoolReport:
    """Do every shard that is not in the ledger yet.

    Args:
        make_worker: called once in each actor's process; picklable, and small when pickled.
        shards: names, unique; they also name the ledger's entries.
        ledger: folder URI of the ledger; the folder ``{ledger}-pool`` beside it is the pool's as well.
        cpu_threads: cores an actor takes; Ray sets ``OMP_NUM_THREADS`` to it where that is unset.
        max_retries: how often a shard is tried again after its actor died or its worker failed.
        config: what the shards are made into: names and values; another pool on the same ledger must have the same.
        array: be one of several processes, with one actor and without Ray; ``actors`` does not matter then.
        find_lost: returns which of the finished shards have lost their output; they are done again.
        clock: seconds, by which the driver finds stragglers, stuck actors and expired leases.

    Raises:
        UserError: no worker could be made and the user can fix it, the actors do not fit on this machine, or the ledger is for
            something else.
        RuntimeError: nobody works, and workers could not be made more than ``max_retries`` times in a row.
        Requeue: stopped by a signal; what is done is in the ledger.
    """
    book, report, timing = Ledger(ledger), PoolReport(), timing or Timing()
    entries = retry_transient(lambda: book.entries(shards), timing.patience_s)
    problems = retry_transient(lambda: book.damaged(shards, entries), timing.patience_s)
    if find_lost:
        results = {shard: entry.result for shard, entry in entries.items()}
        problems |= retry_transient(lambda: find_lost(results), timing.patience_s)
    for shard, problem in problems.items():
        retry_transient(partial(book.forget, shard), timing.patience_s)
        entries.pop(shard, None)
        if on_event:
            on_event("lost_output", {"shard": shard, "error": problem})
    for shard, entry in entries.items():
        report.done[shard] = entry.result
        if on_progress:
            on_progress(shard, entry.result, report)
    report.already_done = len(report.done)
    missing = [shard for shard in shards if shard not in report.done]
    if missing:
        gpus = _gpus() if gpus_per_actor and not array and "RAY_ADDRESS" not in os.environ else 0
        bounds = Bounds(1, 1) if array else _bounds(actors, len(missing), cpu_threads, gpus_per_actor, gpus)
        if config:
            retry_transient(lambda: book.bind(config), timing.patience_s)
        with StopSignals() as signals, ExitStack() as stack:
            if not array:
                stack.enter_context(ray_session(cpus=bounds.most * cpu_threads, gpus=gpus))
                signals.arm()
            driver = PoolDriver(
                ledger=book,
                missing=missing,
                bounds=bounds,
                max_retries=max_retries,
                timing=timing,
                report=report,
                signals=signals,
                array=array,
                earlier_s=_last_seconds(entries.values()),
                on_progress=on_progress,
                on_event=on_event,
                clock=clock,
            )
            make_actor = partial(Actor, make_worker, book, driver.lease.holder, timing.patience_s)
            driver.run(ProcessActors(make_actor) if array else RayActors(make_actor, cpu_threads, gpus_per_actor, gpu_type))
    report.done = {shard: report.done[shard] for shard in shards if shard in report.done}
    return report


def lost_outputs(folder: str, written: Mapping[str, tuple[str, int | None]], what: str) -> dict[str, str]:
    """Return which finished shards have lost their output, and how: a :data:`FindLost` for the price of a listing.

    Args:
        written: for each shard the name of its output in the folder, and its bytes where they are known.
        what: to call an output.
    """
    # Listed after the ledger was read: an output is older than its entry.
    sizes, problems = open_storage(folder).sizes(folder) if written else {}, dict[str, str]()
    for shard, (name, expected) in written.items():
        size = sizes.get(join(folder, name))
        if size is None:
            problems[shard] = f"its {what} is gone"
        elif expected not in (None, size):
            problems[shard] = f"its {what} has {size} bytes, {expected} were written"
    return problems


def _bounds(actors: int | Bounds, missing: int, cpu_threads: int, gpus_per_actor: float, gpus: int) -> Bounds:
    """The bounds of the pool: no more actors than there are shards; a Ray of our own has the capacity of this machine."""
    wanted = Bounds(actors, actors) if isinstance(actors, int) else actors
    least, most = min(wanted.least, missing), min(wanted.most, missing)
    if "RAY_ADDRESS" in os.environ:
        return Bounds(least, most)
    most = min(most, (os.cpu_count() or 1) // cpu_threads)
    if gpus_per_actor:
        fit = gpus * int(1 / gpus_per_actor) if gpus_per_actor < 1 else int(gpus / gpus_per_actor)
        if least > fit:
            remedy = f"Ask for {fit} (extract.actors, for tokens parallel.workers)" if fit else "Ask for none (gpus_per_actor: 0)"
            raise UserError(
                f"{least} actors with {gpus_per_actor:g} GPUs each do not fit on this machine, which has {gpus} GPUs.\n"
                f"{remedy}, or point RAY_ADDRESS at a cluster that has them."
            )
        most = min(most, fit)
    return Bounds(least, max(least, most))


def _gpus() -> int:
    """The GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def _last_seconds(entries: Iterable[LedgerEntry]) -> list[float]:
    works = sorted((entry.work for entry in entries if "finished" in entry.work), key=lambda work: work["finished"])
    return [work["seconds"] for work in works[-EARLIER:]]
