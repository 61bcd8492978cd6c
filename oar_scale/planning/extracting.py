"""Orders for all images, and the evaluation: operations, memory, time, and what the pool asks of the storage.

An order takes N (N + 1) / 2 candidate rows (``model/flops.extraction_flops``). Cheaper ways (docs/orders.md) are planned as if they were
exact: an upper bound. Actors do not wait for one another, so a failure costs what is lost with its node and nothing else.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.model.flops import extraction_flops, forward_flops
from oar_scale.model.spec import ModelSpec
from oar_scale.planning import activations
from oar_scale.planning.activations import BYTES
from oar_scale.planning.assumptions import Assumptions
from oar_scale.planning.case import Case
from oar_scale.planning.cluster import Cluster
from oar_scale.planning.failures import YEAR_S
from oar_scale.planning.shape import parameters
from oar_scale.planning.traffic import PoolLoad, orders_bytes, pool_load

MODELS = 3
"""Any-order, control, ordered: those that the evaluation draws with; one less without a control."""
NLL_PASSES = 4
"""Orders, and captions of other images, under which the likelihood of an image is taken."""
BRUTE_FORCE_IMAGES = 2
"""Whose orders the evaluation also finds by a fresh forward pass for every candidate (``stages/evaluate.py``)."""
READERS = 16
"""Ledger entries that a driver reads at once (``data/pool/ledger.py``)."""
LATE = 3.0
"""Times the median after which the pool gives a shard to a second actor (``data/pool/terms.py``)."""


@dataclass(frozen=True)
class Extraction:
    """Orders for every training image."""

    images: int
    orders: int
    exact: bool
    """False: the recipe takes a cheaper way, and this is an upper bound."""
    flops_per_order: int
    images_per_s: float
    shards: int
    actors: int
    start_s: float
    """That an actor takes to start."""
    shard_s: float
    """That an actor takes for a shard."""
    seconds: float
    gpu_hours: float
    money: float
    failures: float
    """Expected while it runs."""
    memory: int
    """Of an actor."""
    largest_batch: int
    """That fits; 0: not even the weights do."""
    order_bytes: int
    load: PoolLoad
    takeover_s: float
    """That a driver which starts near the end spends on reading the ledger."""
    storage_share: float
    """Of the requests that one prefix allows."""


def extraction(case: Case) -> Extraction | None:
    """Plan the stage ``extract`` on all of the cluster; None where nobody knows how many images there are, or a model has one order."""
    recipe, spec, found, assumed = case.recipe, case.spec, case.cluster, case.assumed
    if case.images is None or spec.layout == "raster":
        return None
    config, images, guided = recipe.extract, case.images.count, recipe.extract.guidance != 1
    flops = extraction_flops(spec, guided=guided)
    orders = images * config.orders_per_image
    rate = found.gpus * found.flops * (1.0 if found.on_cpu else assumed("time.extraction_mfu")) / flops / config.orders_per_image
    shards, actors = -(-images // case.shard.samples), _actors(recipe, found)
    shard_s = case.shard.samples / rate * actors
    start_s = assumed("actors.start_on_cpu_s" if found.on_cpu else "actors.start_s")
    rounds = shards / actors
    plain = start_s + max(1.0, rounds) * shard_s + (shard_s / 2 if rounds > 1 else 0.0)
    failures = case.failures * found.gpus * plain / YEAR_S
    lost = failures * found.per_node / found.gpus * (shard_s / 2 + start_s)
    load = pool_load(shards, case.shard, plain + lost)
    return Extraction(
        images=images,
        orders=orders,
        exact=config.commit_per_step == 1
        and config.cosine_steps is None
        and config.frontier_random is None
        and config.rescore_radius is None,
        flops_per_order=flops,
        images_per_s=rate,
        shards=shards,
        actors=actors,
        start_s=start_s,
        shard_s=shard_s,
        seconds=plain + lost,
        gpu_hours=(plain + lost) / 3600 * found.gpus,
        money=(plain + lost) / 3600 * found.gpus * found.price,
        failures=failures,
        memory=actor_memory(spec, recipe.parallel, config.batch, guided, assumed),
        largest_batch=_largest_batch(spec, recipe.parallel, guided, found.memory * min(1.0, found.gpus / actors), assumed),
        order_bytes=orders * orders_bytes(spec),
        load=load,
        takeover_s=(load.lists + load.entry_gets / READERS) * assumed("storage.s3_request_s"),
        storage_share=max(
            load.gets / (plain + lost) / assumed("storage.s3_gets_per_s"),
            (load.puts + load.deletes) / (plain + lost) / assumed("storage.s3_puts_per_s"),
        ),
    )


def actor_memory(spec: ModelSpec, parallel: ParallelConfig, batch: int, guided: bool, assumed: Assumptions) -> int:
    """Weights, KV cache, a pass over all candidates."""
    gpu = parallel.gpus_per_worker > 0
    cache, working = activations.decoding(spec, batch * (1 + guided), parallel.precision, gpu=gpu)
    held = parameters(spec).total * BYTES[parallel.precision] + cache + working
    return int(held * (1 + assumed("memory.fragmentation")) + assumed("memory.framework_gb") * 1e9) if gpu else held


def _largest_batch(spec: ModelSpec, parallel: ParallelConfig, guided: bool, room: float, assumed: Assumptions) -> int:
    low, high = 0, 1
    while high <= 4096 and actor_memory(spec, parallel, high, guided, assumed) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if actor_memory(spec, parallel, middle, guided, assumed) <= room else (low, middle)
    return low


def _actors(recipe: Recipe, found: Cluster) -> int:
    if found.on_cpu or not recipe.extract.gpus_per_actor:
        return found.gpus
    return max(1, int(found.gpus / recipe.extract.gpus_per_actor))


@dataclass(frozen=True)
class Evaluation:
    """The stage ``evaluate``: on the GPUs of one node, or on the CPU cores of workers that have none."""

    flops: float
    processes: int
    on: str
    seconds: float


def evaluation(case: Case) -> Evaluation | None:
    """Drawn images, likelihoods under several orders, and two images by brute force."""
    recipe, spec = case.recipe, case.spec
    if spec.layout == "raster":
        return None
    drawn, scored = max(recipe.evaluate.feature_images, recipe.sample.images), recipe.evaluate.nll_images
    if case.images is not None:
        share = recipe.data.heldout_fraction
        heldout = round(case.images.count * share / (1 - share))
        drawn, scored = min(drawn, heldout), min(scored, heldout)
    models = MODELS - (not recipe.pipeline.control)
    find = extraction_flops(spec, guided=recipe.extract.guidance != 1)
    flops = float(models * drawn * extraction_flops(spec, guided=recipe.sample.guidance != 1))
    flops += (models + 1) * scored * NLL_PASSES * forward_flops(spec) + models * scored * find
    # By brute force N (N + 1) / 2 passes over prefixes that are a third as long on average.
    flops += BRUTE_FORCE_IMAGES * (find + forward_flops(spec) * spec.cells * (spec.cells + 1) / 6)
    if not case.cluster.on_cpu:
        gpus = min(case.cluster.per_node, case.workers * case.gpus_per_worker)
        return Evaluation(flops, gpus, "GPUs", flops / (gpus * case.cluster.flops * case.assumed("time.extraction_mfu")))
    rate = case.assumed(f"gpus.cpu.{recipe.parallel.precision}_tflops") * 1e12 * recipe.parallel.cpu_threads
    return Evaluation(flops, recipe.parallel.max_workers, "CPUs", flops / (recipe.parallel.max_workers * rate))


@dataclass(frozen=True)
class Makespan:
    """A pool's run as it was simulated."""

    seconds: float
    ideal_s: float
    """All actors busy to the same moment, none slow, none lost."""
    lost_actors: int
    given_twice: int
    """Shards that a second actor was given, because the first took so long."""
    idle_share: float
    """Of all actors' time, at the end."""


