"""Plan of the stage ``extract``: operations, memory, time, and the pool's requests to the storage.

An order takes N (N + 1) / 2 candidate rows, fewer where steps place several cells (``model/flops.extraction_flops``), and many times that
with score ``info_gain``, which looks ahead from each. An image has as many orders as ``extract.orders_per_image`` for each of
``extract.views``. Actors do not wait for one another, so a failure costs the shards in progress on its node and nothing else.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from oar_scale.config.schema import ParallelConfig
from oar_scale.errors import UserError
from oar_scale.model.flops import brute_force_flops, extraction_flops, look_ahead_flops
from oar_scale.model.spec import ModelSpec
from oar_scale.orders.step_sizes import step_sizes
from oar_scale.planning import activations
from oar_scale.planning.activations import BYTES
from oar_scale.planning.assumptions import Assumptions
from oar_scale.planning.case import Case
from oar_scale.planning.failures import YEAR_S
from oar_scale.planning.shape import parameters
from oar_scale.planning.traffic import PoolLoad, orders_bytes, pool_load

READERS = 16
"""Ledger entries that a driver reads at once (``shard_pool/ledger.py``)."""
STRAGGLER = 3.0
"""Straggler factor: times the median after which the pool gives a shard to a second actor (``shard_pool/pool_types.py``)."""


@dataclass(frozen=True)
class ActorPlan:
    """The pool that the stage ``extract`` is planned with."""

    count: int
    gpus_per_actor: float
    computing: int
    """GPUs that are busy; on CPUs, workers."""
    held: int
    """GPUs that are allocated, and paid for."""
    lost_per_year: float
    """How often an actor is lost: with any GPU of its node."""
    batch: int
    """``extract.batch`` of the recipe."""
    memory: int
    """Bytes that an actor takes at this batch."""
    room: float
    """Bytes that an actor may take."""
    largest_batch: int
    """The largest batch that fits; 0: not even the weights do."""

    @property
    def fits(self) -> bool:
        """Whether an actor fits at the recipe's batch."""
        return self.memory <= self.room


