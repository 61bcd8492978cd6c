"""How many workers to start: the most that the recipe's arithmetic allows and the cluster has capacity for, beside what else runs on it.

    parallel.workers: {min: 2, max: 8}, streams 48, global batch 96, micro-batch 4      8, 6, 4, 3, 2

A step's samples do not depend on the number, so a run continues with fewer workers when a node is lost, and grows when it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from oar_scale.config.schema import ParallelConfig, Recipe

Resources = dict[str, float]
"""Of a node, by Ray's names for them: CPU, GPU, accelerator_type:H100."""
ANSWER_S = 15.0
"""A node that starts no task within this time counts as lost: Ray itself notices its death only later."""


def choose_workers(recipe: Recipe, capacity: int) -> int:
    """Return the largest usable number of workers within ``capacity``; the smallest one where none fits, to wait for nodes."""
    counts = recipe.worker_counts()
    return next((count for count in counts if count <= capacity), counts[-1])


def cluster_nodes(*, ping: bool) -> dict[str, Resources]:
    """Return the nodes that are alive, by their id, with all the resources that each has.

    Args:
        ping: only those that answer a task; takes up to ``ANSWER_S``.
    """
    import ray

    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    answering = _answering(list(nodes)) if ping else nodes
    return {node: resources for node, resources in nodes.items() if node in answering}


def free_resources(nodes: Mapping[str, Resources], parallel: ParallelConfig, own: Mapping[str, int]) -> list[Resources]:
    """Return what each node has free for this run.

    Args:
        nodes: as :func:`cluster_nodes` returns them.
        parallel: what each worker takes.
        own: how many workers of this run are on each node; what they hold counts as free.
    """
    from ray._private.state import available_resources_per_node  # by node there is no public function

    free: dict[str, Resources] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return [add_workers(free.get(node, {}), parallel, own.get(node, 0)) for node in nodes]


def add_workers(free: Resources, parallel: ParallelConfig, workers: int) -> Resources:
    """Return the resources that are free when so many workers have released theirs."""
    released = {"CPU": float(workers), "GPU": float(workers * parallel.gpus_per_worker)}
    return {**free, **{name: free.get(name, 0.0) + amount for name, amount in released.items()}}


def capacity_of(nodes: Iterable[Resources], parallel: ParallelConfig) -> int:
    """Return how many workers nodes of these resources hold, placed as the recipe asks."""
    on_node = [_workers_on(resources, parallel) for resources in nodes]
    if parallel.placement == "STRICT_PACK":
        return max(on_node, default=0)
    return sum(min(1, each) for each in on_node) if parallel.placement == "STRICT_SPREAD" else sum(on_node)


def _workers_on(resources: Resources, parallel: ParallelConfig) -> int:
    """Workers that a node holds: each takes a core, and its GPUs."""
    if parallel.gpu_type and f"accelerator_type:{parallel.gpu_type}" not in resources:
        return 0
    by_core, gpus = int(resources.get("CPU", 0)), parallel.gpus_per_worker
    return min(by_core, int(resources.get("GPU", 0)) // gpus) if gpus else by_core


def _answering(nodes: Sequence[str]) -> set[str]:
    """The nodes that run a task within ``ANSWER_S``."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ping = ray.remote(_ping)
    options = {"num_cpus": 0, "max_retries": 0}
    pinged = {
        ping.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), **options).remote(): node for node in nodes
    }
    ready, silent = ray.wait(list(pinged), num_returns=len(pinged), timeout=ANSWER_S)
    for reference in silent:
        ray.cancel(reference)
    answering = set()
    for reference in ready:
        try:
            ray.get(reference)
        except ray.exceptions.RayError:  # the node died during the call
            continue
        answering.add(pinged[reference])
    return answering


def _ping() -> None:
    """Return nothing; that it was run shows that the node is alive."""
