"""Runs a function in a few processes that know their rank, as Ray Train and torchrun do: the tests' own launcher."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any


def start_workers(function: Callable[..., None], world: int, *args: Any) -> list[BaseProcess]:
    """Start ``function(*args)`` in ``world`` processes with the environment that torch.distributed reads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_run, args=(function, rank, world, port, args)) for rank in range(world)]
    for worker in workers:
        worker.start()
    return workers


def run_workers(function: Callable[..., None], world: int, *args: Any, timeout_s: float = 180) -> None:
    """Run to the end; fails if a worker does."""
    workers = start_workers(function, world, *args)
    for worker in workers:
        worker.join(timeout_s)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0] * world, f"exit codes {codes}"


def _run(function: Callable[..., None], rank: int, world: int, port: int, args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo"
    )
    function(*args)
