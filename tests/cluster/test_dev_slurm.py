"""The development Slurm: started once, found again, ended with nothing left; its nodes can be hosts of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.dev import hosts, processes, slurm

SCRIPT = str(Path(slurm.__file__))
pytestmark = pytest.mark.skipif(slurm._program("slurmctld") is None, reason=f"Slurm is not installed: {slurm.PACKAGES}")


def wait_until_idle(cluster: slurm.Cluster) -> None:
    processes.wait_until(lambda: slurm._idle(cluster) == 2, 600, "the nodes do not get idle")


def test_slurm_comes_up_once_regains_a_node_and_ends_whole(tmp_path: Path) -> None:
    folder, port = str(tmp_path), slurm.free_port()
    cluster = slurm.up(folder, port=port)
    try:
        assert slurm.up(folder, port=port) == cluster == slurm.running(folder)
        for other in ({"nodes": 3}, {"cpus": 8}):
            with pytest.raises(RuntimeError, match=f"already runs: 2 nodes of 4 CPUs, port {port}"):
                slurm.up(folder, port=port, **other)
        with pytest.raises(RuntimeError, match=f"port {port} is taken"):
            slurm.up(str(tmp_path / "other"), port=port)
        with pytest.raises(RuntimeError, match="n1 runs"):
            slurm.restart_node(cluster, "n1")
        lost = cluster.node("n2")
        slurm.lose_node(cluster, "n2")
        again = slurm.restart_node(cluster, "n2")
        assert again.node("n2").pid != lost.pid and slurm.running(folder) == again
        wait_until_idle(again)
        assert sorted(again.command("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME").split()) == ["n1", "n2"]
    finally:
        assert slurm.down(folder)
    assert slurm.running(folder) is None and not slurm.down(folder)
    assert all(daemon.process() is None for daemon in again.daemons)


def test_down_takes_running_jobs_along(tmp_path: Path) -> None:
    cluster = slurm.up(str(tmp_path), port=slurm.free_port())
    try:
        cluster.command("sbatch", f"--output={tmp_path}/out", f"--wrap=echo $$ > {tmp_path}/pid; sleep 100")
        processes.wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 600, "the job does not begin")
    finally:
        slurm.down(str(tmp_path))
    assert not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text().strip()}/cwd")


@pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing()))
def test_hosts_have_own_names_networks_and_processes(tmp_path: Path) -> None:
    """They reach each other and nothing outside, and leave nothing behind."""
    networks = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    arguments = [sys.executable, SCRIPT, "--dir", str(tmp_path)]
    subprocess.run([*arguments, "up", "--hosts"], check=True, capture_output=True)
    try:
        look = "echo $(hostname) $(hostname --ip-address) $(ls -d /proc/[0-9]* | wc -l)"
        seen = subprocess.run(
            [*arguments, "exec", "--", "srun", "-N2", "bash", "-c", look], capture_output=True, text=True, check=True
        ).stdout
        by_host = {line.split()[0]: line.split()[1:] for line in seen.splitlines()}
        assert {name: address for name, (address, _) in by_host.items()} == {"n1": "10.77.0.11", "n2": "10.77.0.12"}
        assert all(int(count) < 20 for _, count in by_host.values()), "they see the processes of the machine"
        assert subprocess.run([*arguments, "exec", "--", "bash", "-c", "exit 7"]).returncode == 7
        outside = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)"
        refused = subprocess.run([*arguments, "exec", "--", "srun", "-N1", sys.executable, "-c", outside], capture_output=True, text=True)
        assert "Network is unreachable" in refused.stderr
        cluster = slurm.running(str(tmp_path))
        assert cluster is not None
        slurm.lose_node(cluster, "n2")
        slurm.restart_node(cluster, "n2")
        wait_until_idle(cluster)
        assert cluster.command("srun", "-w", "n2", "hostname").strip() == "n2"
    finally:
        subprocess.run([*arguments, "down"], check=True)
    assert subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout == networks
    assert all(daemon.process() is None for daemon in cluster.daemons)
