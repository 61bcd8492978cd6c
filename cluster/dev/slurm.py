#!/usr/bin/env python3
"""A real Slurm of a few virtual nodes on this machine, for tests and for trying job files out. Nothing leaves the machine.

    python cluster/dev/slurm.py up               start it unless it runs, wait until every node is idle, print the variables
    eval "$(python cluster/dev/slurm.py env)"    point this shell at it: sbatch, squeue and oar submit use it
    python cluster/dev/slurm.py down             stop its daemons, each by its pid; running jobs are cancelled first

The nodes share the machine's loopback addresses; with ``up --hosts`` each is a host of its own (hosts.py; needs root), and commands
reach the cluster by

    python cluster/dev/slurm.py exec -- oar submit ...

Needs Debian's packages slurmctld, slurmd, slurm-client and munge; no system service, no cgroups: key, sockets, logs and state lie in
one folder. The nodes are called n1, n2, ...; the partitions main, preempt (requeued by the others) and high. The CPUs and
GPUs of a node are settings, independent of the machine; the GPUs are stand-ins.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import psutil

sys.path[:0] = [] if __package__ else [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
from cluster.dev import hosts, processes  # noqa: E402 (a script's own folder is not where packages start)

HOST = "127.0.0.1"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
FREE = range(23000, 24000, 10)
"""The ports among which :func:`free_port` chooses."""
START_S = 600.0
OPTIONS = re.compile(r"(?:SLURM|SBATCH|SALLOC|SRUN|SQUEUE|SINFO|SACCT|SCANCEL|SCONTROL)_")
"""Variables by which a shell changes what Slurm's commands do and print."""
CLIENT_S = 120
"""Timeout of Slurm's commands, which by themselves wait minutes for a controller that is gone."""


@dataclass(frozen=True)
class Daemon:
    """A process that was started here; its start time distinguishes it from another one that got its pid later."""

    name: str
    pid: int
    created: int

    def process(self) -> psutil.Process | None:
        """The process, while it runs."""
        return processes.find_process(self.pid, self.created)


@dataclass(frozen=True)
class Cluster:
    """A running Slurm cluster."""

    folder: str
    nodes: int
    cpus: int
    """Number of CPUs of each node, as configured."""
    port: int
    isolated: bool = False
    """Each node is a host of its own."""
    daemons: list[Daemon] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        """The environment variables with which Slurm's commands use this cluster."""
        return {"SLURM_CONF": os.path.join(self.folder, "slurm.conf")}

    @property
    def prefix(self) -> list[str]:
        """Arguments that, put before a command, run it where the cluster can be reached."""
        return hosts.enter(self.daemon(hosts.GATE).pid) if self.isolated else []

    def daemon(self, name: str) -> Daemon:
        """A daemon by its name."""
        return next(daemon for daemon in self.daemons if daemon.name == name)

    def node(self, name: str) -> Daemon:
        """The daemon of a node, for tests that kill it. Where nodes are isolated hosts, that is a power cut."""
        return self.daemon(f"slurmd-{name}")

    def command(self, *arguments: str) -> str:
        """Run one of Slurm's commands and return its output. Raises RuntimeError where it fails."""
        command = [*self.prefix, *arguments]
        kept = {name: value for name, value in os.environ.items() if not OPTIONS.match(name)}
        done = subprocess.run(command, env={**kept, **self.env}, capture_output=True, text=True, timeout=CLIENT_S)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


def up(folder: str = ".dev/slurm", nodes: int = 2, cpus: int = 4, port: int = 16800, *, isolated: bool = False) -> Cluster:
    """Start the cluster unless it runs already; return once every node is idle.

    Args:
        folder: for its configuration, state and logs.
        nodes: number of nodes.
        cpus: number of CPUs and stand-in GPUs of each node.
        port: of the controller; the next ones are those of the nodes.
        isolated: each node is a host of its own.

    Raises:
        RuntimeError: a program is missing, a port is taken, it runs with other settings, or it did not come up.
    """
    folder = os.path.abspath(folder)
    with processes.folder_lock(folder):
        cluster = running(folder)
        if cluster is not None:
            if (cluster.nodes, cluster.cpus, cluster.port, cluster.isolated) != (nodes, cpus, port, isolated):
                kind = f"{cluster.nodes} nodes of {cluster.cpus} CPUs{' with hosts of their own' if cluster.isolated else ''}"
                raise RuntimeError(f"the Slurm in {folder} already runs: {kind}, port {cluster.port}. Stop it first")
            return cluster
        cluster = _start(folder, nodes, cpus, port, isolated)
    processes.wait_until(lambda: _idle(cluster) >= nodes, START_S, f"the nodes do not get idle: see {folder}/log")
    return cluster


