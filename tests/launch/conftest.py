"""A real Slurm of two nodes: on loopback for most tests, with hosts of their own for those that lose one. A real Ray of two."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.dev import hosts
from cluster.dev import ray as dev_ray
from cluster.dev import slurm as dev_slurm

CPUS = 16
"""Counted, not there: all jobs of a test run at once."""


def unable(reason: str) -> None:
    """Skip, but not where everything is meant to be there: OAR_NO_SKIP=1."""
    if os.environ.get("OAR_NO_SKIP") == "1":
        pytest.fail(f"nothing may be skipped here (OAR_NO_SKIP=1): {reason}")
    pytest.skip(reason)


def needs_slurm() -> None:
    for program in dev_slurm.PROGRAMS:
        if dev_slurm._program(program) is None:
            unable(f"Slurm is not installed ({program}): {dev_slurm.PACKAGES}")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dev_slurm.Cluster]:
    """SLURM_CONF points at it."""
    with _on_loopback(str(tmp_path_factory.mktemp("slurm"))) as cluster:
        yield cluster


@pytest.fixture
def own_slurm(tmp_path: Path) -> Iterator[dev_slurm.Cluster]:
    """One that a test may spoil; SLURM_CONF points at it meanwhile."""
    with _on_loopback(str(tmp_path / "slurm")) as cluster:
        yield cluster


@contextmanager
def _on_loopback(folder: str) -> Iterator[dev_slurm.Cluster]:
    needs_slurm()
    try:
        cluster = dev_slurm.up(folder, cpus=CPUS, port=dev_slurm.free_port())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
            for name, value in cluster.env.items():
                patch.setenv(name, value)
            yield cluster
    finally:
        dev_slurm.down(folder)


@pytest.fixture(scope="session")
def hosts_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dev_slurm.Cluster]:
    """Each node with a network and processes of its own; put ``cluster.prefix`` before what is to reach it."""
    needs_slurm()
    if reason := hosts.missing():
        unable(reason)
    folder = str(tmp_path_factory.mktemp("hosts"))
    try:
        yield dev_slurm.up(folder, cpus=CPUS, isolated=True)
    finally:
        dev_slurm.down(folder)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dev_ray.Cluster]:
    """Two nodes of one CPU, with the Jobs API; who loses the second one adds another."""
    folder = str(tmp_path_factory.mktemp("ray"))
    try:
        yield dev_ray.up(folder, nodes=2, cpus=1, port=dev_ray.free_port())
    finally:
        dev_ray.down(folder)


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the PATH of jobs whose ``oar`` is a shell script: the one that the variable BEHAVIOUR names."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "oar").write_text('#!/bin/bash\n. "$BEHAVIOUR"\n')
    (folder / "oar").chmod(0o755)
    return folder
