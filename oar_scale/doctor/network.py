"""What the network of a node can carry, as its kernel reports it, and what a collective should reach of that.

A fabric of 8 x 400 Gb/s that NCCL does not find is no error anywhere: it talks over sockets, at a hundredth of the rate. So the rate is
judged by the ports that are there, and NCCL is asked which network it has chosen.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from oar_scale.doctor.finding import Finding

SHARE = 0.25
"""Of what the slowest node's ports carry: a collective below it does not use them."""
UNKNOWN_GB_S = {"nccl": 2.0, "gloo": 0.05}
"""What is expected where the ports' rates are unknown, and the most that is expected of gloo, which is limited by one core."""
SOCKETS = "Socket"
"""NCCL's name of the network that needs no fabric."""


@dataclass(frozen=True)
class Links:
    """The ports of a node."""

    rdma: tuple[float, ...] = ()
    """GB/s of each active port of InfiniBand, RoCE or EFA."""
    ethernet: float = 0.0
    """GB/s of the fastest other interface; 0: unknown."""
    verbs: bool = False
    """Whether the library is here through which NCCL uses such ports."""

    @property
    def capacity(self) -> float:
        """GB/s of the node; 0: unknown."""
        return sum(self.rdma) or self.ethernet

    def __str__(self) -> str:
        if self.rdma:
            return f"{len(self.rdma)} RDMA ports, {sum(self.rdma):.4g} GB/s"
        return f"no RDMA port, {self.ethernet:.3g} GB/s" if self.ethernet else "no RDMA port"


def links_of_node(root: str = "/sys/class") -> Links:
    """The ports of this node; ``root`` is where the kernel lists them."""
    rdma = []
    for port in _listed(f"{root}/infiniband", "ports"):
        rate = re.match(r"([\d.]+) Gb/sec", _text(f"{port}/rate"))
        if rate and "ACTIVE" in _text(f"{port}/state"):
            rdma.append(float(rate[1]) / 8)
    speeds = [0.0]
    for interface in _listed(f"{root}/net"):
        real = os.path.exists(f"{interface}/device") or os.path.exists(f"{interface}/bonding")  # not those of containers and bridges
        speed = _text(f"{interface}/speed")
        if real and speed.isdecimal():
            speeds.append(int(speed) / 8000)
    return Links(tuple(rdma), max(speeds), _has_verbs())


def judge(rate: float, backend: str, network: str, nodes: Sequence[tuple[str, Links]]) -> str:
    """What is wrong with an all-reduce between the workers of these nodes, with the remedy; empty: nothing.

    Args:
        rate: its bus bandwidth, GB/s.
        backend: ``nccl`` or ``gloo``.
        network: what NCCL says that it uses; empty: unknown.
        nodes: name and ports of each.
    """
    name, slowest = min(nodes, key=lambda each: (bool(each[1].rdma), each[1].capacity))
    fabric = list(nodes) if len(nodes) > 1 and slowest.rdma else []
    if backend == "nccl" and fabric and (network == SOCKETS or not all(links.verbs for _, links in fabric)):
        blind = next((each for each, links in fabric if not links.verbs), None)
        cause = f"{blind} has no libibverbs" if blind else "NCCL says why with NCCL_DEBUG=INFO"
        return (
            f"NCCL talks over sockets, though {fabric[0][0]} has {fabric[0][1]}: {cause}. A container needs libibverbs1, ibverbs-providers "
            "and /dev/infiniband, a process unlimited locked memory (ulimit -l), AWS's EFA its plugin (cluster/Dockerfile.efa)"
        )
    known = SHARE * slowest.capacity if len(nodes) > 1 else 0.0
    expected = known or UNKNOWN_GB_S[backend]
    if rate >= (min(expected, UNKNOWN_GB_S["gloo"]) if backend == "gloo" else expected):
        return ""
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    return f"slow: {name} has {slowest}; name the fast interface in {variable}, and read what NCCL_DEBUG=INFO logs about its choice"


@contextmanager
def nccl_choice() -> Iterator[list[str]]:
    """NCCL must start for the first time inside. After that the list has the name of the network that it uses, where it said so."""
    chosen: list[str] = []
    with tempfile.NamedTemporaryFile("r", prefix="oar-nccl-", suffix=".log") as log:
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": log.name}
        yield chosen
        chosen += re.findall(r"Using network (\S.*)", log.read())[-1:]


def locked_memory() -> Iterator[Finding]:
    """Whether a process here may lock the memory that RDMA ports read and write."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    ports = links_of_node()
    if most != resource.RLIM_INFINITY and ports.rdma:
        remedy = "LimitMEMLOCK=infinity for slurmd, memlock -1 for Docker, IPC_LOCK for a pod"
        yield Finding("warn", "network", f"{ports}; only {most // 2**10} KiB may be locked, so NCCL falls back to sockets; {remedy}")
    else:
        yield Finding("ok", "network", str(ports))


def _listed(folder: str, inner: str = "") -> list[str]:
    """The entries of a folder, or of the folder ``inner`` in each of them."""
    entries = [os.path.join(folder, name) for name in sorted(os.listdir(folder))] if os.path.isdir(folder) else []
    return [each for entry in entries for each in _listed(os.path.join(entry, inner))] if inner else entries


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError):  # the kernel refuses to say the speed of an interface that is down
        return ""


def _has_verbs() -> bool:
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return False
    return True
