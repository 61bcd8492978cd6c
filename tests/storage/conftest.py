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


@pytest.fixture
def renewed(proxy: FaultProxy, shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The proxy, for clients whose profile has yesterday's keys until the first fault is injected; the shard is written before."""
    profile = tmp_path / "credentials"

    def renew(key: str, secret: str) -> None:
        profile.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")

    good = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    renew("yesterday", "nobody")
    proxy.on_fault = lambda kind: renew(*good)
    return proxy
