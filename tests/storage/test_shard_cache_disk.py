"""The cache's files, whatever the disk and the other processes do: on a real S3 server behind a proxy."""

from __future__ import annotations

import fcntl
import logging
import os
import pickle
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from oar_scale.storage import FetchStats, cache_folder, s3_ranges
from oar_scale.storage.shard_cache import ShardCache
from tests.fault_proxy import FaultProxy
from tests.shard_files import FORK, PART, PARTS, SIZE, Shard, content, files, in_processes, put


def test_processes_that_miss_the_same_shard_share_one_download(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
    def work() -> tuple[bool, FetchStats]:
        return cache.read(*shard) == content(0), cache.stats

    proxy.spoil({"trickle": 1.0}, at_most=1)  # long enough for all to come
    results = in_processes([work] * 3)
    assert all(right for right, _ in results)
    assert len(proxy.gets) == PARTS
    assert sum(took.requests for _, took in results) == PARTS and sum(took.hits for _, took in results) == 2


def test_the_shard_that_nobody_read_for_the_longest_goes_first(proxy: FaultProxy, s3_root: str, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), max_bytes=3 * SIZE + 10)
    shards = [put(s3_root, content(number)) for number in range(4)]
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
    shards = [put(s3_root, content(number, size)) for number in range(10)]
    cache = ShardCache(folder, bound)

    def work(seed: int) -> FetchStats:
        chosen = random.Random(seed)
        for _ in range(40):
            number = chosen.randrange(len(shards))
            assert cache.read(*shards[number]) == content(number, size)
        return cache.stats

    def watch() -> int:
        os.makedirs(folder, exist_ok=True)
        most = 0
        with open(os.path.join(folder, ".lock"), "w") as lock:
            while not (tmp_path / "done").exists():
                fcntl.flock(lock, fcntl.LOCK_EX)  # else a file could be counted under its old and its new name
                most = max(most, sum(_size(entry) for entry in os.scandir(folder)))
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(0.001)
        return most

    def work_all() -> list[FetchStats]:
        try:
            return in_processes([lambda seed=seed: work(seed) for seed in range(4)])
        finally:
            (tmp_path / "done").touch()

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
    path = os.path.join(cache._folder.folder, files(cache._folder.folder)[0])
    for damage in (b"X" * SIZE, content(0)[:-1], content(0) + b"x", b""):
        Path(path).write_bytes(damage)
        fresh = ShardCache(cache._folder.folder)
        assert fresh.read(*shard) == content(0)
        assert fresh.stats == FetchStats(requests=PARTS, bytes=SIZE)
        assert Path(path).read_bytes() == content(0)


def test_a_killed_reader_leaves_no_broken_copy_and_no_lock(
    proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_ranges, "STALL_S", 300.0)
    proxy.stall_s = 300.0
    proxy.spoil({"stall": 1.0}, at_most=1)
    victim = FORK.Process(target=lambda: cache.read(*shard))
    victim.start()
    assert victim.pid is not None
    while not proxy.injected["stall"] or len(proxy.gets) < PARTS:
        time.sleep(0.01)
    folder = cache._folder.folder
    assert len(files(folder, ".part")) == 1
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    proxy.wake()
    assert files(folder) == []
    unused = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: pytest.fail("it waits for the dead"))
    monkeypatch.setattr(cache_folder, "time", unused)
    assert cache.read(*shard) == content(0)
    assert sorted(os.listdir(folder)) == [".lock", *files(folder)] and len(files(folder)) == 1


@pytest.fixture
def hanging(proxy: FaultProxy, shard: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> Shard:
    """A shard whose prefetch by the cache gets no answer until the proxy wakes."""
    monkeypatch.setattr(s3_ranges, "STALL_S", 300.0)
    proxy.stall_s = 300.0
    proxy.spoil({"stall": 1.0}, at_most=1)
    cache.prefetch(*shard)
    while not proxy.injected["stall"]:
        time.sleep(0.01)
    return shard


def test_nobody_waits_for_ever_for_a_reader_that_hangs(
    proxy: FaultProxy, hanging: Shard, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "STUCK_S", 1.0)
    other = pickle.loads(pickle.dumps(cache))
    assert other.read(*hanging) == content(0)
    assert other.stats == FetchStats(requests=PARTS, bytes=SIZE, fallbacks=1)
    proxy.wake()
    assert cache.read(*hanging) == content(0)


def test_what_a_killed_reader_left_makes_room_for_others(proxy: FaultProxy, shard: Shard, tmp_path: Path) -> None:
    (tmp_path / "0123.part").write_bytes(bytes(SIZE))
    cache = ShardCache(str(tmp_path), max_bytes=SIZE + 1)
    assert cache.read(*shard) == content(0)
    assert cache.stats.fallbacks == 0
    assert files(str(tmp_path), ".part") == []


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
    cache, other = ShardCache(small_disk), put(s3_root, content(1))
    with caplog.at_level(logging.WARNING):
        kept, half, again = cache.read(*shard), cache.read(*other), cache.read(*other)
    assert kept == content(0) and half == again == content(1)
    assert cache.stats == FetchStats(requests=3 * PARTS, bytes=3 * SIZE, fallbacks=2)
    assert len(files(small_disk)) == 1 and files(small_disk, ".part") == []
    assert caplog.text.count("No space left on device") == 1
    assert cache.read(*shard) == content(0) and cache.stats.hits == 1


def test_a_file_that_may_not_grow_sends_the_bytes_to_memory(proxy: FaultProxy, shard: Shard, cache: ShardCache) -> None:
    def work() -> tuple[bool, FetchStats]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (PART, PART))
        return cache.read(*shard) == content(0), cache.stats

    assert in_processes([work]) == [(True, FetchStats(requests=PARTS, bytes=SIZE, fallbacks=1))]
    assert os.listdir(cache._folder.folder) == [".lock"]


def test_a_disk_that_fills_up_in_the_middle_loses_no_byte(
    proxy: FaultProxy, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(5, 1 << 20)
    shard, cache = put(s3_root, data), ShardCache(str(tmp_path / "cache"))
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
    cache, other = ShardCache(small_disk), put(s3_root, content(1))
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


def test_a_fork_in_the_middle_of_a_prefetch_reads_on(proxy: FaultProxy, hanging: Shard, s3_root: str, cache: ShardCache) -> None:
    other = put(s3_root, content(1))

    def work() -> tuple[bool, FetchStats]:
        return cache.read(*other) == content(1), cache.stats

    assert in_processes([work]) == [(True, FetchStats(requests=PARTS, bytes=SIZE))]
    assert len(files(cache._folder.folder, ".part")) == 1  # the parent is still at it
    proxy.wake()
    assert cache.read(*hanging) == content(0)
