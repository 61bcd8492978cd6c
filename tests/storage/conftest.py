"""A shard on a real S3 server, behind a proxy that can spoil the answers, and a cache for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from oar_scale.storage import s3_download, s3_ranges
from oar_scale.storage.shard_cache import ShardCache
from tests.fault_proxy import FaultProxy
from tests.shard_files import PART, Shard, content, put


@pytest.fixture(scope="module")
def faults(s3_root: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]))
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(faults: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The clients of this test talk to the server through it; parts are small. A test that lets it stall sets the time limit."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
    monkeypatch.setattr(s3_download, "PART_BYTES", PART)
    monkeypatch.setattr(s3_ranges, "STALL_S", 60.0)  # a server that is slow now and then is none of the faults that are counted
    monkeypatch.setattr(s3_ranges, "BACKOFF_S", 0.01)
    faults.reset(seed=3)
    faults.stall_s = 120.0
    return faults


@pytest.fixture
def shard(proxy: FaultProxy, s3_root: str) -> Shard:
    return put(s3_root, content(0))


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(str(tmp_path / "cache"))
