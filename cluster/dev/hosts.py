"""Hosts on one machine: each with a network, a name, processes and shared memory of its own, and a cable to a common bridge.

    gate  10.77.0.1   where the controller and the clients are; owns the bridge
    n1    10.77.0.11  n2  10.77.0.12  ...

They are Linux namespaces without a name: a host lives as long as its first process, whose end is a power cut for all that run on
it, and then nothing of it is left on the machine. No address outside can be reached from them. Files are common to all, as on a
cluster with a shared file system. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence

import psutil

GATE = "gate"
GATE_ADDRESS = "10.77.0.1"
START_S = 300.0
BOOT = """
hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs -o size=2g tmpfs /dev/shm && ip link set lo up || exit 1
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add "$3/24" dev eth0 && ip link set eth0 up || exit 1
shift 3
"$@" & first=$!
while kill -0 "$first" 2>/dev/null; do wait "$first"; done
"""
"""Process 1 of a host: waits for its cable, runs what it is for, and buries the orphans."""


def missing() -> str | None:
    """Why there can be no hosts here."""
    if os.getuid() != 0:
        return "hosts of their own need root"
    lacks = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    return f"no program `{lacks[0]}`: apt-get install --no-install-recommends iproute2 util-linux" if lacks else None


def address(host: str) -> str:
    return GATE_ADDRESS if host == GATE else f"10.77.0.{10 + int(host.removeprefix('n'))}"


def write_names(path: str, count: int) -> None:
    """The /etc/hosts of all of them."""
    names = [("127.0.0.1", "localhost"), *((address(host), host) for host in (GATE, *(f"n{i + 1}" for i in range(count))))]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{where} {name}\n" for where, name in names)


def gate(names: str) -> list[str]:
    """The command whose process is the gate. It shares this machine's process ids, so that its daemons can be ended from outside."""
    script = (
        f'hostname {GATE} && mount --bind "$1" /etc/hosts && ip link set lo up && ip link add br0 type bridge '
        f"&& ip addr add {GATE_ADDRESS}/24 dev br0 && ip link set br0 up && exec sleep infinity"
    )
    return ["unshare", "--net", "--uts", "--ipc", "--mount", "--propagation=private", "bash", "-c", script, "bash", names]


def node(host: str, names: str, command: Sequence[str]) -> list[str]:
    """The command whose process is a node that runs ``command``; it waits for :func:`connect`."""
    spaces = ["--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--propagation=private"]
    return ["unshare", *spaces, "bash", "-c", BOOT, "bash", host, names, address(host), *command]


def is_ready(gate_pid: int) -> bool:
    question = ["nsenter", f"--target={gate_pid}", "--net", "ip", "-brief", "link", "show", "br0", "up"]
    return bool(subprocess.run(question, capture_output=True, text=True).stdout.strip())


def connect(gate_pid: int, node_pid: int, host: str) -> None:
    """Plug a node's cable into the bridge."""
    inner = _until_child(node_pid)
    cable = f"to-{host}"
    plug = f"ip link add {cable} type veth peer name eth0 netns {inner} && ip link set {cable} master br0 up"
    deadline = time.monotonic() + START_S
    while True:  # the namespaces may still be on their way, or an earlier node of that name has not quite gone
        done = subprocess.run(["nsenter", f"--target={gate_pid}", "--net", "sh", "-c", plug], capture_output=True, text=True)
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{host} gets no network: {done.stderr.strip()}")
        time.sleep(0.05)


def enter(gate_pid: int) -> list[str]:
    """Put before a command, it runs at the gate."""
    return ["nsenter", f"--target={gate_pid}", "--net", "--uts", "--ipc", "--mount", f"--wd={os.getcwd()}"]


def _until_child(pid: int) -> int:
    """The process 1 inside, in a network of its own."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        children = psutil.Process(pid).children()
        if children and os.stat(f"/proc/{children[0].pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino:
            return int(children[0].pid)
        time.sleep(0.02)
    raise RuntimeError("a host does not start")
