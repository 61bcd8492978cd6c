"""The machines of a plan, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.planning.assumptions import Assumptions

NODE = 8
"""GPUs of the nodes whose network adapters the assumptions describe."""
CPU = "cpu"
USUAL = "h200"
"""The GPU that is planned for where the command line names none."""


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
        """GPUs of all nodes; on CPUs, workers."""
        return self.nodes * self.per_node

    @property
    def on_cpu(self) -> bool:
        """Whether training runs on CPUs."""
        return self.gpu == CPU

    def link(self, workers: int) -> float:
        """Bytes a second of a collective over so many neighbouring workers."""
        return self.bus if workers <= self.per_node else min(self.bus, self.network)

    def part(self, nodes: int, per_node: int) -> Cluster:
        """A smaller cluster of the same nodes, or of parts of nodes; a part has its share of the node's network."""
        return replace(self, nodes=nodes, per_node=per_node, network=self.network * per_node / self.per_node)


def gpu_of(recipe: Recipe, given: str | None) -> str:
    """The key of a GPU: as given, else ``cpu`` for a recipe that trains on CPUs, else :data:`USUAL`."""
    return (given or (CPU if recipe.parallel.gpus_per_worker == 0 else USUAL)).lower()


def cluster(recipe: Recipe, assumed: Assumptions, gpu: str, nodes: int | None, per_node: int | None) -> Cluster:
    """The cluster as given; as many nodes as the recipe's workers fill, where that is not.

    Raises:
        UserError: an unknown GPU, or GPUs for a recipe that trains on CPUs.
    """
    parallel, label = recipe.parallel, assumed.gpu_label(gpu)
    on_cpu = parallel.gpus_per_worker == 0
    if on_cpu != (gpu == CPU):
        here, other = ("CPUs", 1) if on_cpu else ("GPUs", 0)
        raise UserError(f"--gpu {gpu}: {recipe.name} trains on {here}; leave --gpu out, or add -o parallel.gpus_per_worker={other}")
    workers = parallel.max_workers
    per_node = per_node or (-(-workers // (nodes or 1)) if on_cpu else min(workers, NODE))
    nodes = nodes or -(-workers // per_node)
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
