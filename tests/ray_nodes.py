"""A Ray cluster of node processes on this machine, each with an address on loopback and resources of its own, that can be lost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Self

import psutil

READY_S = 60


class RayCluster:
    """``with RayCluster() as cluster: node = cluster.add(cpus=1); cluster.lose(node)``; RAY_ADDRESS is for the caller to set."""

    def __init__(self, head_cpus: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="oar-nodes-", dir="/tmp")  # Ray's sockets lie in it: a short path
        self._nodes: list[subprocess.Popen[bytes]] = []
        with socket.create_server(("127.0.0.2", 0)) as probe:
            port = probe.getsockname()[1]
        self.address = f"127.0.0.2:{port if not 10002 <= port <= 19999 else 26379}"
        head = ["--head", f"--port={self.address.split(':')[1]}", "--include-dashboard=false", f"--temp-dir={self._folder}"]
        self._start("127.0.0.2", head_cpus, head)

    def add(self, cpus: int) -> subprocess.Popen[bytes]:
        """Another node; returns at once, it takes some seconds to join."""
        return self._start(f"127.0.0.{len(self._nodes) + 2}", cpus, [f"--address={self.address}"])

    def lose(self, node: subprocess.Popen[bytes]) -> None:
        """Every process of the node dies at once, as in a power cut."""
        for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self._nodes):
            if node.poll() is None:
                node.send_signal(signal.SIGTERM)
        for node in self._nodes:
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                self.lose(node)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, ip: str, cpus: int, rest: list[str]) -> subprocess.Popen[bytes]:
        ray = os.path.join(os.path.dirname(sys.executable), "ray")
        options = [f"--node-ip-address={ip}", f"--num-cpus={cpus}", "--object-store-memory=80000000", "--disable-usage-stats"]
        log = open(os.path.join(self._folder, f"node-{len(self._nodes)}.log"), "wb")  # noqa: SIM115 (as long as the node)
        node = subprocess.Popen([ray, "start", "--block", *options, *rest], stdout=log, stderr=log, start_new_session=True)
        self._nodes.append(node)
        return node


def wait_for_nodes(address: str, count: int) -> None:
    """Until so many nodes are alive."""
    deadline = time.monotonic() + READY_S
    question = f"import ray; ray.init('{address}', log_to_driver=False, logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
    while time.monotonic() < deadline:
        answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
        if answer.stdout.strip() == str(count):
            return
        time.sleep(1)
    raise TimeoutError(f"{count} nodes at {address}: {answer.stdout}{answer.stderr[-2000:]}")
