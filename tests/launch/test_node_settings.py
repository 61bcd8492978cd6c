"""What a job sets on its nodes: addresses and interfaces, folders for temporary files, limits, GPUs."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_runs import StubRuns
from test_job_files import job_file

from cluster.dev.slurm import Cluster
from oar_scale.launch.profile import SlurmProfile, load_profile
from oar_scale.launch.slurm import GLOO_INTERFACE

ROOT = Path(__file__).resolve().parents[2]
NETWORK = """1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever preferred_lft forever
2: eth0    inet 10.0.0.7/24 brd 10.0.0.255 scope global eth0\\       valid_lft forever
3: {name}    inet 192.168.65.16/16 brd 192.168.255.255 scope global {name}\\       valid_lft forever
3: {name}    inet 192.168.65.17/16 scope global secondary {name}\\       valid_lft forever
4: docker0    inet 172.17.0.1/16 scope global docker0\\       valid_lft forever
"""
"""What ``ip -o -4 address show`` prints."""


@pytest.fixture(scope="module")
def stub_runs(slurm: Cluster, stub: Path, tmp_path_factory: pytest.TempPathFactory) -> StubRuns:
    return StubRuns(tmp_path_factory.mktemp("settings"), stub)


@pytest.fixture
def low_limit() -> Iterator[None]:
    """A shell in which few files may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def on_node(folder: Path, interface: str, script: str, **env: str) -> str:
    (folder / "ip").write_text(f"#!/bin/sh\ncat <<'END'\n{NETWORK.format(name=interface)}END\n")
    (folder / "ip").chmod(0o755)
    variables = {"PATH": f"{folder}:/usr/bin:/bin", **env}
    return subprocess.run(["bash", "-c", script], env=variables, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("interface", ["ib0", "ibp65s0", "ibs1f0", "bond-ib", "bond-ib0"])
def test_the_address_on_infiniband_is_found_by_any_name(tmp_path: Path, interface: str) -> None:
    profile = load_profile(str(ROOT / "cluster" / "slurm" / "gpu.yaml"))
    assert isinstance(profile, SlurmProfile)
    assert on_node(tmp_path, interface, profile.node_address) == "192.168.65.16"


def test_no_infiniband_is_no_address(tmp_path: Path) -> None:
    profile = load_profile(str(ROOT / "cluster" / "slurm" / "gpu.yaml"))
    assert isinstance(profile, SlurmProfile) and on_node(tmp_path, "enp1s0", profile.node_address) == ""


@pytest.mark.parametrize(
    ("address", "env", "chosen"),
    [
        ("192.168.65.16", {}, "ibp65s0"),
        ("10.0.0.7", {}, "eth0"),
        ("192.168.65.16", {"GLOO_SOCKET_IFNAME": "eth0"}, "eth0"),
        ("127.0.0.2", {}, "none"),
        ("92.168.65.16", {}, "none"),
    ],
)
def test_gloo_uses_the_interface_of_the_address(tmp_path: Path, address: str, env: dict[str, str], chosen: str) -> None:
    script = f"address={address}\n{GLOO_INTERFACE}\nprintenv GLOO_SOCKET_IFNAME || echo none"
    assert on_node(tmp_path, "ibp65s0", script, **env) == chosen


def step_lines(text: str, first: str, count: int) -> str:
    lines = text.splitlines()
    at = next(index for index, line in enumerate(lines) if line.lstrip().startswith(first))
    return "\n".join(lines[at : at + count])


@pytest.mark.parametrize(
    ("env", "tmp", "triton"),
    [
        ({"OAR_RAY_FOLDER": "{folder}"}, "{folder}/tmp", "{folder}/tmp/triton"),
        ({"OAR_RAY_FOLDER": "{folder}", "TRITON_CACHE_DIR": "/mine"}, "{folder}/tmp", "/mine"),
        ({}, "none", "none"),
        ({"OAR_RAY_FOLDER": "/nowhere"}, "none", "none"),
    ],
    ids=["own", "chosen", "no Ray", "other node"],
)
def test_temporary_files_lie_in_the_attempts_folder(tmp_path: Path, env: dict[str, str], tmp: str, triton: str) -> None:
    (tmp_path / "tmp").mkdir()
    script = step_lines(job_file("dev", ()).text, "own=${OAR", 2) + "\nprintenv TMPDIR || echo none; printenv TRITON_CACHE_DIR || echo none"
    variables = {"PATH": os.environ["PATH"], **{name: value.format(folder=tmp_path) for name, value in env.items()}}
    printed = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True).stdout.split()
    assert printed == [each.format(folder=tmp_path) for each in (tmp, triton)]


def test_a_job_asks_for_gpus_by_gres_where_the_profile_says_so() -> None:
    text = job_file("gpu-gres", ("pretrain",)).text
    assert "#SBATCH --gres=gpu:h100:8\n" in text and "--gpus-per-node" not in text
    assert "#SBATCH --gpus-per-node=h100:8\n" in job_file("gpu", ("pretrain",)).text


def test_a_job_has_its_gpus_and_the_limits_of_the_node(stub_runs: StubRuns, low_limit: None) -> None:
    """Asked for with ``--gres``; submitted by a shell with a low limit of open files."""
    look = 'echo "sees $CUDA_VISIBLE_DEVICES, $(ulimit -S -n) files, $(ulimit -S -l)/$(ulimit -H -l) locked"'
    run = stub_runs.submit("gres", look, gpus_per_node=2, gpu_option="--gres")
    (status,) = run.wait()
    found = re.search(r"sees (\S+), (\w+) files, (\w+)/(\w+) locked", run.logs())
    assert status.done and found, run.logs()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert len(found[1].split(",")) == 2
    assert found[2] == "unlimited" or int(found[2]) >= min(hard, 65536)
    assert found[3] == found[4]
