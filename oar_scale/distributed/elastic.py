"""How many workers now? The most that the recipe's arithmetic allows and the cluster has room for.

    parallel.workers: {min: 2, max: 8}, streams 48, global batch 96, micro-batch 4      8, 6, 4, 3, 2

A step's samples depend on neither, so a run goes on with fewer workers when a node is lost, and grows back when it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oar_scale.config.schema import ParallelConfig, Recipe

ANSWER_S = 15.0
"""A node that starts no task within so long is taken for lost: Ray itself notices its death only later."""


def choose_workers(recipe: Recipe, room: int) -> int:
    """The largest usable number of workers for which there is room; the smallest where there is none, to wait for it."""
    counts = recipe.worker_counts()
    return next((count for count in counts if count <= room), counts[-1])


def room_for_workers(parallel: ParallelConfig, *, asking: bool) -> int:
    """Workers that the cluster's nodes could hold if nothing else ran on them.

    Args:
        asking: count only nodes that answer when they are asked; takes up to ``ANSWER_S``.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    answering = _answering([node["NodeID"] for node in nodes]) if asking else {node["NodeID"] for node in nodes}
    return room_in([node["Resources"] for node in nodes if node["NodeID"] in answering], parallel)


def room_in(nodes: Sequence[dict[str, float]], parallel: ParallelConfig) -> int:
    """Workers that nodes of these resources hold, placed as the recipe asks."""
    places = [_places(resources, parallel) for resources in nodes]
    if parallel.placement == "STRICT_PACK":
        return max(places, default=0)
    return sum(min(1, each) for each in places) if parallel.placement == "STRICT_SPREAD" else sum(places)


def _places(resources: dict[str, float], parallel: ParallelConfig) -> int:
    """Workers that a node holds: a core each, and their GPUs."""
    if parallel.gpu_type and f"accelerator_type:{parallel.gpu_type}" not in resources:
        return 0
    by_core, gpus = int(resources.get("CPU", 0)), parallel.gpus_per_worker
    return min(by_core, int(resources.get("GPU", 0)) // gpus) if gpus else by_core


def _answering(nodes: Sequence[str]) -> set[str]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ping: Any = ray.remote(_here)
    options = {"num_cpus": 0, "max_retries": 0}
    asked = {ping.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), **options).remote(): node for node in nodes}
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    for reference in late:
        ray.cancel(reference)
    found = set()
    for reference in ready:
        try:
            ray.get(reference)
        except ray.exceptions.RayError:  # it died under the question
            continue
        found.add(asked[reference])
    return found


def _here() -> None:
    """Nothing to do: that it ran is the answer."""
