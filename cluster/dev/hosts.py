"""Isolated hosts on one machine: each has its own network, name, processes and shared memory, and is connected to a common bridge.

    gate  10.77.0.1   where the controller and the clients are; owns the bridge
    n1    10.77.0.11  n2  10.77.0.12  ...

They are unnamed Linux namespaces: a host lasts as long as its first process, whose end kills all processes on it, as in a power cut, and
leaves nothing on the machine. No address outside can be reached from a host. All hosts see the same files, as on a cluster with a shared
file system. Needs root, iproute2 and util-linux.
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
START_S = 600.0
BOOT = """
hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs -o size=2g tmpfs /dev/shm && ip link set lo up || exit 1
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add "$3/24" dev eth0 && ip link set eth0 up || exit 1
shift 3
"$@" & first=$!
while kill -0 "$first" 2>/dev/null; do wait "$first"; done
"""
"""Process 1 of a host: waits for its network device, runs its command, and reaps orphaned processes."""


def missing() -> str | None:
    """Why isolated hosts cannot be started on this machine; None if they can."""
    if os.getuid() != 0:
        return "hosts of their own need root"
    lacks = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    return f"no program `{lacks[0]}`: apt-get install --no-install-recommends iproute2 util-linux" if lacks else None


def address(host: str) -> str:
    """The address of the gate or of a node."""
    return GATE_ADDRESS if host == GATE else f"10.77.0.{10 + int(host.removeprefix('n'))}"


def write_names(path: str, count: int) -> None:
    """Write the /etc/hosts of all hosts, of which ``count`` are nodes."""
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
    """Whether the gate's bridge is up."""
    question = ["nsenter", f"--target={gate_pid}", "--net", "ip", "-brief", "link", "show", "br0", "up"]
    return bool(subprocess.run(question, capture_output=True, text=True).stdout.strip())


def connect(gate_pid: int, node_pid: int, host: str) -> None:
    """Connect a node to the bridge. Raises RuntimeError where that takes too long."""
    inner = _wait_for_child(node_pid)
    link = f"to-{host}"
    plug = f"ip link add {link} type veth peer name eth0 netns {inner} && ip link set {link} master br0 up"
    deadline = time.monotonic() + START_S
    while True:  # the namespaces may not exist yet, or an earlier node of that name has not quite ended
        done = subprocess.run(["nsenter", f"--target={gate_pid}", "--net", "sh", "-c", plug], capture_output=True, text=True)
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{host} gets no network: {done.stderr.strip()}")
        time.sleep(0.05)


def enter(gate_pid: int) -> list[str]:
    """Words that, put before a command, run it at the gate."""
    return ["nsenter", f"--target={gate_pid}", "--net", "--uts", "--ipc", "--mount", f"--wd={os.getcwd()}"]


def _wait_for_child(pid: int) -> int:
    """The pid of process 1 of a host, once it is in its own network namespace."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        children = psutil.Process(pid).children()
        if children and os.stat(f"/proc/{children[0].pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino:
            return int(children[0].pid)
        time.sleep(0.02)
    raise RuntimeError("a host does not start")
