#!/usr/bin/env python3
"""A real Ray cluster of a few node processes on this machine, for tests and for trying things out: on loopback, with a token.

    python cluster/dev/ray.py up               start it (or find it running), wait until every node is alive, print the variables
    eval "$(python cluster/dev/ray.py env)"    point this shell at it: oar run and oar submit --cluster cluster/ray/dev.yaml use it
    python cluster/dev/ray.py down             end its nodes, each by its pid

Node n has the address 127.0.0.(n + 1): Ray identifies nodes by their addresses, and takes a public one where 127.0.0.1 is given.
The first one is the head, with the dashboard and the Jobs API; the number of CPUs of a node is a setting, independent of the machine.
Ray's nodes listen on every address of the machine; requests without the token are refused. Never end them with ``ray stop``, which
ends every Ray process of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import psutil

sys.path[:0] = [] if __package__ else [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
from cluster.dev import processes  # noqa: E402 (a script's own folder is not where packages start)

HEAD = "127.0.0.2"
PORTS = 4
"""Number of consecutive ports: of the head, its dashboard, Ray's client, and the nodes' agents."""
FREE = range(22000, 23000, 10)
"""The ports among which :func:`free_port` chooses; Ray's workers use ports from 10002 to 19999."""
START_S = 600.0
OBJECT_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True)
class Node:
    """A process ``ray start --block``; its start time distinguishes it from another process that got its pid later."""

    address: str
    pid: int
    created: int
    cpus: int

    def process(self) -> psutil.Process | None:
        """The process, while it runs."""
        return processes.find_process(self.pid, self.created)


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster."""

    folder: str
    scratch: str
    """Folder of Ray's sockets, whose paths must be short."""
    port: int
    dashboard: bool
    token: str
    nodes: list[Node] = field(default_factory=list)
    """All nodes that were started, including lost ones."""

    @property
    def living(self) -> list[Node]:
        """The nodes that run."""
        return [node for node in self.nodes if node.process() is not None]

    @property
    def address(self) -> str:
        """Address of the head for Ray's nodes and drivers."""
        return f"{HEAD}:{self.port}"

    @property
    def url(self) -> str:
        """URL of the dashboard and the Jobs API."""
        return f"http://{HEAD}:{self.port + 1}"

    @property
    def env(self) -> dict[str, str]:
        """The environment variables with which a program uses this cluster."""
        return {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}


def up(folder: str = ".dev/ray", nodes: int = 2, cpus: int = 2, port: int = 26379, *, dashboard: bool = True) -> Cluster:
    """Start the cluster unless it runs already; return once every node is alive.

    Args:
        folder: for its state and logs.
        nodes: number of nodes, with the head.
        cpus: number of CPUs that each node announces.
        port: of the head; the next ports are those of its services.
        dashboard: also start the dashboard with the Jobs API.

    Raises:
        RuntimeError: a port is taken, it runs with other settings, or it did not come up.
    """
    folder = os.path.abspath(folder)
    with processes.folder_lock(folder):
        cluster = running(folder)
        if cluster is None:
            _clear(folder)
            cluster = _start_head(folder, cpus, port, dashboard)
            for _ in range(nodes - 1):
                add_node(cluster, cpus)
        elif ([node.cpus for node in cluster.living], cluster.port) != ([cpus] * nodes, port):
            counts = ", ".join(str(node.cpus) for node in cluster.living)
            raise RuntimeError(
                f"the Ray in {folder} already runs with {len(cluster.living)} nodes of {counts} CPUs on port {cluster.port}: stop it first"
            )
    wait_for_nodes(cluster, nodes)
    return cluster


def down(folder: str = ".dev/ray") -> bool:
    """Stop the nodes; return whether the cluster was running. Ray's logs are deleted, the output of ``ray start`` stays."""
    folder = os.path.abspath(folder)
    if not os.path.exists(os.path.join(folder, "cluster.json")):
        return False
    with processes.folder_lock(folder):
        alive = running(folder) is not None
        _clear(folder)
    return alive


def running(folder: str = ".dev/ray") -> Cluster | None:
    """Return the cluster of this folder, or None where its head does not run."""
    cluster = _read(os.path.abspath(folder))
    return cluster if cluster is not None and cluster.nodes and cluster.nodes[0].process() is not None else None


def add_node(cluster: Cluster, cpus: int) -> Node:
    """Start another node; returns at once, while the node takes some seconds to join."""
    address = f"127.0.0.{len(cluster.nodes) + 2}"
    return _start(cluster, address, cpus, [f"--address={cluster.address}"])


def lose_node(node: Node) -> None:
    """Kill every process of a node at once, as in a power cut."""
    process = node.process()
    if process is None:
        return
    processes.wait_until_gone(processes.process_tree(process), 0)