def down(folder: str = ".dev/slurm") -> bool:
    """Cancel running jobs and stop the daemons; return whether there were any. The logs stay."""
    folder = os.path.abspath(folder)
    if not os.path.exists(os.path.join(folder, "cluster.json")):
        return False
    with processes.folder_lock(folder):
        cluster = _read(folder)
        alive = [daemon for daemon in cluster.daemons if daemon.process() is not None]
        with suppress(RuntimeError, subprocess.TimeoutExpired):  # the controller may be gone
            cluster.command("scancel", "--user", str(os.getuid()), "--full")
            processes.wait_until(lambda: not cluster.command("squeue", "-h", "-t", "R,CG").strip(), 30, "jobs do not end")
        for daemon in reversed(cluster.daemons):
            _end(daemon, at_once=cluster.isolated and daemon.name.startswith("slurmd-"))
        os.unlink(os.path.join(folder, "cluster.json"))
    return bool(alive)


def running(folder: str = ".dev/slurm") -> Cluster | None:
    """Return the cluster of this folder, or None where its controller does not run."""
    folder = os.path.abspath(folder)
    if not os.path.exists(os.path.join(folder, "cluster.json")):
        return None
    cluster = _read(folder)
    controller = next((daemon for daemon in cluster.daemons if daemon.name == "slurmctld"), None)
    return cluster if controller is not None and controller.process() is not None else None


def lose_node(cluster: Cluster, name: str) -> None:
    """Kill the daemon of a node; with ``--hosts`` all its processes end as well, as in a power cut."""
    lost = cluster.node(name)
    if (process := lost.process()) is not None:
        process.kill()
        processes.wait_until(lambda: lost.process() is None, 60, f"{name} does not end")


def restart_node(cluster: Cluster, name: str) -> Cluster:
    """Start the daemon of a lost node again; returns the cluster with it."""
    lost = cluster.node(name)
    if lost.process() is not None:
        raise RuntimeError(f"{name} runs")
    cluster.daemons[cluster.daemons.index(lost)] = _start_node(cluster, name)
    _write(cluster)
    return cluster


def free_port(nodes: int = 2) -> int:
    """Find a port that is free with one for each node above it, and reserve it."""
    return processes.free_port(FREE, lambda port: range(port, port + nodes + 1))


def _start(folder: str, nodes: int, cpus: int, port: int, isolated: bool) -> Cluster:
    if isolated and (reason := hosts.missing()):
        raise RuntimeError(reason)
    for program in PROGRAMS:
        if _program(program) is None:
            raise RuntimeError(f"no program `{program}`: {PACKAGES}")
    if not isolated and (used := processes.ports_in_use(range(port, port + nodes + 1))):
        raise RuntimeError(f"port {used[0]} is taken: choose another --port (it and the next {nodes} must be free)")
    for part in ("state", "log", "run", "munge", "dev", *(f"spool/n{i + 1}" for i in range(nodes))):
        os.makedirs(os.path.join(folder, part), exist_ok=True)
    _write_files(folder, nodes, cpus, port, isolated)
    run, munge = (os.path.join(folder, part) for part in ("run", "munge"))
    cluster = Cluster(folder, nodes, cpus, port, isolated)
    munged = [
        *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={munge}/key", f"--socket={run}/munge.socket"),
        *(f"--pid-file={run}/munged.pid", f"--log-file={folder}/log/munged.log", f"--seed-file={munge}/seed"),
    ]
    _add(cluster, _launch(folder, "munged", munged))
    processes.wait_until(lambda: os.path.exists(f"{run}/munge.socket"), START_S, f"munged does not start: see {folder}/log/munged.log")
    if isolated:
        hosts.write_names(os.path.join(folder, "hosts"), nodes)
        _add(cluster, _launch(folder, hosts.GATE, hosts.gate(os.path.join(folder, "hosts"))))
        processes.wait_until(
            lambda: hosts.is_ready(cluster.daemon(hosts.GATE).pid), START_S, f"no bridge: see {folder}/log/{hosts.GATE}.out"
        )
    _add(cluster, _launch(folder, "slurmctld", [*cluster.prefix, _program("slurmctld") or "", "-D", "-f", cluster.env["SLURM_CONF"]]))
    for number in range(nodes):
        _add(cluster, _start_node(cluster, f"n{number + 1}"))
    return cluster