def makespan(
    shards: int, shard_s: float, actors: int, lost_per_year: float, start_s: float, assumed: Assumptions, *, seed: int
) -> Makespan:
    """Let so many actors take shards until none is left: some are slow, some die and come back, late shards are given out twice.

    Args:
        lost_per_year: how often an actor dies.
        start_s: that an actor takes to start.
    """
    import numpy as np

    draw = np.random.default_rng(seed)
    slow = draw.random(actors) < assumed("actors.slow_share")
    pace = np.where(slow, assumed("actors.slow_factor"), 1.0) * shard_s
    takes = np.maximum(0.1, draw.normal(1.0, assumed("actors.spread"), shards))
    fate, hazard = draw.random(shards), lost_per_year / YEAR_S
    free = [(start_s, actor) for actor in range(actors)]
    heapq.heapify(free)
    ends, lost, again, waiting = list[tuple[float, float]](), 0, 0, shards
    while waiting:
        now, actor = heapq.heappop(free)
        waiting -= 1
        seconds = float(pace[actor] * takes[waiting])
        if fate[waiting] < -math.expm1(-hazard * seconds):  # it dies on the way: the shard goes back, another actor comes
            lost, waiting = lost + 1, waiting + 1
            fate[waiting - 1], at = 1.0, seconds * float(draw.random())
            heapq.heappush(free, (now + at + start_s, actor))
            continue
        ends.append((now + seconds, now))
        heapq.heappush(free, (now + seconds, actor))
    idle = sorted(now for now, _ in free)
    end = 0.0
    for finished, begun in sorted(ends, reverse=True)[: 2 * actors]:
        second = max(begun + LATE * shard_s, idle[0]) + shard_s
        again += second < finished
        end = max(end, min(finished, second))
    ideal = start_s + shards * shard_s / actors
    return Makespan(end, ideal, lost, again, 1 - sum(min(now, end) for now in idle) / (end * actors))
