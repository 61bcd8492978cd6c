"""What the disturbed extractions share: a cluster that loses nodes, an S3 server that fails, drivers that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import conftest  # noqa: E402, F401 (a quiet environment on loopback)
import psutil  # noqa: E402
from fault_proxy import ALL_METHODS, FaultProxy  # noqa: E402
from pool_worker import living, tries  # noqa: E402

from cluster.dev import ray, s3  # noqa: E402
from oar_scale.storage import join  # noqa: E402

S3_FAULTS = {"503": 0.08, "slow down": 0.04, "refused": 0.04, "unanswered": 0.04}
PATIENCE_S = 900
"""For what takes seconds where nothing else runs."""


class Driver:
    """A driver of a trial, and all processes it started, as a node has them."""

    def __init__(self, script: str, settings: dict[str, Any], environment: dict[str, str]) -> None:
        """``settings`` is the argument of ``SCRIPT --drive``; its ``log`` is the folder of the driver's output."""
        command = [sys.executable, script, "--drive", json.dumps({**settings, "environment": environment})]
        self.errors = open(Path(settings["log"], f"driver-{time.monotonic_ns()}.err"), "w+")  # noqa: SIM115 (closed by end())
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        self.process = subprocess.Popen(command, start_new_session=True, **pipes)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def waits(self) -> int:
        """How often the driver, or an actor that is its child, has given up a call to the storage, to try it again later."""
        text = Path(self.errors.name).read_text(errors="replace")
        return text.count("Trying again for") + text.count("a heartbeat of this pool failed")

    def kill_group(self) -> None:
        if self.running:  # or its number may be another's by now
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, timeout_s: float = PATIENCE_S) -> tuple[int, Any]:
        """Exit code, and what it reported. Once."""
        output, _ = self.process.communicate(timeout=timeout_s)
        self.errors.seek(0)
        stderr = self.errors.read()
        self.errors.close()
        assert self.process.returncode in (0, 75, -signal.SIGKILL), f"exit code {self.process.returncode}: {stderr[-3000:]}"
        return self.process.returncode, json.loads(output.splitlines()[-1]) if self.process.returncode == 0 else None


def begin(settings: dict[str, Any]) -> None:
    """In a driver, before anything else."""
    os.environ |= settings["environment"]  # the variables of its Ray, over those that conftest has for all tests
    # A signal that comes when the pool has ended is too late; the pool takes those that come before.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Cluster:
    """A Ray head and a second node, with two cores each as Ray counts, that soon sees when the second one is gone."""

    def __init__(self, folder: str) -> None:
        self.folder = join(folder, "ray")
        health = {"initial_delay_ms": "0", "period_ms": "1000", "timeout_ms": "3000", "failure_threshold": "3"}
        with mock.patch.dict(os.environ, {f"RAY_health_check_{name}": value for name, value in health.items()}):
            self.ray = ray.up(self.folder, nodes=2, cpus=2, port=ray.free_port(), dashboard=False)

    def ready(self) -> None:
        """Start the second node where it is not there, and wait for it; again where it does not join: this machine may be overloaded."""
        for tries_left in (2, 1, 0):
            if self.ray.nodes[-1].process() is not None:
                return
            ray.add_node(self.ray, cpus=2)
            try:
                return ray.wait_for_nodes(self.ray, 2)
            except RuntimeError:
                if not tries_left:
                    raise
                self.kill_node()

    def kill_node(self) -> None:
        """As if its machine had lost power."""
        ray.lose_node(self.ray.nodes[-1])

    def close(self) -> None:
        ray.down(self.folder)


@contextmanager
def s3_with_faults(folder: str) -> Iterator[tuple[str, FaultProxy]]:
    """A root on a real S3 server, and the proxy before it; the AWS variables point there."""
    try:
        server = s3.up(join(folder, "s3"), s3.free_port(), "chaos")
        proxy = FaultProxy(server.port)
        with mock.patch.dict(os.environ, server.env | {"AWS_ENDPOINT_URL": proxy.url}):
            yield "s3://chaos/run", proxy
        proxy.close()
    finally:
        s3.down(join(folder, "s3"))


def fail_a_fifth(proxy: FaultProxy) -> None:
    proxy.spoil(S3_FAULTS, methods=ALL_METHODS)


def refuse_all(proxy: FaultProxy) -> None:
    """Begin an outage of the storage."""
    proxy.spoil({"refused": 1.0}, methods=ALL_METHODS)


def after_tries(
    log: str, more: int, drivers: Sequence[Driver], meanwhile: Callable[[], None] = lambda: None, quiet_s: float = PATIENCE_S
) -> None:
    """Wait for so many more tries of shards; not longer than the drivers run, nor, once there was one, than none comes in ``quiet_s``."""
    for _ in range(more):
        before, began = len(tries(log)), time.monotonic()
        while len(tries(log)) == before and any(driver.running for driver in drivers):
            if before and time.monotonic() - began > quiet_s:
                return
            assert time.monotonic() - began < PATIENCE_S, "no shard is tried"
            meanwhile()
            time.sleep(0.02)


def kill_an_actor(log: str, dice: random.Random) -> int:
    """How many were killed: one, or none if none is alive."""
    alive = living(log)
    if not alive:
        return 0
    with suppress(psutil.NoSuchProcess):
        dice.choice(alive).kill()
        return 1
    return 0
