"""The machines of a plan, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.errors import UserError
from oar_scale.planning.assumptions import Assumptions

NODE = 8
"""GPUs of the nodes whose network adapters the assumptions describe."""
CPU = "cpu"


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind. Bytes and operations, not GB and TFLOP."""

    gpu: str
    label: str
    nodes: int
    per_node: int
    """GPUs of a node; on CPUs, workers."""
    memory: float
    """Of a GPU."""
    flops: float
    """Operations a second of a GPU at most; on CPUs, what a worker does."""
    bus: float
    """Bytes a second of a collective inside a node, as NCCL counts bus bandwidth."""
    network: float
    """The same between nodes: what a node can send."""
    price: float
    """Of a GPU, or of a worker on CPUs, for an hour."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.per_node

    @property
    def on_cpu(self) -> bool:
        return self.gpu == CPU

    def link(self, workers: int) -> float:
        """Bytes a second of a collective over so many neighbouring workers."""
        return self.bus if workers <= self.per_node else min(self.bus, self.network)

    def smaller(self, nodes: int, per_node: int) -> Cluster:
        """Fewer of the same."""
        return Cluster(**{**self.__dict__, "nodes": nodes, "per_node": per_node, "network": self.network * per_node / self.per_node})


def cluster(recipe: Recipe, assumed: Assumptions, gpu: str | None, nodes: int | None, per_node: int | None) -> Cluster:
    """The cluster as given; as many nodes as the recipe's workers fill, where that is not.

    Raises:
        UserError: an unknown GPU, or GPUs for a recipe that trains on CPUs.
    """
    parallel = recipe.parallel
    on_cpu = parallel.gpus_per_worker == 0
    gpu = (gpu or (CPU if on_cpu else "h200")).lower()
    label = assumed.gpu_label(gpu)
    if on_cpu != (gpu == CPU):
        wanted = (
            "trains on CPUs: add -o parallel.gpus_per_worker=1"
            if on_cpu
            else "trains on GPUs: name one, or add -o parallel.gpus_per_worker=0"
        )
        raise UserError(f"--gpu {gpu}: the recipe {recipe.name} {wanted}")
    slots = parallel.max_workers * max(1, parallel.gpus_per_worker)
    per_node = per_node or (min(slots, NODE) if not on_cpu else -(-slots // (nodes or 1)))
    nodes = nodes or -(-slots // per_node)
    tflops = assumed(f"gpus.{gpu}.{parallel.precision}_tflops") * (parallel.cpu_threads if on_cpu else 1)
    wire = assumed(f"gpus.{gpu}.network_gb_s") * (1 if on_cpu else min(1.0, per_node / NODE))
    return Cluster(
        gpu=gpu,
        label=label,
        nodes=nodes,
        per_node=per_node,
        memory=assumed(f"gpus.{gpu}.memory_gb") * 1e9,
        flops=tflops * 1e12,
        bus=assumed(f"gpus.{gpu}.node_bus_gb_s") * 1e9,
        network=wire * assumed("time.network_efficiency") * 1e9,
        price=assumed(f"gpus.{gpu}.price_per_hour"),
    )


def workers_of(found: Cluster, parallel: ParallelConfig) -> int:
    """Training workers that the cluster has room for."""
    return found.gpus // max(1, parallel.gpus_per_worker)
