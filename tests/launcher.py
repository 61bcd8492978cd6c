"""Runs a function in a few processes that know their rank, as Ray Train and torchrun do: the tests' own launcher.

The processes are forked from one that has imported torch and DeepSpeed already, which is seconds of CPU for each of them.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from cluster.dev import processes

PORTS = range(18000, 20000)
"""No client's, who would take one between the look and the time when the first worker listens: with a slow start those are seconds."""
PRELOADED = ["torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "oar_scale.distributed.worker"]
"""What workers import, some of it where one would not look for it."""


def start_workers(function: Callable[..., None], world: int, *args: Any) -> list[BaseProcess]:
    """Start ``function(*args)`` in ``world`` processes with the environment that torch.distributed reads."""
    # The fork server's own environment is that of its start: what a test has set since travels with the call.
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port()), "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, **group}
    workers = [_server().Process(target=_run, args=(environment, rank, function, args)) for rank in range(world)]
    for worker in workers:
        worker.start()
    return workers


def run_workers(function: Callable[..., None], world: int, *args: Any, timeout_s: float = 600) -> None:
    """Run to the end; fails if a worker does."""
    workers = start_workers(function, world, *args)
    for worker in workers:
        worker.join(timeout_s)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0] * world, f"exit codes {codes}"


@cache
def _port() -> int:
    """Of all groups of this process, one after the other."""
    return processes.free_port(PORTS, lambda port: [port])


@cache
def _server() -> ForkServerContext:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks once, when it is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _run(environment: dict[str, str], rank: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as the training worker does, or a C++ compiler works for a minute
    function(*args)
