"""Work that wants GPUs, where this machine has none: it runs on a node of the Ray cluster that has.

The driver of a run often is on a head node without a GPU. There ``on_gpu_node(run, work)`` sends ``work`` away, shows what it says, and
returns its result; on a machine with a GPU, or for a recipe without, it calls it right here.
"""

from __future__ import annotations

import io
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.errors import UserError
from oar_scale.observe.console import Console
from oar_scale.run.context import Run
from oar_scale.runtime.ray_session import ray_session

if TYPE_CHECKING:
    from ray.util.queue import Queue

T = TypeVar("T")
_LOOK_S = 1.0
_ON_CPU = "  no GPU here, and none in a Ray cluster (RAY_ADDRESS): working on the CPU"


def on_gpu_node(run: Run, work: Callable[[Run], T], *, gpus: int, or_cpu: bool = False) -> T:
    """The result of ``work(run)``, called on a machine that has a GPU if the recipe wants some.

    Args:
        work: a function of a module; what it returns travels through Ray, and what it leaves in the run's local folder stays where it ran.
        gpus: how many the work can use; 0: the recipe wants none.
        or_cpu: where there is no GPU, neither here nor in a cluster, work on the CPU, which is said, instead of refusing.

    Raises:
        UserError: there is no GPU here and no cluster; or whatever ``work`` raises.
    """
    with _gpus_elsewhere(run, gpus, or_cpu) as asked:
        return run_on_node(run, work, asked, run.recipe.parallel.gpu_type) if asked else work(run)


def each_from_gpu_node(run: Run, work: Callable[[Run], Iterator[T]], *, gpus: int, or_cpu: bool = False) -> Iterator[T]:
    """What ``work(run)`` yields, each as soon as it is there. Arguments and errors as those of :func:`on_gpu_node`."""
    with _gpus_elsewhere(run, gpus, or_cpu) as asked:
        yield from each_on_node(run, work, asked, run.recipe.parallel.gpu_type) if asked else work(run)


@contextmanager
def _gpus_elsewhere(run: Run, gpus: int, or_cpu: bool) -> Iterator[int]:
    """How many GPUs to ask a node of the cluster for, with Ray initialised; 0: the work is done here. Errors as :func:`on_gpu_node`."""
    if not gpus or torch.cuda.device_count():
        yield 0
        return
    if "RAY_ADDRESS" not in os.environ:
        if not or_cpu:
            raise UserError(
                "the recipe works on GPUs (parallel.gpus_per_worker, extract.gpus_per_actor), and this machine has none that torch can "
                "use.\nName a cluster's Ray in RAY_ADDRESS to do it on a node there, use a machine with a GPU, or set the field to 0 for "
                "the CPU."
            )
        run.console.say(_ON_CPU)
        yield 0
        return
    with ray_session(cpus=1):
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        if or_cpu and not any(node.get("GPU") for node in nodes):
            run.console.say(_ON_CPU)
            yield 0
        else:
            yield gpus_of_a_node(nodes, gpus, run.recipe.parallel.gpu_type)


def device_here(wanted: bool) -> torch.device:
    """A GPU if one is wanted and there is one, else the CPU."""
    return torch.device("cuda" if wanted and torch.cuda.device_count() else "cpu")


