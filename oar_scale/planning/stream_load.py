"""Which ranks read which shards, by the real sample plan (``data/sample_plan.py``): every stream, and a sample of the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oar_scale.config.schema import Recipe
from oar_scale.data.sample_plan import Ids, SamplePlan, step_slots
from oar_scale.errors import UserError
from oar_scale.planning.case import Case
from oar_scale.registry import TRAINING_SECTIONS

CHECKED_SAMPLES = 400_000
"""Samples whose positions are computed, at most, to see that none comes twice."""


@dataclass(frozen=True)
class StreamLoad:
    """An epoch of training on so many ranks."""

    ranks: int
    images: int
    shards: int
    steps: int
    """Of an epoch."""
    skipped: int
    """Images that the epoch skips (the remainder), fewer than there are streams."""
    per_step: tuple[int, int]
    """Samples of a rank in a step, fewest and most."""
    shards_per_rank: tuple[int, float, int]
    """That a rank reads in an epoch: fewest, mean, most."""
    open_at_once: int
    """Shards of a rank at any moment, at most (docs/stream.md)."""
    node_bytes: float
    """That a node fetches in an epoch, at most; each shard once."""
    read_twice: float
    """Bytes that all nodes fetch in an epoch / bytes of all shards."""
    gets_per_epoch: int
    gets_per_s: float
    first_gets: int
    """Requests that the first step waits for, sent all at once."""
    bytes_per_s: float
    checked: int
    """Samples whose positions were computed; each came once."""


def stream_load(case: Case, ranks: int, step_s: float, batch: int) -> StreamLoad:
    """The load of the sample plan of a training run on ``ranks`` workers.

    Args:
        step_s: seconds of a step.
        batch: images of a step.

    Raises:
        UserError: ranks that cannot share the recipe's streams or batch, fewer images than streams, or their number is unknown.
    """
    recipe, shard, per_node = case.recipe, case.shard, case.cluster.per_node
    if case.images is None:
        raise UserError("--simulate has to know how many training images there are: add --images, e.g. --images 1e6")
    check_sharing(recipe, ranks)
    streams, images = recipe.data.canonical_streams, case.images.count
    sizes = [shard.samples] * (images // shard.samples) + ([images % shard.samples] if images % shard.samples else [])
    try:
        plan = SamplePlan(sizes, recipe.seed, streams, recipe.data.shuffle_window_shards)
    except ValueError as error:
        raise UserError(f"data.canonical_streams = {streams}: {error}. Use fewer streams.") from error
    by_stream = _shards_of_streams(plan)
    owners = [np.unique(np.concatenate([by_stream[stream] for stream in range(rank, streams, ranks)])) for rank in range(ranks)]
    counts = [len(owned) for owned in owners]
    fetched = np.array([len(np.unique(np.concatenate(owners[first : first + per_node]))) for first in range(0, ranks, per_node)])
    steps = plan.per_epoch // batch
    gets, seconds = int(fetched.sum()) * shard.gets, max(steps * step_s, 1e-9)
    return StreamLoad(
        ranks=ranks,
        images=images,
        shards=len(sizes),
        steps=steps,
        skipped=images - plan.per_epoch,
        per_step=_per_step(plan, batch, ranks),
        shards_per_rank=(min(counts), float(np.mean(counts)), max(counts)),
        open_at_once=streams // ranks * recipe.data.shuffle_window_shards + 2,
        node_bytes=float(fetched.max()) * shard.bytes,
        read_twice=float(fetched.sum()) / len(sizes),
        gets_per_epoch=gets,
        gets_per_s=gets / seconds,
        first_gets=_first_shards(plan, batch, ranks, per_node) * shard.gets,
        bytes_per_s=float(fetched.sum()) * shard.bytes / seconds,
        checked=_check_coverage(plan, case.seed),
    )


def check_sharing(recipe: Recipe, ranks: int) -> None:
    """Check that so many ranks can share the streams and the global batches.

    Raises:
        UserError: they cannot; names the nearest numbers of ranks that can, and what else would help.
    """
    streams, batches = recipe.data.canonical_streams, (recipe.pretrain.global_batch, recipe.finetune.global_batch)
    if streams % ranks == 0 and not any(batch % ranks for batch in batches):
        return
    fits = [n for n in range(1, min(streams, *batches) + 1) if streams % n == 0 and not any(batch % n for batch in batches)]
    near = ", ".join(str(n) for n in sorted(sorted(fits, key=lambda n: abs(n - ranks))[:3]))
    changes = {"data.canonical_streams": ranks if streams % ranks else streams}
    changes |= {f"{name}.global_batch": -(-batch // ranks) * ranks for name, batch in zip(TRAINING_SECTIONS, batches, strict=True)}
    shown = " and ".join(str(batch) for batch in dict.fromkeys(batches))
    raise UserError(
        f"{ranks} workers cannot share data.canonical_streams = {streams} and global batches of {shown} evenly. Workers that can: {near}. "
        f"Or change the recipe: {' '.join(f'-o {key}={value}' for key, value in changes.items())}"
    )


def _shards_of_streams(plan: SamplePlan) -> list[Ids]:
    """The shards that each stream takes samples of in epoch 0."""
    shards, starts = plan.shard_line(0)
    begin = np.arange(plan.streams) * plan.segment
    first = np.searchsorted(starts, begin, side="right") - 1
    last = np.searchsorted(starts, begin + plan.segment - 1, side="right") - 1
    return [shards[a : b + 1] for a, b in zip(first, last, strict=True)]


def _per_step(plan: SamplePlan, batch: int, ranks: int) -> tuple[int, int]:
    counts = [len(step_slots(plan, 0, batch, rank, ranks).uid) for rank in (0, ranks - 1)]
    return min(counts), max(counts)


def _first_shards(plan: SamplePlan, batch: int, ranks: int, per_node: int) -> int:
    """Shards that the nodes need for step 0, together."""
    slots = step_slots(plan, 0, batch)
    shard, _ = plan.shard_of(slots.uid)
    node = np.arange(batch) % ranks // per_node
    return len(np.unique(np.stack([node, shard]), axis=1).T)


def _check_coverage(plan: SamplePlan, seed: int) -> int:
    """Compute the samples of as many whole streams as :data:`CHECKED_SAMPLES` allows, and see that no image occurs twice."""
    count = max(1, min(plan.streams, CHECKED_SAMPLES // plan.segment))
    streams = np.random.default_rng(seed).choice(plan.streams, count, replace=False)
    seen: list[Ids] = []
    for stream in streams:
        positions = np.arange(min(plan.segment, CHECKED_SAMPLES), dtype=np.int64)
        seen.append(plan.at(np.full_like(positions, stream), positions).uid)
    uids = np.concatenate(seen)
    if len(np.unique(uids)) != len(uids):
        raise AssertionError("an image comes twice in an epoch")
    return len(uids)