def wait_for_nodes(cluster: Cluster, count: int) -> None:
    """Wait until ``count`` nodes are alive and the dashboard answers.

    Raises:
        RuntimeError: that takes longer than ``START_S`` seconds.
    """
    command = [sys.executable, "-m", "oar_scale.launch.ray_ready", str(count), str(int(START_S))]
    answer = subprocess.run(command, env={**os.environ, **cluster.env}, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"{answer.stderr.strip()}: see {cluster.folder}/log")
    if cluster.dashboard:
        processes.wait_until(lambda: _answers(cluster), START_S, f"no dashboard at {cluster.url}: see {cluster.folder}/log")


def free_port() -> int:
    """Find a port that is free with those next to it, and reserve it."""
    return processes.free_port(FREE, lambda port: range(port, port + PORTS))


def _start_head(folder: str, cpus: int, port: int, dashboard: bool) -> Cluster:
    if used := processes.ports_in_use(range(port, port + PORTS)):
        raise RuntimeError(f"port {used[0]} is taken: choose another --port (it and the next {PORTS - 1} must be free)")
    os.makedirs(os.path.join(folder, "log"), exist_ok=True)
    cluster = Cluster(folder, tempfile.mkdtemp(prefix="oar-ray-", dir="/tmp"), port, dashboard, secrets.token_hex(32))
    options = ["--head", f"--port={port}", f"--temp-dir={cluster.scratch}/r", f"--ray-client-server-port={port + 2}"]
    options += [f"--include-dashboard={str(dashboard).lower()}", f"--dashboard-host={HEAD}", f"--dashboard-port={port + 1}"]
    _start(cluster, HEAD, cpus, options)
    head = cluster.nodes[0]
    processes.wait_until(lambda: bool(processes.ports_in_use([port])) or head.process() is None, START_S, f"no head at {cluster.address}")
    if head.process() is None:
        log = os.path.join(folder, "log", f"{HEAD}.log")
        raise RuntimeError(f"the head ended at once, see {folder}/log:\n{processes.last_lines(log)}")
    return cluster


def _start(cluster: Cluster, address: str, cpus: int, rest: Sequence[str]) -> Node:
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    options = [f"--node-ip-address={address}", f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    options.append(f"--dashboard-agent-listen-port={cluster.port + 3}")
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {**cluster.env}
    del env["RAY_ADDRESS"]  # of this cluster, which does not run yet
    # A job's `python` is that of the node's PATH.
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", "")])
    with open(os.path.join(cluster.folder, "log", f"{address}.log"), "ab") as log:
        process = subprocess.Popen(
            [ray, "start", "--block", *options, *rest], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    node = Node(address, process.pid, processes.process_start(process.pid), cpus)
    process.returncode = 0  # it is meant to outlive us: no warning when the handle goes
    cluster.nodes.append(node)
    _write(cluster)
    return node


def _clear(folder: str) -> None:
    """Stop what is left of a cluster, and remove its files."""
    cluster = _read(folder)
    if cluster is None:
        return
    everyone: list[psutil.Process] = []
    for node in reversed(cluster.nodes):
        if (process := node.process()) is not None:
            everyone += processes.process_tree(process)
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)  # ray start ends its children itself
    for node in cluster.nodes:
        try:
            processes.wait_until(lambda node=node: node.process() is None, 20, "")
        except RuntimeError:
            lose_node(node)
    processes.wait_until_gone(everyone, 10)  # Ray's workers end by themselves a moment later, and write into the folder until then
    shutil.rmtree(cluster.scratch, ignore_errors=True)
    os.unlink(os.path.join(folder, "cluster.json"))


def _answers(cluster: Cluster) -> bool:
    request = urllib.request.Request(f"{cluster.url}/api/version", headers={"Authorization": f"Bearer {cluster.token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _read(folder: str) -> Cluster | None:
    path = os.path.join(folder, "cluster.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        stored = json.load(file)
    return Cluster(**{**stored, "nodes": [Node(**each) for each in stored["nodes"]]})


def _write(cluster: Cluster) -> None:
    path = os.path.join(cluster.folder, "cluster.json")
    with os.fdopen(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # the token is in it
        json.dump(asdict(cluster), file, indent=1)
    os.replace(f"{path}.new", path)


def main() -> int:
    parser = argparse.ArgumentParser(description="A real Ray cluster of node processes on loopback.")
    parser.add_argument("verb", choices=["up", "down", "env"])
    parser.add_argument("--dir", default=".dev/ray", help="what is known of the cluster, and logs (default: .dev/ray)")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that a node counts")
    parser.add_argument("--port", type=int, default=26379, help="of the head; the dashboard has the next one (default: 26379)")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "down":
            print("stopped" if down(arguments.dir) else "was not running", file=sys.stderr)
            return 0
        cluster = up(arguments.dir, arguments.nodes, arguments.cpus, arguments.port) if arguments.verb == "up" else running(arguments.dir)
    except RuntimeError as error:
        print(f"ray: {error}", file=sys.stderr)
        return 1
    if cluster is None:
        print(f"ray: no cluster runs in {arguments.dir}: start it with `up`", file=sys.stderr)
        return 1
    for name, value in cluster.env.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
