"""What is being planned: one recipe on one cluster, under one set of assumptions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.model.spec import ModelSpec
from oar_scale.planning.assumptions import Assumptions
from oar_scale.planning.cluster import Cluster
from oar_scale.planning.shape import Images, ParameterCounts, parameters
from oar_scale.planning.traffic import ShardTraffic


@dataclass(frozen=True)
class Case:
    """One recipe on one cluster, under one set of assumptions; all parts of a plan are computed from it."""

    recipe: Recipe
    spec: ModelSpec
    cluster: Cluster
    bounded: bool
    """No cluster was given: there are no more workers and actors than the recipe has."""
    images: Images | None
    """None: their number is unknown."""
    shard: ShardTraffic
    assumed: Assumptions
    mfu: float
    """Share of the peak while computing; 1 on CPUs, whose rate is measured."""
    failures: float
    """Per GPU and year."""
    seed: int

    @cached_property
    def parameters(self) -> ParameterCounts:
        """The model's parameters, by part."""
        return parameters(self.spec)

    @property
    def workers(self) -> int:
        """Training workers that the cluster can run, at most the recipe's where no cluster is given."""
        return min(self.cluster.gpus, self.recipe.parallel.max_workers) if self.bounded else self.cluster.gpus

    @property
    def worker_flops(self) -> float:
        """Useful operations a second of a worker."""
        return self.cluster.flops * self.mfu

    @property
    def decoding_rate(self) -> float:
        """Operations a second of a GPU (on CPUs, of a worker) that extracts orders or draws images."""
        return self.cluster.flops * (1.0 if self.cluster.on_cpu else self.assumed("time.extraction_mfu"))

    @property
    def float32_rate(self) -> float:
        """The same of what is computed in float32 whatever the recipe's precision is: image tokenizers, likelihoods."""
        peak = self.assumed(f"gpus.{self.cluster.gpu}.fp32_tflops") * 1e12
        return peak * (self.recipe.parallel.cpu_threads if self.cluster.on_cpu else self.assumed("time.float32_mfu"))

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a GPU (on CPUs, a worker) reads of its memory while it draws."""
        most = self.assumed(f"gpus.{self.cluster.gpu}.memory_gb_s") * 1e9
        return most * (1.0 if self.cluster.on_cpu else self.assumed("time.bandwidth_share"))

    @property
    def average(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self.recipe.pretrain.ema_decay is not None or self.recipe.finetune.ema_decay is not None

    def accumulation(self, parallel: ParallelConfig) -> int:
        """Micro-batches of a step, in the stage that takes most."""
        return max(self.recipe.pretrain.global_batch, self.recipe.finetune.global_batch) // (parallel.micro_batch * self.workers)

    def on(self, cluster: Cluster) -> Case:
        """The same case on another cluster."""
        return replace(self, cluster=cluster)