def plan_actors(case: Case) -> ActorPlan | None:
    """Plan the actors that the cluster has memory for, at most the recipe's where no cluster is given; None: a raster model has one order.

    Raises:
        UserError: an actor takes more GPUs than a node has.
    """
    cluster, spec = case.cluster, case.spec
    if spec.layout == "raster":
        return None
    # An actor without a GPU beside training that has some, or the other way round, is no pool for this cluster.
    each = 0.0 if cluster.on_cpu else case.recipe.extract.gpus_per_actor or 1.0
    if each > cluster.per_node:
        raise UserError(f"extract.gpus_per_actor = {each:g}: a node has {cluster.per_node}. Take fewer; an actor computes on one of them.")
    sharing = int(1 / each + 1e-9) if 0 < each <= 1 else 1
    of_node = cluster.per_node * sharing if each <= 1 else int(cluster.per_node // each)
    count = cluster.nodes * of_node
    if case.bounded:
        count = min(count, case.recipe.extract.max_actors)
    computing = -(-count // sharing)
    held = computing if each <= 1 else math.ceil(count * each)
    guided, limit = case.recipe.extract.guided, cluster.memory / sharing
    needs = partial(actor_memory, spec, case.recipe.parallel, guided=guided, assumed=case.assumed)
    return ActorPlan(
        count=count,
        gpus_per_actor=each,
        computing=computing,
        held=held,
        lost_per_year=case.failures * min(held, cluster.per_node),
        batch=case.recipe.extract.batch,
        memory=needs(case.recipe.extract.batch),
        room=limit,
        largest_batch=_largest(lambda batch: needs(batch) <= limit),
    )


@dataclass(frozen=True)
class ExtractionPlan:
    """Orders for every training image."""

    images: int
    orders: int
    flops_per_order: int
    images_per_s: float
    shards: int
    start_s: float
    """Seconds that an actor takes to start."""
    shard_s: float
    """Seconds that an actor takes for a shard."""
    seconds: float
    gpu_hours: float
    money: float
    failures: float
    """Expected number while the stage runs."""
    order_bytes: int
    load: PoolLoad
    takeover_s: float
    """Seconds that a driver restarted near the end takes to read the ledger."""
    storage_share: float
    """Share of the requests that the storage allows for one prefix."""


def plan_extraction(case: Case, actors: ActorPlan) -> ExtractionPlan | None:
    """Plan the stage ``extract``; None where the number of images is unknown."""
    spec, cluster, assumed, config = case.spec, case.cluster, case.assumed, case.recipe.extract
    if case.images is None:
        return None
    images, each = case.images.count, config.orders_per_image * config.views
    flops = order_flops(case)
    rate = actors.computing * case.decoding_rate / (flops * each)
    shards = -(-images // case.shard.samples)
    shard_s = case.shard.samples / rate * actors.count
    start_s = assumed("actors.start_on_cpu_s" if cluster.on_cpu else "actors.start_s")
    rounds = shards / actors.count
    plain = start_s + max(1.0, rounds) * shard_s + (shard_s / 2 if rounds > 1 else 0.0)
    failures = case.failures * actors.held * plain / YEAR_S
    lost = failures * min(1.0, cluster.per_node / actors.held) * (shard_s / 2 + start_s)
    hours = (plain + lost) / 3600 * actors.held
    tables = images * each * orders_bytes(spec)
    load = pool_load(shards, case.shard, tables // shards, plain + lost)
    return ExtractionPlan(
        images=images,
        orders=images * each,
        flops_per_order=flops,
        images_per_s=rate,
        shards=shards,
        start_s=start_s,
        shard_s=shard_s,
        seconds=plain + lost,
        gpu_hours=hours,
        money=hours * cluster.price,
        failures=failures,
        order_bytes=tables,
        load=load,
        takeover_s=(load.lists + load.entry_gets / READERS) * assumed("storage.s3_request_s"),
        storage_share=max(
            load.gets / (plain + lost) / assumed("storage.s3_gets_per_s"),
            (load.puts + load.deletes) / (plain + lost) / assumed("storage.s3_puts_per_s"),
        ),
    )


def actor_memory(spec: ModelSpec, parallel: ParallelConfig, batch: int, *, guided: bool, assumed: Assumptions) -> int:
    """Bytes of an actor: weights, KV cache, and a pass over the candidates of all cells."""
    gpu = parallel.gpus_per_worker > 0
    cache, working = activations.decoding(spec, batch * (1 + guided), parallel.precision, gpu=gpu)
    held = parameters(spec).total * BYTES[parallel.precision] + cache + working
    return int(held * (1 + assumed("memory.fragmentation")) + assumed("memory.framework_gb") * 1e9) if gpu else held


def order_flops(case: Case) -> int:
    """Operations to find one order with the recipe's settings."""
    config = case.recipe.extract
    flops = plain_order_flops(case, guided=config.guided)
    if config.score == "info_gain":
        sizes = step_sizes(config, case.spec.cells)
        flops += look_ahead_flops(case.spec, sizes, config.info_gain_samples, config.info_gain_candidates)
    return flops


def plain_order_flops(case: Case, *, guided: bool = False) -> int:
    """Operations to find one order by a score that does not look ahead, else with the recipe's settings."""
    sizes, first_given = _steps(case)
    return extraction_flops(case.spec, guided=guided, sizes=sizes, first_given=first_given)


def checked_order_flops(case: Case) -> int:
    """Operations to find one order with the recipe's settings and once more by brute force (``eval_tasks.BruteForceTask``)."""
    config, (sizes, first_given) = case.recipe.extract, _steps(case)
    # What is compared does not look ahead: the score is another one then.
    again = plain_order_flops(case, guided=config.guided) if config.score == "info_gain" else 0
    return order_flops(case) + again + brute_force_flops(case.spec, guided=config.guided, sizes=sizes, first_given=first_given)


def _steps(case: Case) -> tuple[list[int], bool]:
    """How many cells each step of an extraction places, and whether the first one is given."""
    return step_sizes(case.recipe.extract, case.spec.cells), case.recipe.extract.first_cell != "free"


def _largest(fits: Callable[[int], bool]) -> int:
    high = 1
    while fits(high):
        high *= 2
    return bisect.bisect_left(range(high), True, lo=high // 2 + 1, key=lambda batch: not fits(batch)) - 1 if high > 1 else 0


@dataclass(frozen=True)
class Makespan:
    """Outcome of a simulated run of the pool."""

    seconds: float
    ideal_s: float
    """Seconds if all actors were busy to the same moment, none slow, none lost."""
    lost_actors: int
    given_twice: int
    """Stragglers: shards that a second actor was given because the first one took so long."""
    idle_share: float
    """Share of all actors' time in which they wait for the last shards."""


def makespan(
    shards: int, shard_s: float, actors: int, lost_per_year: float, start_s: float, assumed: Assumptions, *, seed: int
) -> Makespan:
    """Simulate a pool of actors that take shards until none is left: some are slow, some die and restart, stragglers are given out twice.

    Args:
        lost_per_year: how often an actor dies.
        start_s: seconds that an actor takes to start.
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
        if fate[waiting] < -math.expm1(-hazard * seconds):  # it dies before the shard is done: the shard goes back, another actor starts
            lost, waiting = lost + 1, waiting + 1
            fate[waiting - 1], at = 1.0, seconds * float(draw.random())
            heapq.heappush(free, (now + at + start_s, actor))
            continue
        ends.append((now + seconds, now))
        heapq.heappush(free, (now + seconds, actor))
    idle = sorted(now for now, _ in free)
    end = 0.0
    # Only the last shards can end the run late; each ends when its own actor or a second one, once one is idle, has finished it.
    for finished, begun in sorted(ends, reverse=True)[: 2 * actors]:
        second = max(begun + STRAGGLER * shard_s, idle[0]) + shard_s
        again += second < finished
        end = max(end, min(finished, second))
    ideal = start_s + shards * shard_s / actors
    return Makespan(end, ideal, lost, again, 1 - sum(min(now, end) for now in idle) / (end * actors))