def chosen_device(name: str | None) -> torch.device:
    """The device of this name; where there is none, a GPU if this machine has one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name is None:
        return device_here(True)
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"--device {name}: there are cpu, cuda and cuda:NUMBER")
    gpus = torch.cuda.device_count()
    if name != "cpu" and int(match[1] or 0) >= gpus:
        raise UserError(f"--device {name}: torch finds {gpus} GPUs on {socket.gethostname()}. Leave --device out, or take --device cpu.")
    return torch.device(name)


def threads_here(wanted: int) -> int:
    """So many threads, but no more than this process has cores: the workers that a recipe counts on may be on many machines."""
    return max(1, min(wanted, len(os.sched_getaffinity(0))))


def devices_here(parallel: ParallelConfig) -> list[str]:
    """A process for each GPU of this machine where the recipe trains on GPUs, else for each worker that has cores here.

    Raises:
        UserError: the recipe trains on GPUs, and torch finds none here.
    """
    gpus = min(torch.cuda.device_count(), parallel.max_workers * parallel.gpus_per_worker)
    if parallel.gpus_per_worker and not gpus:
        raise UserError(
            f"{socket.gethostname()}: torch finds no GPU here, and the recipe has parallel.gpus_per_worker {parallel.gpus_per_worker}. "
            "Install a torch with CUDA, or set it to 0 to work on the CPU."
        )
    if gpus:
        return [f"cuda:{index}" for index in range(gpus)]
    return ["cpu"] * max(1, min(parallel.max_workers, len(os.sched_getaffinity(0)) // parallel.cpu_threads))


def gpus_of_a_node(nodes: Sequence[dict[str, float]], usable: int, gpu_type: str | None) -> int:
    """How many GPUs to ask for, all of one node: as many as a node of the cluster has, but no more than are ``usable``.

    Where no node has any, one: the cluster may start a node when it is asked.
    """
    fitting = [node for node in nodes if not gpu_type or f"accelerator_type:{gpu_type}" in node]
    return min(max((int(node.get("GPU", 0)) for node in fitting), default=0), usable) or 1


def run_on_node(run: Run, work: Callable[[Run], T], gpus: int, gpu_type: str | None) -> T:
    """Call ``work`` in a Ray task that has so many GPUs of one node. Ray is initialised; errors as :func:`on_gpu_node`."""
    [result] = each_on_node(run, partial(_once, work), gpus, gpu_type)
    return result


def each_on_node(run: Run, work: Callable[[Run], Iterator[T]], gpus: int, gpu_type: str | None) -> Iterator[T]:
    """What ``work`` yields in a Ray task that has so many GPUs of one node. Ray is initialised; errors as :func:`on_gpu_node`."""
    import ray
    from ray.exceptions import RayTaskError
    from ray.util.queue import Queue

    lines = Queue(actor_options={"num_cpus": 0})
    options: dict[str, object] = {"num_cpus": 1, "num_gpus": gpus, "accelerator_type": gpu_type, "num_returns": "streaming"}
    # Ray's types know nothing of "streaming".
    results = cast("ray.ObjectRefGenerator", ray.remote(_work_there).options(**options).remote(_absolute_recipe(run), work, lines))
    run.console.say(f"  no GPU here: waiting for a node of the cluster with {gpus} free")
    try:
        while True:
            ready, _ = ray.wait([results], timeout=_LOOK_S)
            for line in lines.get_nowait_batch(lines.qsize()):
                run.console.say(line)
            if ready:
                try:
                    result = cast(T, ray.get(next(results)))
                except StopIteration:
                    return
                yield result
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        ray.cancel(results, force=True)  # of no effect on what is done; else the task would go on without its driver
        lines.shutdown(force=True)


def _once(work: Callable[[Run], T], run: Run) -> Iterator[T]:
    yield work(run)


def _work_there(recipe: Recipe, work: Callable[[Run], Iterator[object]], lines: Queue) -> Iterator[object]:
    """Runs in the task."""
    console = Console(_Relay(lines))
    console.say(f"  on {socket.gethostname()}")
    yield from work(Run(recipe, console))


def _absolute_recipe(run: Run) -> Recipe:
    """The recipe as another process knows it, whose working folder is another."""
    recipe = run.recipe
    storage = recipe.storage.model_copy(update={"root": run.at() if recipe.storage.root else None})
    return recipe.model_copy(update={"run_dir": run.local(), "storage": storage})


class _Relay(io.StringIO):
    """A stream whose lines go to the driver."""

    def __init__(self, lines: Queue) -> None:
        super().__init__()
        self._lines, self._begun = lines, ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self._lines.put(line)
        return len(text)