def _add(cluster: Cluster, daemon: Daemon) -> None:
    cluster.daemons.append(daemon)
    _write(cluster)


def _start_node(cluster: Cluster, name: str) -> Daemon:
    command = [_program("slurmd") or "", "-D", "-f", cluster.env["SLURM_CONF"], "-N", name]
    if not cluster.isolated:
        return _launch(cluster.folder, f"slurmd-{name}", command)
    daemon = _launch(cluster.folder, f"slurmd-{name}", hosts.node(name, os.path.join(cluster.folder, "hosts"), command))
    hosts.connect(cluster.daemon(hosts.GATE).pid, daemon.pid, name)
    return daemon


def _write_files(folder: str, nodes: int, cpus: int, port: int, isolated: bool) -> None:
    here = socket.gethostname().split(".")[0]
    names = [f"n{i + 1}" for i in range(nodes)]
    addresses = {
        name: f"NodeHostname={name} NodeAddr={hosts.address(name)} Port={port + 1}"
        if isolated
        else f"NodeHostname={here} NodeAddr={HOST} Port={port + 1 + i}"
        for i, name in enumerate(names)
    }
    memory = psutil.virtual_memory().total // 2**20 - 500
    for number in range(cpus):  # stand-in GPUs: Slurm wants character devices
        device = os.path.join(folder, "dev", f"gpu{number}")
        if not os.path.lexists(device):
            os.symlink(os.devnull, device)
    partition = f"Nodes=n[1-{nodes}] State=UP"
    lines = [
        "ClusterName=oar",
        # Jobs count their ports from their number, modulo 1500: those of clusters on one machine, whose ports follow one another, must
        # are separate.
        f"FirstJobId={port // 10 * 573 % 60000 + 1}",
        f"SlurmctldHost={hosts.GATE}({hosts.GATE_ADDRESS})" if isolated else f"SlurmctldHost={here}({HOST})",
        f"SlurmctldPort={port}",
        *(f"{who}={_user()}" for who in ("SlurmUser", "SlurmdUser")),
        "AuthType=auth/munge",
        # A requeued job waits until its old credential has expired, two minutes by default.
        f"AuthInfo=socket={folder}/run/munge.socket,cred_expire=5",
        *(() if isolated else ("CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",)),  # loopback only
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/run/slurmctld.pid",
        f"SlurmdPidFile={folder}/run/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd.%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "MailProg=/bin/true",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "JobCompType=jobcomp/filetxt",
        f"JobCompLoc={folder}/log/jobcomp.txt",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",
        "GresTypes=gpu",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0,sched_min_interval=0",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "EnforcePartLimits=ALL",
        "JobRequeue=1",
        "ReturnToService=2",
        "KillWait=30",  # Slurm's own default: what a busy machine needs to clean up after a signal
        "BatchStartTimeout=60",
        "MinJobAge=3600",
        "SlurmctldTimeout=30",
        "SlurmdTimeout=15",
        "LaunchParameters=send_gids",
        *(
            f"NodeName={name} {address} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
            f"CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={memory} Gres=gpu:{cpus} State=UNKNOWN"
            for name, address in addresses.items()
        ),
        f"PartitionName=main {partition} Default=YES MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF",
        f"PartitionName=preempt {partition} MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60",
        f"PartitionName=high {partition} MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF",
    ]
    files = {
        "slurm.conf": "\n".join(lines) + "\n",
        "gres.conf": f"AutoDetect=off\nName=gpu File={folder}/dev/gpu[0-{cpus - 1}]\n",
        "cgroup.conf": "CgroupPlugin=cgroup/v1\n",  # slurmd wants one even where it is not used; looking for it by itself may fail
    }
    for name, text in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
    os.chmod(os.path.join(folder, "munge"), 0o700)
    key = os.path.join(folder, "munge", "key")
    if not os.path.exists(key):
        with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as out:
            out.write(secrets.token_bytes(1024))


