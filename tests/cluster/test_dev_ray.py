"""The development Ray: started once, found again, a node lost and replaced, nothing left after down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.dev import processes
from cluster.dev import ray as dev_ray

SCRIPT = str(Path(dev_ray.__file__))


def test_ray_comes_up_once_replaces_a_node_and_leaves_nothing(tmp_path: Path) -> None:
    folder, port = str(tmp_path), dev_ray.free_port()
    try:
        cluster = dev_ray.up(folder, nodes=2, cpus=1, port=port, dashboard=False)
        assert dev_ray.up(folder, nodes=2, cpus=1, port=port, dashboard=False) == cluster == dev_ray.running(folder)
        for nodes, cpus in ((3, 1), (2, 2)):
            with pytest.raises(RuntimeError, match=f"already runs with 2 nodes of 1, 1 CPUs on port {port}"):
                dev_ray.up(folder, nodes=nodes, cpus=cpus, port=port, dashboard=False)
        with pytest.raises(RuntimeError, match=f"port {port} is taken"):
            dev_ray.up(str(tmp_path / "other"), port=port)
        assert oct((tmp_path / "cluster.json").stat().st_mode)[-3:] == "600", "the token is in it"

        everyone = [child for node in cluster.nodes for child in psutil.Process(node.pid).children(recursive=True)]
        dev_ray.lose_node(cluster.nodes[1])
        assert cluster.nodes[1].process() is None
        with pytest.raises(RuntimeError, match="already runs with 1 nodes"):
            dev_ray.up(folder, nodes=2, cpus=1, port=port, dashboard=False)
        assert dev_ray.add_node(cluster, cpus=1).address == "127.0.0.4"
        assert dev_ray.up(folder, nodes=2, cpus=1, port=port, dashboard=False) == cluster
        shown = subprocess.run([sys.executable, SCRIPT, "env", "--dir", folder], capture_output=True, text=True, check=True).stdout
        assert f"export RAY_ADDRESS=127.0.0.2:{port}\n" in shown and f"export RAY_AUTH_TOKEN={cluster.token}\n" in shown
    finally:
        assert dev_ray.down(folder)
    assert dev_ray.running(folder) is None and not dev_ray.down(folder)
    assert not os.path.exists(cluster.scratch)
    assert everyone and not [child for child in everyone if processes.is_alive(child)]


def test_env_and_down_without_a_cluster_say_so(tmp_path: Path) -> None:
    env = subprocess.run([sys.executable, SCRIPT, "env", "--dir", str(tmp_path)], capture_output=True, text=True)
    assert env.returncode == 1 and "start it with `up`" in env.stderr
    down = subprocess.run([sys.executable, SCRIPT, "down", "--dir", str(tmp_path)], capture_output=True, text=True)
    assert down.returncode == 0 and "was not running" in down.stderr
