"""Shards arrive whole and right whatever the network does: on a real S3 server behind a proxy."""

from __future__ import annotations

import errno
import itertools
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from crc32c import crc32c

from oar_scale.errors import Unreachable, UserError
from oar_scale.storage import FetchStats, Missing, open_storage, s3_download, s3_ranges
from oar_scale.storage.s3_client import client
from oar_scale.storage.shard_cache import DamagedShard, ShardCache
from tests.fault_proxy import FaultProxy
from tests.shard_files import PARTS, SIZE, SOON_S, Shard, content, files, put


def test_a_shard_is_fetched_once_then_read_from_the_disk(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
    assert cache.read(*shard) == content(0)
    assert cache.stats == FetchStats(requests=PARTS, bytes=SIZE)
    data = cache.read(*shard)
    assert data == content(0) and data.readonly
    assert cache.stats == FetchStats(requests=PARTS, bytes=SIZE, hits=1)
    assert len(proxy.gets) == PARTS


@pytest.mark.parametrize(
    ("kind", "count", "retries"),
    [
        ("503", 2, 2),
        ("slow down", 2, 2),
        ("refused", 2, 2),
        ("reset", 2, 2),
        ("cut", 2, 2),
        ("stall", 2, 2),
        ("trickle", 2, 0),
        ("expired", 1, 1),
        ("flip", 1, PARTS),  # nobody knows which part is wrong
    ],
)
def test_a_fault_changes_nothing_but_the_count_of_retries(
    kind: str, count: int, retries: int, proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "stall":
        monkeypatch.setattr(s3_ranges, "STALL_S", SOON_S)
    proxy.spoil({kind: 1.0}, at_most=count)
    assert cache.read(*shard) == content(0)
    assert proxy.injected == {kind: count}
    assert cache.stats.retries == retries
    assert cache.stats.requests == len(proxy.gets) == PARTS + retries
    assert cache.stats.resumed == (count if kind in ("reset", "cut", "stall") else 0)
    assert files(cache._folder.folder, ".part") == []


def test_shards_arrive_right_when_a_fifth_of_requests_fails(
    proxy: FaultProxy, s3_root: str, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_ranges, "STALL_S", SOON_S)
    shards = [put(s3_root, content(number)) for number in range(40)]
    proxy.spoil({"503": 0.04, "slow down": 0.01, "refused": 0.04, "reset": 0.04, "cut": 0.04, "stall": 0.01, "flip": 0.02})
    for number, shard in enumerate(shards):
        assert cache.read(*shard) == content(number)
    injected = proxy.injected.total()
    assert injected > 15
    assert cache.stats.requests == len(proxy.gets)
    # One more request for each fault, except a wrong bit: nobody knows in which part it was, so all are fetched again.
    assert cache.stats.retries == injected + (PARTS - 1) * proxy.injected["flip"]
    assert proxy.sent < 1.5 * 40 * SIZE


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_broken_connection_goes_on_where_it_stopped(
    kind: str, proxy: FaultProxy, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(1, 8 << 20)
    shard, cache = put(s3_root, data), ShardCache(str(tmp_path))
    monkeypatch.setattr(s3_download, "PART_BYTES", 16 << 20)  # one part
    proxy.spoil({kind: 1.0}, at_most=6)
    assert cache.read(*shard) == data
    assert proxy.injected[kind] == cache.stats.resumed == cache.stats.retries == 6
    assert cache.stats.bytes == len(data)
    assert proxy.sent < 1.5 * len(data)


def test_a_connection_that_trickles_for_too_long_is_left(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_ranges, "time", SimpleNamespace(monotonic=lambda: 1000.0 + proxy.trickled))  # a second for each chunk
    monkeypatch.setattr(s3_download, "CONNECTIONS", 1)  # no good connection beside it while the time goes by
    proxy.trickle_bytes, proxy.trickle_s = 16, None
    proxy.spoil({"trickle": 1.0}, at_most=1)
    assert cache.read(*shard) == content(0)
    assert cache.stats.retries == 1
    assert s3_ranges.SLOW_S < proxy.trickled < 2 * s3_ranges.SLOW_S  # the rest of it would be thousands of chunks


def test_a_slow_connection_is_kept_after_the_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """There would be nothing left to ask for: the range after the last byte is none."""
    monkeypatch.setattr(s3_ranges, "time", SimpleNamespace(monotonic=itertools.count(step=s3_ranges.SLOW_S + 1).__next__))

    def brought(chunks: list[bytes], length: int) -> list[bytes]:
        body = SimpleNamespace(iter_chunks=lambda size: iter(chunks))
        return list(s3_ranges._chunks({"Body": body, "ContentLength": length}, ranged=False))

    assert brought([b"12345"], 5) == [b"12345"]
    with pytest.raises(s3_ranges._Broken, match="only 5 bytes came"):
        brought([b"12345", b"67890"], 10)


@pytest.mark.slow
def test_a_long_stall_is_left_for_a_new_connection(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 8 s of silence and not before; the silence itself lasts until the test is over."""
    proxy.stall_s = 3600.0
    proxy.on_fault = lambda kind: monkeypatch.setattr(s3_ranges, "STALL_S", 600.0)  # of all connections but this one
    monkeypatch.setattr(s3_ranges, "STALL_S", 8.0)
    monkeypatch.setattr(s3_download, "CONNECTIONS", 1)
    proxy.spoil({"stall": 1.0}, at_most=1)
    begun = time.monotonic()
    assert cache.read(*shard) == content(0)
    assert cache.stats.resumed == cache.stats.retries == 1
    assert time.monotonic() - begun > 8
    assert client(8.0).meta.config.read_timeout == 8.0
    proxy.wake()


def test_an_overloaded_server_is_given_up_with_name_and_count(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(s3_ranges, "TRIES", 3)
    monkeypatch.setattr(s3_download, "CONNECTIONS", 1)
    proxy.spoil({"503": 1.0})
    with pytest.raises(UserError) as caught:
        cache.read(*shard)
    assert str(caught.value).startswith(f"{shard.uri}: given up after 6 requests in ")
    assert proxy.url in str(caught.value)
    proxy.spoil({})
    assert cache.read(*shard) == content(0)
    assert cache.stats.requests == len(proxy.gets)


def test_credentials_that_expire_are_read_again(
    renewed: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_download, "CONNECTIONS", 1)
    renewed.spoil({"expired": 1.0}, at_most=1)
    assert cache.read(*shard) == content(0)
    assert cache.stats.retries == renewed.injected["expired"] == 1


def test_credentials_that_stay_expired_are_a_clear_error(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_download, "CONNECTIONS", 1)
    proxy.spoil({"expired": 1.0})
    with pytest.raises(UserError, match="the S3 credentials have expired") as caught:
        cache.read(*shard)
    assert str(caught.value).startswith(shard.uri) and "AWS_SESSION_TOKEN" in str(caught.value)


@pytest.mark.parametrize(("number", "kind"), [(errno.ESTALE, Unreachable), (errno.EIO, DamagedShard), (errno.EACCES, UserError)])
def test_a_lost_mount_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch, number: int, kind: type[UserError]) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ShardCache, "_open", fail)
    with pytest.raises(UserError) as caught:
        ShardCache("").read("/data/00000.tar")
    assert type(caught.value) is kind


def test_an_object_unlike_the_manifest_is_named_with_checksums(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
    with pytest.raises(UserError) as caught:
        cache.read(shard.uri, shard.size, 0x12345678)
    assert shard.uri in str(caught.value) and f"{shard.crc32c:08x}" in str(caught.value) and "12345678" in str(caught.value)
    assert len(proxy.gets) == 2 * PARTS
    for wrong in (SIZE - 1, SIZE + 1):
        with pytest.raises(UserError, match=f"and {wrong} were expected|and {shard.crc32c:08x} was expected"):
            cache.read(shard.uri, wrong, shard.crc32c)
        with pytest.raises(UserError, match=f"{SIZE} bytes, and {wrong} were expected"):
            cache.read(shard.uri, wrong)
    assert files(cache._folder.folder) == files(cache._folder.folder, ".part") == []


def test_a_plain_read_of_the_storage_survives_the_same_faults(proxy: FaultProxy, shard: Shard) -> None:
    proxy.spoil({"503": 0.3, "reset": 0.3, "cut": 0.2, "flip": 0.2}, at_most=4)
    for _ in range(4):
        assert open_storage(shard.uri).read(shard.uri) == content(0)
    assert proxy.injected.total() == 4
    proxy.spoil({"503": 0.5, "reset": 0.5}, at_most=4)
    for _ in range(4):
        assert open_storage(shard.uri).read(shard.uri, 1000, 200_000) == content(0)[1000:200_000]


def test_a_missing_shard_is_missing(shard: Shard, cache: ShardCache, tmp_path: Path) -> None:
    for uri in (shard.uri + "x", str(tmp_path / "nothing")):
        for known in ((), (5, 5)):
            with pytest.raises(Missing) as caught:
                cache.read(uri, *known)
            assert caught.value.uri == uri


def test_without_a_checksum_a_replaced_object_is_noticed(shard: Shard, cache: ShardCache) -> None:
    assert cache.read(shard.uri) == cache.read(shard.uri) == content(0)
    assert cache.stats == FetchStats(requests=2 + PARTS, bytes=SIZE, hits=1)
    open_storage(shard.uri).write(shard.uri, b"new")
    assert cache.read(shard.uri) == b"new"
    open_storage(shard.uri).write(shard.uri, b"")
    assert cache.read(shard.uri) == cache.read(shard.uri) == b""


def test_an_object_replaced_between_parts_is_read_again(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_download, "CONNECTIONS", 1)
    proxy.trickle_s = 0  # a fault that does nothing but call us

    def replace(kind: str) -> None:
        if len(proxy.gets) == 2:
            open_storage(shard.uri).write(shard.uri, content(9))

    proxy.on_fault = replace
    proxy.spoil({"trickle": 1.0})
    assert cache.read(shard.uri) == content(9)
    assert cache.stats.retries == 1 + PARTS  # its version requested, and its bytes read, a second time


def test_a_local_shard_is_mapped_as_it_lies_and_checked(tmp_path: Path, cache: ShardCache) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content(0))
    assert cache.read(str(path)) == cache.read(str(path), SIZE, crc32c(content(0))) == content(0)
    assert cache.stats == FetchStats()
    assert not os.path.exists(cache._folder.folder)
    with pytest.raises(UserError, match="12345678 was expected") as caught:
        ShardCache("unused").read(str(path), SIZE, 0x12345678)
    assert str(caught.value).startswith(str(path))
    (tmp_path / "empty").touch()
    assert cache.read(str(tmp_path / "empty")) == b""


def test_a_prefetch_fetches_once_and_keeps_its_error(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
    cache.prefetch(*shard)
    cache.prefetch(*shard)
    assert cache.read(*shard) == content(0)
    assert cache.stats == FetchStats(requests=PARTS, bytes=SIZE)
    cache.prefetch(shard.uri + "x", 5, 5)
    with pytest.raises(Missing):
        cache.read(shard.uri + "x", 5, 5)