def _launch(folder: str, name: str, command: Sequence[str]) -> Daemon:
    program = _program(command[0])
    if program is None:
        raise RuntimeError(f"no program `{command[0]}`")
    with open(os.path.join(folder, "log", f"{name}.out"), "ab") as log:
        process = subprocess.Popen(
            [program, *command[1:]], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    created = processes.process_start(process.pid)
    process.returncode = 0  # it is meant to outlive us: no warning when the handle goes
    return Daemon(name, process.pid, created)


def _end(daemon: Daemon, *, at_once: bool) -> None:
    process = daemon.process()
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):  # it ends by itself right now
        if not at_once:
            process.send_signal(signal.SIGTERM)
            with suppress(RuntimeError):
                processes.wait_until(lambda: daemon.process() is None, 10, "")
                return
        process.kill()
    processes.wait_until(lambda: daemon.process() is None, 60, f"{daemon.name} does not end")


def _idle(cluster: Cluster) -> int:
    for daemon in cluster.daemons:
        if daemon.process() is None:
            log = os.path.join(cluster.folder, "log", f"{daemon.name}.out")
            raise RuntimeError(f"{daemon.name} ended at once, see {cluster.folder}/log:\n{processes.last_lines(log)}")
    try:
        answer = cluster.command("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip()
    except (RuntimeError, subprocess.TimeoutExpired):
        return 0  # it does not answer yet; the caller has the deadline
    return int(answer or 0)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def _user() -> str:
    return psutil.Process().username()


def _read(folder: str) -> Cluster:
    with open(os.path.join(folder, "cluster.json"), encoding="utf-8") as file:
        stored = json.load(file)
    return Cluster(**{**stored, "daemons": [Daemon(**each) for each in stored["daemons"]]})


def _write(cluster: Cluster) -> None:
    path = os.path.join(cluster.folder, "cluster.json")
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(asdict(cluster), file, indent=1)
    os.replace(f"{path}.new", path)


def main() -> int:
    parser = argparse.ArgumentParser(description="A real Slurm of virtual nodes on this machine.")
    parser.add_argument("verb", choices=["up", "down", "env", "exec"])
    parser.add_argument("--dir", default=".dev/slurm", help="configuration, logs and state (default: .dev/slurm)")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=4, help="CPUs that a node counts, and stand-in GPUs")
    parser.add_argument("--port", type=int, default=16800)
    parser.add_argument("--hosts", action="store_true", help="each node a host of its own: network, name, processes (needs root)")
    parser.usage = "%(prog)s up|down|env|exec [options] [-- COMMAND ...]"  # of exec: runs where the cluster can be reached
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    given, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    try:
        if given.verb == "down":
            print("stopped" if down(given.dir) else "was not running", file=sys.stderr)
            return 0
        cluster = up(given.dir, given.nodes, given.cpus, given.port, isolated=given.hosts) if given.verb == "up" else running(given.dir)
    except RuntimeError as error:
        print(f"slurm: {error}", file=sys.stderr)
        return 1
    if cluster is None:
        print(f"slurm: no cluster runs in {given.dir}: start it with `up`", file=sys.stderr)
        return 1
    if given.verb == "exec":
        return subprocess.run([*cluster.prefix, *(command or ["bash"])], env={**os.environ, **cluster.env}).returncode
    for name, value in cluster.env.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
