"""Shards arrive whole and right whatever the network, the disk and the other processes do: on a real S3 server behind a proxy."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crc32c import crc32c

from oar_scale.errors import UserError
from oar_scale.storage import FetchStats, Missing, cache_folder, join, open_storage, s3_download, s3_ranges
from oar_scale.storage.shard_cache import ShardCache
from tests.fault_proxy import FaultProxy

PART = 128 << 10
SIZE = 300_000
PARTS = 3
FORK = multiprocessing.get_context("fork")


class Shard(NamedTuple):
    """Unpacks to the arguments of ``read``."""

    uri: str
    size: int
    crc32c: int


@pytest.fixture(scope="module")
def faults(s3_root: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]))
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(faults: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The clients of this test talk to the server through it; parts and patience are small."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
    monkeypatch.setattr(s3_download, "PART_BYTES", PART)
    monkeypatch.setattr(s3_ranges, "STALL_S", 1.5)  # above what a busy machine needs to answer
    monkeypatch.setattr(s3_ranges, "BACKOFF_S", 0.01)
    faults.reset(seed=3)
    return faults


@pytest.fixture
def shard(proxy: FaultProxy, s3_root: str) -> Shard:
    return _put(s3_root, content(0))


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(str(tmp_path / "cache"))


def content(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def _put(root: str, data: bytes) -> Shard:
    uri = join(root, f"{uuid.uuid4().hex}.tar")
    open_storage(uri).write(uri, data)
    return Shard(uri, len(data), crc32c(data))


def _files(folder: str, suffix: str = ".shard") -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(suffix))


def _in_processes(works: list[Callable[[], Any]]) -> list[Any]:
    """What each returns, each in a fork of its own, all at once."""
    pipes = []
    for work in works:
        here, there = FORK.Pipe(duplex=False)
        process = FORK.Process(target=lambda work=work, there=there: there.send(work()), daemon=True)
        process.start()
        there.close()
        pipes.append((here, process))
    results = [here.recv() for here, _ in pipes]
    for _, process in pipes:
        process.join(10)
    return results


def test_a_shard_is_fetched_once_and_then_read_from_the_disk_without_a_request(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
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
    kind: str, count: int, retries: int, proxy: FaultProxy, shard: Shard, cache: ShardCache
) -> None:
    proxy.spoil({kind: 1.0}, at_most=count)
    assert cache.read(*shard) == content(0)
    assert proxy.injected == {kind: count}
    assert cache.stats.retries == retries
    assert cache.stats.requests == len(proxy.gets) == PARTS + retries
    assert cache.stats.resumed == (count if kind in ("reset", "cut", "stall") else 0)
    assert _files(cache._folder.folder, ".part") == []


def test_with_a_fifth_of_all_requests_failing_each_shard_arrives_right_and_the_retries_are_counted(
    proxy: FaultProxy, s3_root: str, cache: ShardCache
) -> None:
    shards = [_put(s3_root, content(number)) for number in range(40)]
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
    shard, cache = _put(s3_root, data), ShardCache(str(tmp_path))
    monkeypatch.setattr(s3_download, "PART_BYTES", 16 << 20)  # one part
    proxy.spoil({kind: 1.0}, at_most=6)
    assert cache.read(*shard) == data
    assert proxy.injected[kind] == cache.stats.resumed == cache.stats.retries == 6
    assert cache.stats.bytes == len(data)
    assert proxy.sent < 1.5 * len(data)


def test_a_connection_that_trickles_for_too_long_is_left(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_ranges, "SLOW_S", 0.2)
    proxy.trickle_bytes = 64  # 1.3 kB/s
    proxy.spoil({"trickle": 1.0}, at_most=1)
    begun = time.monotonic()
    assert cache.read(*shard) == content(0)
    assert cache.stats.retries == 1
    assert time.monotonic() - begun < 20  # the rest of it would take 50 s


@pytest.mark.slow
def test_a_stall_of_ten_seconds_is_left_for_a_new_connection(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_ranges, "STALL_S", 8.0)
    proxy.spoil({"stall": 1.0}, at_most=1)
    begun = time.monotonic()
    assert cache.read(*shard) == content(0)
    assert cache.stats.resumed == 1
    assert 8 < time.monotonic() - begun < 12


def test_a_server_that_stays_overloaded_is_given_up_with_the_name_and_the_count(
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
    proxy: FaultProxy, shard: Shard, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "credentials"

    def renew(key: str, secret: str) -> None:
        profile.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")

    good = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.setattr(s3_download, "CONNECTIONS", 1)
    renew("yesterday", "nobody")
    proxy.on_fault = lambda kind: renew(*good)
    proxy.spoil({"expired": 1.0}, at_most=1)
    assert cache.read(*shard) == content(0)
    assert cache.stats.retries == proxy.injected["expired"] == 1


def test_credentials_that_stay_expired_are_a_clear_error(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_download, "CONNECTIONS", 1)
    proxy.spoil({"expired": 1.0})
    with pytest.raises(UserError, match="the S3 credentials have expired") as caught:
        cache.read(*shard)
    assert str(caught.value).startswith(shard.uri) and "AWS_SESSION_TOKEN" in str(caught.value)


def test_an_object_that_is_not_the_one_of_the_manifest_is_named_with_both_checksums(
    proxy: FaultProxy, shard: Shard, cache: ShardCache
) -> None:
    with pytest.raises(UserError) as caught:
        cache.read(shard.uri, shard.size, 0x12345678)
    assert shard.uri in str(caught.value) and f"{shard.crc32c:08x}" in str(caught.value) and "12345678" in str(caught.value)
    assert len(proxy.gets) == 2 * PARTS
    for wrong in (SIZE - 1, SIZE + 1):
        with pytest.raises(UserError, match=f"and {wrong} were expected|and {shard.crc32c:08x} was expected"):
            cache.read(shard.uri, wrong, shard.crc32c)
        with pytest.raises(UserError, match=f"{SIZE} bytes, and {wrong} were expected"):
            cache.read(shard.uri, wrong)
    assert _files(cache._folder.folder) == _files(cache._folder.folder, ".part") == []


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


def test_an_object_that_is_replaced_between_two_parts_is_read_again_from_its_start(
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
    assert cache.stats.retries == 1 + PARTS  # asked for its version, and read, a second time


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


def test_a_prefetched_shard_is_fetched_once_and_its_error_waits_for_the_reader(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
    cache.prefetch(*shard)
    cache.prefetch(*shard)
    assert cache.read(*shard) == content(0)
    assert cache.stats == FetchStats(requests=PARTS, bytes=SIZE)
    cache.prefetch(shard.uri + "x", 5, 5)
    with pytest.raises(Missing):
        cache.read(shard.uri + "x", 5, 5)


def test_processes_that_miss_the_same_shard_share_one_download(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
    def work() -> tuple[bool, FetchStats]:
        return cache.read(*shard) == content(0), cache.stats

    proxy.spoil({"trickle": 1.0}, at_most=1)  # long enough for all to come
    results = _in_processes([work] * 3)
    assert all(right for right, _ in results)
    assert len(proxy.gets) == PARTS
    assert sum(took.requests for _, took in results) == PARTS and sum(took.hits for _, took in results) == 2


def test_the_shard_that_nobody_read_for_the_longest_goes_first(proxy: FaultProxy, s3_root: str, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), max_bytes=3 * SIZE + 10)
    shards = [_put(s3_root, content(number)) for number in range(4)]
    for number in (0, 1, 2, 0, 3):
        assert cache.read(*shards[number]) == content(number)
        time.sleep(0.02)  # the clock of the file system ticks every few milliseconds
    evicted = cache.read(*shards[0])
    assert cache.stats.hits == 2
    cache.read(*shards[1])
    assert cache.stats.hits == 2
    assert evicted == content(0)


def test_four_processes_never_hold_more_than_the_bound(proxy: FaultProxy, s3_root: str, tmp_path: Path) -> None:
    size, folder = 60_000, str(tmp_path / "cache")
    bound = 5 * size + 1
    shards = [_put(s3_root, content(number, size)) for number in range(10)]
    cache = ShardCache(folder, bound)

    def work(seed: int) -> FetchStats:
        chosen = random.Random(seed)
        for _ in range(40):
            number = chosen.randrange(len(shards))
            assert cache.read(*shards[number]) == content(number, size)
        return cache.stats

    def watch() -> int:
        os.makedirs(folder, exist_ok=True)
        most, until = 0, time.monotonic() + 60
        with open(os.path.join(folder, ".lock"), "w") as lock:
            while time.monotonic() < until and not (tmp_path / "done").exists():
                fcntl.flock(lock, fcntl.LOCK_EX)  # else a file could be counted under its old and its new name
                most = max(most, sum(_size(entry) for entry in os.scandir(folder)))
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(0.001)
        return most

    def work_all() -> list[FetchStats]:
        took = _in_processes([lambda seed=seed: work(seed) for seed in range(4)])
        (tmp_path / "done").touch()
        return took

    with ThreadPoolExecutor(1) as pool:
        most = pool.submit(watch)
        took = work_all()
    assert 3 * size < most.result() <= bound
    assert sum(stats.fallbacks for stats in took) == 0 and sum(stats.hits for stats in took) > 10


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_shard_larger_than_the_bound_is_read_all_the_same(
    proxy: FaultProxy, shard: Shard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(str(tmp_path), max_bytes=SIZE - 1)
    with caplog.at_level(logging.WARNING):
        assert cache.read(*shard) == cache.read(*shard) == content(0)
    assert cache.stats.fallbacks == 2 and len(proxy.gets) == 2 * PARTS
    assert caplog.text.count(str(tmp_path)) == 1 and "do not fit" in caplog.text
    assert os.listdir(tmp_path) == [".lock"]


def test_a_damaged_copy_is_dropped_and_fetched_again(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
    cache.read(*shard)
    path = os.path.join(cache._folder.folder, _files(cache._folder.folder)[0])
    for damage in (b"X" * SIZE, content(0)[:-1], content(0) + b"x", b""):
        Path(path).write_bytes(damage)
        fresh = ShardCache(cache._folder.folder)
        assert fresh.read(*shard) == content(0)
        assert fresh.stats == FetchStats(requests=PARTS, bytes=SIZE)
        assert Path(path).read_bytes() == content(0)


def test_a_reader_killed_in_the_middle_leaves_no_broken_copy_and_no_lock(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_ranges, "STALL_S", 30.0)
    proxy.stall_s = 30.0
    proxy.spoil({"stall": 1.0}, at_most=1)
    victim = FORK.Process(target=lambda: cache.read(*shard))
    victim.start()
    assert victim.pid is not None
    while not proxy.injected["stall"] or len(proxy.gets) < PARTS:
        time.sleep(0.01)
    folder = cache._folder.folder
    assert len(_files(folder, ".part")) == 1
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    proxy.wake()
    assert _files(folder) == []
    begun = time.monotonic()
    assert cache.read(*shard) == content(0)
    assert time.monotonic() - begun < 10  # nobody waits for the dead
    assert sorted(os.listdir(folder)) == [".lock", *_files(folder)] and len(_files(folder)) == 1


def test_nobody_waits_for_ever_for_a_reader_that_hangs(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "STUCK_S", 1.0)
    monkeypatch.setattr(s3_ranges, "STALL_S", 60.0)
    proxy.stall_s = 60.0
    proxy.spoil({"stall": 1.0}, at_most=1)
    cache.prefetch(*shard)
    while not proxy.injected["stall"]:
        time.sleep(0.01)
    other = pickle.loads(pickle.dumps(cache))
    assert other.read(*shard) == content(0)
    assert other.stats == FetchStats(requests=PARTS, bytes=SIZE, fallbacks=1)
    proxy.wake()
    assert cache.read(*shard) == content(0)


def test_what_a_killed_reader_left_makes_room_for_others(proxy: FaultProxy, shard: Shard, tmp_path: Path) -> None:
    (tmp_path / "0123.part").write_bytes(bytes(SIZE))
    cache = ShardCache(str(tmp_path), max_bytes=SIZE + 1)
    assert cache.read(*shard) == content(0)
    assert cache.stats.fallbacks == 0
    assert _files(str(tmp_path), ".part") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[str]:
    """A file system of 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "oar-test", disk], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield str(disk)
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_sends_the_bytes_to_memory(
    proxy: FaultProxy, shard: Shard, s3_root: str, small_disk: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache, other = ShardCache(small_disk), _put(s3_root, content(1))
    with caplog.at_level(logging.WARNING):
        kept, half, again = cache.read(*shard), cache.read(*other), cache.read(*other)
    assert kept == content(0) and half == again == content(1)
    assert cache.stats == FetchStats(requests=3 * PARTS, bytes=3 * SIZE, fallbacks=2)
    assert len(_files(small_disk)) == 1 and _files(small_disk, ".part") == []
    assert caplog.text.count("No space left on device") == 1
    assert cache.read(*shard) == content(0) and cache.stats.hits == 1


def test_a_file_that_may_not_grow_sends_the_bytes_to_memory(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
    def work() -> tuple[bool, FetchStats]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (PART, PART))
        return cache.read(*shard) == content(0), cache.stats

    assert _in_processes([work]) == [(True, FetchStats(requests=PARTS, bytes=SIZE, fallbacks=1))]
    assert os.listdir(cache._folder.folder) == [".lock"]


def test_a_disk_that_fills_up_in_the_middle_loses_no_byte(
    proxy: FaultProxy, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(5, 1 << 20)
    shard, cache = _put(s3_root, data), ShardCache(str(tmp_path / "cache"))
    write, written = os.pwrite, [0]

    def pwrite(descriptor: int, block: bytes, offset: int) -> int:
        if written[0] > 400_000:
            raise OSError(28, "No space left on device")
        done = write(descriptor, block[:10_000], offset)  # a write may take less than it was given
        written[0] += done
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert cache.read(*shard) == data
    assert cache.stats == FetchStats(requests=8, bytes=len(data), fallbacks=1)
    assert os.listdir(tmp_path / "cache") == [".lock"]


def test_a_cache_that_may_only_be_read_is_read(proxy: FaultProxy, shard: Shard, s3_root: str, small_disk: str) -> None:
    ShardCache(small_disk).read(*shard)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    cache, other = ShardCache(small_disk), _put(s3_root, content(1))
    assert cache.read(*shard) == content(0)
    assert cache.read(*other) == content(1)
    assert cache.stats == FetchStats(requests=PARTS, bytes=SIZE, hits=1, fallbacks=1)


def test_a_folder_that_cannot_be_made_sends_the_bytes_to_memory(proxy: FaultProxy, shard: Shard, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = ShardCache(str(tmp_path / "file" / "cache"))
    assert cache.read(*shard) == content(0)
    assert cache.stats.fallbacks == 1


def test_a_cache_can_be_pickled_and_counts_anew(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
    cache.read(*shard)
    other = pickle.loads(pickle.dumps(cache))
    assert other.stats == FetchStats()
    assert other.read(*shard) == content(0) and other.stats.hits == 1


def test_a_fork_in_the_middle_of_a_prefetch_reads_on(
    proxy: FaultProxy, shard: Shard, s3_root: str, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _put(s3_root, content(1))
    monkeypatch.setattr(s3_ranges, "STALL_S", 60.0)
    proxy.stall_s = 60.0
    proxy.spoil({"stall": 1.0}, at_most=1)
    cache.prefetch(*shard)
    while not proxy.injected["stall"]:
        time.sleep(0.01)

    def work() -> tuple[bool, FetchStats]:
        return cache.read(*other) == content(1), cache.stats

    assert _in_processes([work]) == [(True, FetchStats(requests=PARTS, bytes=SIZE))]
    assert len(_files(cache._folder.folder, ".part")) == 1  # the parent is still at it
    proxy.wake()
    assert cache.read(*shard) == content(0)
