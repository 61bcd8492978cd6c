"""The doctor's verdict on a network: what the kernel lists, what NCCL says, and what rate that should give."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from oar_scale.doctor import machine, network
from oar_scale.doctor.network import Links, judge, links_of_node, nccl_choice

ROOT = Path(__file__).resolve().parents[1]
FABRIC = Links((50.0,) * 8, 12.5, verbs=True)
"""8 x 400 Gb/s."""


def kernel(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return str(folder)


def test_active_rdma_ports_and_real_interfaces_are_counted(tmp_path: Path) -> None:
    ports = {
        "infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)",
        "infiniband/mlx5_0/ports/1/state": "4: ACTIVE",
        "infiniband/mlx5_1/ports/1/rate": "400 Gb/sec (4X NDR)",
        "infiniband/mlx5_1/ports/1/state": "1: DOWN",
        "infiniband/rdmap79s0/ports/1/rate": "200 Gb/sec (4X HDR)",
        "infiniband/rdmap79s0/ports/1/state": "4: ACTIVE",
        "net/eth0/speed": "100000",
        "net/eth0/device/vendor": "0x15b3",
        "net/eth1/speed": "-1",
        "net/eth1/device/vendor": "0x15b3",
        "net/veth12/speed": "999999",
        "net/bond-ib/speed": "200000",
        "net/bond-ib/bonding/mode": "active-backup 1",
        "net/lo/operstate": "unknown",
    }
    found = links_of_node(kernel(tmp_path, ports))
    assert (found.rdma, found.ethernet, found.capacity) == ((50.0, 25.0), 25.0, 75.0)
    assert str(found) == "2 RDMA ports, 75 GB/s"


def test_a_machine_that_lists_nothing_is_unknown(tmp_path: Path) -> None:
    assert links_of_node(str(tmp_path / "none")).capacity == 0


@pytest.mark.parametrize(
    ("rate", "backend", "chosen", "links", "fault"),
    [
        (2.5, "nccl", "IB", FABRIC, "slow: n1 has 8 RDMA ports, 400 GB/s"),
        (180.0, "nccl", "IB", FABRIC, ""),
        (180.0, "nccl", "Socket", FABRIC, "NCCL talks over sockets, though n1 has 8 RDMA ports, 400 GB/s: NCCL says why"),
        (180.0, "nccl", "", Links((50.0,), 0.0, verbs=False), "n1 has no libibverbs"),
        (3.0, "nccl", "Socket", Links((), 12.5), "slow: n1 has no RDMA port, 12.5 GB/s; name the fast interface in NCCL_SOCKET_IFNAME"),
        (4.0, "nccl", "Socket", Links((), 12.5), ""),
        (0.1, "nccl", "Socket", Links((), 0.125), ""),
        (1.9, "nccl", "", Links(), "slow"),
        (2.1, "nccl", "", Links(), ""),
        (0.06, "gloo", "", FABRIC, ""),
        (0.04, "gloo", "", FABRIC, "GLOO_SOCKET_IFNAME"),
        (0.04, "gloo", "", Links((), 0.125), ""),
    ],
)
def test_a_rate_is_judged_by_what_is_there(rate: float, backend: str, chosen: str, links: Links, fault: str) -> None:
    said = judge(rate, backend, chosen, [("n1", links), ("n2", FABRIC)])
    assert fault in said and bool(fault) == bool(said)


def test_one_node_is_not_judged_by_its_ports() -> None:
    assert judge(20.0, "nccl", "Socket", [("n1", FABRIC)]) == ""
    assert "slow" in judge(1.0, "nccl", "", [("n1", FABRIC)])


def test_nccls_choice_is_read_from_what_it_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE"):
        monkeypatch.setenv(name, "WARN")
    with nccl_choice() as chosen:
        assert os.environ["NCCL_DEBUG"] == "INFO"
        Path(os.environ["NCCL_DEBUG_FILE"]).write_text(
            "n1:7:7 [0] NCCL INFO NET/IB : No device found.\nn1:7:7 [0] NCCL INFO Using network Socket\n"
        )
    assert chosen == ["Socket"]
    with nccl_choice() as chosen:
        pass
    assert chosen == []


def test_a_limit_of_locked_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "links_of_node", lambda: FABRIC)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    (finding,) = network.locked_memory()
    assert finding.status == "warn" and "only 64 KiB may be locked" in finding.text
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, resource.RLIM_INFINITY))
    assert next(network.locked_memory()).status == "ok"


@pytest.mark.parametrize(
    ("release", "built", "status"), [("13.2", "13.2", "ok"), ("12.8", "13.2", "warn"), ("13.0", "13.2", "warn"), ("12.6", "12.8", "ok")]
)
def test_another_cuda_toolkit_than_torchs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, built: str, status: str
) -> None:
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.61'\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", built)
    (finding,) = machine.cuda_toolkit()
    assert finding.status == status and (status == "ok" or f"module load cuda/{built}" in finding.text)


def test_profile_and_image_have_the_toolkit_of_the_pinned_torch() -> None:
    built = torch.version.cuda
    if built is None:
        pytest.skip("this torch is one without CUDA")
    assert f"module load cuda/{built} " in (ROOT / "cluster" / "slurm" / "gpu.yaml").read_text()
    assert f"ARG CUDA={built}." in (ROOT / "cluster" / "Dockerfile").read_text()
