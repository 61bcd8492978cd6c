"""An elastic run on a Ray cluster on which others hold a part of the resources."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from small_run import pretraining, small_recipe
from waiting import wait_until

from oar_scale.config.schema import ParallelConfig
from oar_scale.distributed.elastic import capacity_of, cluster_nodes, free_resources
from oar_scale.distributed.ray_train import TrainingDriver
from oar_scale.observe.console import Console
from oar_scale.run.context import Run

pytestmark = pytest.mark.usefixtures("shared_ray")


class Holder:
    """Somebody else's actor."""

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def test_only_what_others_leave_free_counts(tmp_path: Path) -> None:
    parallel = {"workers": {"min": 1, "max": 2}, "micro_batch": 1}
    driver = TrainingDriver(pretraining(Run(small_recipe(str(tmp_path), parallel=parallel))), Console())
    wait_until(lambda: driver._choose_workers() == 2)
    holder = ray.remote(Holder).options(num_cpus=1).remote()
    node = ray.get(holder.node.remote())
    wait_until(lambda: driver._choose_workers() == 1)
    free = free_resources(cluster_nodes(ping=False), ParallelConfig(), own={node: 1})
    assert capacity_of(free, ParallelConfig()) == 2, "what a worker of the run holds is there for the run"
    ray.kill(holder)
    wait_until(lambda: driver._choose_workers() == 2)
