"""What pools write beside their results, on a folder and on a real S3 server: one winner of each claim, and a true status."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from fake_clock import FakeClock
from waiting import wait_until

from oar_scale.errors import UserError
from oar_scale.shard_pool import Bounds, leases, pool_run, run_pool
from oar_scale.shard_pool import pool_status as pool_status
from oar_scale.shard_pool.leases import Lease, LeaseWatch, read_leases
from oar_scale.shard_pool.ledger import Ledger, LedgerEntry, Record
from oar_scale.shard_pool.pool_run import _bounds, _last_seconds
from oar_scale.shard_pool.pool_status import read_status, status_lines
from oar_scale.storage import join, open_storage


@pytest.fixture(params=["folder", "s3"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    root = str(tmp_path) if request.param == "folder" else f"{request.getfixturevalue('s3_root')}/{uuid.uuid4().hex[:8]}"
    return Ledger(join(root, "ledger"))


def test_of_many_who_claim_a_shard_one_holds_it(ledger: Ledger) -> None:
    claims: list[str] = []
    threads = [threading.Thread(target=lambda name=f"pool{i}": claims.append(ledger.claim("a/0.tar", 0, name).holder)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claims) == 8 and len(set(claims)) == 1
    assert ledger.claims()["a/0.tar"].holder == claims[0]


def test_the_highest_claim_counts_until_it_is_released(ledger: Ledger) -> None:
    ledger.claim("0.tar", 0, "dead")
    second = ledger.claim("0.tar", 1, "alive")
    assert ledger.claims() == {"0.tar": second}
    assert ledger.claim("0.tar", 0, "late").holder == "dead"
    ledger.release(second)
    assert not ledger.claims()


def test_a_shard_is_entered_once_and_read_as_it_was_entered(ledger: Ledger) -> None:
    first = LedgerEntry({"images": 3}, {"actor": "a:1", "seconds": 1.5})
    assert ledger.enter("0.tar", first)
    assert not ledger.enter("0.tar", LedgerEntry({"images": 3}, {"actor": "b:2", "seconds": 0.5}))
    assert ledger.entries(["1.tar", "0.tar"]) == {"0.tar": first}
    assert ledger.done() == {"0.tar"}


def test_an_entry_of_an_older_version_counts(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger/0.tar.json").write_text(json.dumps({"shard": "0.tar", "facts": {"images": 3}}))
    assert Ledger(str(tmp_path / "ledger")).entries(["0.tar"]) == {"0.tar": LedgerEntry({"images": 3})}


DAMAGED = (b"", b'{"facts": {"ima', b"[]", b"{}")
"""What is left of a record where a disk was full or a server lost power."""


def test_a_damaged_entry_is_an_unfinished_shard(ledger: Ledger) -> None:
    entry, storage = LedgerEntry({"images": 3}), open_storage(ledger.uri)
    for data in DAMAGED:
        storage.write(join(ledger.uri, "0.tar.json"), data)
        assert ledger.entry("0.tar") is None and not ledger.entries(["0.tar"])
        assert ledger.damaged(["0.tar", "1.tar"], {})["0.tar"].startswith("its ledger entry is damaged")
        assert ledger.enter("0.tar", entry), "the damaged entry stayed"
        assert ledger.entries(["0.tar"]) == {"0.tar": entry} and not ledger.damaged(["0.tar"], {"0.tar"})
        assert not ledger.enter("0.tar", LedgerEntry({"images": 4}))


def test_damaged_notes_of_pools_stop_nobody(ledger: Ledger) -> None:
    storage, clock = open_storage(ledger.uri), FakeClock()
    for data in DAMAGED:
        for name in ("claims/0.tar.0", "holders/pool1.000003", "poison/0.tar"):
            storage.write(join(ledger.pool_folder, f"{name}.json"), data)
        watch = LeaseWatch(ledger, lease_s=60, clock=clock)
        watch.poll()
        claim = ledger.claim("0.tar", 0, "me")
        assert claim.holder == "" == ledger.claims()["0.tar"].holder, "nobody knows whose it was"
        assert not watch.alive() and not watch.expired(claim.holder)
        clock.now += 61
        assert watch.expired(claim.holder), "nobody could ever take the shard over"
        assert not ledger.poison() and not read_leases(ledger) and not read_status(ledger.uri, {"0.tar": 5}).poison


def test_a_damaged_description_of_the_work_is_named(ledger: Ledger) -> None:
    uri = join(ledger.pool_folder, "what.json")
    open_storage(uri).write(uri, b"")
    with pytest.raises(UserError, match=r"ledger-pool/what\.json: this is not JSON, or not all of it .*Delete it"):
        ledger.bind({"model_id": "aa"})


def test_what_a_pool_makes_is_said_once_and_for_all(ledger: Ledger) -> None:
    ledger.bind({"model_id": "aa", "settings_id": "bb"})
    ledger.bind({"model_id": "aa", "settings_id": "bb"})
    with pytest.raises(UserError, match=r"made with settings_id bb, now it is cc\.\n.*remove this folder, or write into another"):
        ledger.bind({"model_id": "aa", "settings_id": "cc"})


def test_a_lease_is_valid_while_it_is_renewed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """It expires at once when its pool ends, and no claim and no old heartbeat is left."""
    clock = FakeClock()
    monkeypatch.setattr(leases, "LAST_HEARTBEAT_S", 600.0)  # no heartbeat on its way as the pool ends comes after its end
    watch, folder = LeaseWatch(ledger, lease_s=60, clock=clock), join(ledger.pool_folder, "holders")
    with Lease(ledger, lambda: {"actors": 2}, heartbeat_s=0.1) as lease:
        claim = ledger.claim("0.tar", 0, lease.holder)
        for _ in range(4):
            watch.poll()
            assert not watch.expired(lease.holder)
            clock.now += 50  # less than the lease for each beat, more for two
            before = max(open_storage(folder).list(folder), default="")
            wait_until(lambda before=before: max(open_storage(folder).list(folder), default="") not in ("", before))
        assert watch.alive()[lease.holder]["pid"] == os.getpid()
        assert ledger.claims() == {"0.tar": claim}
    watch.poll()
    assert watch.expired(lease.holder) and not watch.alive()
    assert not ledger.claims(), "it kept what it had claimed"
    names = open_storage(ledger.pool_folder).list(folder)
    assert [name.rsplit("/", 1)[1] for name in names] == [f"{lease.holder}.ended.json"], "old heartbeats were left behind"


def test_a_lease_without_any_heartbeat_expires(tmp_path: Path) -> None:
    clock = FakeClock()
    watch = LeaseWatch(Ledger(str(tmp_path / "ledger")), lease_s=60, clock=clock)
    watch.poll()
    assert not watch.expired("nobody")
    clock.now += 59
    assert not watch.expired("nobody")
    clock.now += 2
    assert watch.expired("nobody")


def test_the_status_counts_shards_and_names_slow_actors(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    now, sizes = time.time(), {f"{index}.tar": 100 for index in range(10)}
    monkeypatch.setattr(pool_status, "time", SimpleNamespace(time=lambda: now))  # whatever the storage takes
    for index, (actor, seconds) in enumerate([("fast:1", 10), ("fast:2", 10), ("slow:3", 40), ("fast:1", 10)]):
        work = {"actor": actor, "seconds": seconds, "finished": now - 10 * index, "attempt": 1}
        ledger.enter(f"{index}.tar", LedgerEntry({}, work))
    ledger.mark_poison("4.tar", "4.tar: sample 'cat' has no codes\nTraceback", "me")
    ledger.mark_poison("3.tar", "done since", "me")
    with Lease(ledger, lambda: {"actors": 3, "actor_seconds": 100.0, "retries": 2}, heartbeat_s=10) as lease:
        ledger.claim("5.tar", 0, lease.holder)
        ledger.claim("6.tar", 0, "somebody who is gone")
        status = read_status(ledger.uri, sizes)
    assert (len(status.done), status.images_done, status.images) == (4, 400, 1000)
    assert status.images_per_s == pytest.approx(400 / 60, rel=0.1)  # the slow one began 60 s ago
    assert (status.actor_seconds, status.busy_seconds) == (100.0, 70.0)
    assert (list(status.in_progress), list(status.poison)) == (["5.tar"], ["4.tar"])
    assert next(iter(status.ms_per_image.items())) == ("slow:3", 400.0)
    text = "\n".join(status_lines(status, "orders/train"))
    for expected in (
        "4 of 10 shards, 400 of 1000 images (40.0 %)",
        "images/s, 1 min",
        "3 actors, since 0 s; 2 retries",
        "70 % of it in finished shards",
    ):
        assert expected in text
    for expected in ("slow:3 400.0 ms/image (4.00 x the median)", "poison    4.tar: 4.tar: sample 'cat' has no codes", "5.tar ("):
        assert expected in text
    after = "\n".join(status_lines(read_status(ledger.uri, sizes), "orders/train"))
    assert "none running; the same command resumes from here" in after and "left" not in after


def test_the_status_of_nothing_is_nothing(tmp_path: Path) -> None:
    lines = status_lines(read_status(str(tmp_path / "ledger"), {"0.tar": 5}), "orders")
    assert lines[0] == "orders: 0 of 1 shards, 0 of 5 images (0.0 %)"
    assert not (tmp_path / "ledger").exists()


def test_leases_that_ended_keep_what_they_cost(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger"))
    for seconds in (10.0, 5.0):
        with Lease(ledger, lambda seconds=seconds: {"actor_seconds": seconds}, heartbeat_s=10):
            pass
    assert sorted(record["actor_seconds"] for record in read_leases(ledger).values()) == [5.0, 10.0]
    assert read_status(ledger.uri, {}).actor_seconds == 15.0


def test_actors_on_gpus_are_as_many_as_a_machine_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert _bounds(Bounds(1, 8), 100, 1, 1, gpus=2) == Bounds(1, 2)
    assert _bounds(Bounds(1, 8), 100, 1, 0.4, gpus=2) == Bounds(1, 4)  # an actor's share lies on one GPU
    assert _bounds(4, 1, 1, 1, gpus=1) == Bounds(1, 1)
    monkeypatch.setattr(pool_run, "_gpus", lambda: 1)
    with pytest.raises(
        UserError, match=r"4 actors with 1 GPUs each do not fit on this machine, which has 1 GPUs\.\nAsk for 1 \(extract\.actors"
    ):
        run_pool(dict, ["0", "1", "2", "3"], str(tmp_path / "ledger"), actors=4, gpus_per_actor=1, config={"model_id": "a"})
    assert not list(tmp_path.iterdir()), "something was written"
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    assert _bounds(Bounds(4, 8), 100, 1, 1, gpus=0) == Bounds(4, 8)


def test_the_last_shards_of_earlier_pools_say_what_one_takes() -> None:
    works = [{"seconds": float(index), "finished": 100.0 - index} for index in range(20)]
    assert _last_seconds([LedgerEntry({}, work) for work in works] + [LedgerEntry({})]) == [float(index) for index in range(9, -1, -1)]


def test_a_pool_does_not_seem_dead_when_somebody_sets_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(str(tmp_path / "ledger"))
    with Lease(ledger, lambda: {}, heartbeat_s=10) as lease:
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: 1.0)
        monkeypatch.setattr(time, "time", lambda: 1e9)
        watch = LeaseWatch(ledger, lease_s=60)
        watch.poll()
        assert not watch.expired(lease.holder)


def test_a_heartbeat_that_hangs_does_not_keep_a_pool_from_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, hanging, over, write = Ledger(str(tmp_path / "ledger")), threading.Event(), threading.Event(), leases.write_record

    def stalled(uri: str, record: Record, **options: bool) -> bool:
        if threading.current_thread() is not threading.main_thread():
            hanging.set()
            over.wait()
        return write(uri, record, **options)

    monkeypatch.setattr(leases, "write_record", stalled)
    monkeypatch.setattr(leases, "LAST_HEARTBEAT_S", 0.1)
    with Lease(ledger, lambda: {}, heartbeat_s=0.01) as lease:
        hanging.wait()
    assert lease._thread.is_alive(), "it waited for the heartbeat"
    over.set()
    lease._thread.join()
    assert read_leases(ledger)[lease.holder]["ended"], "a late heartbeat took back that it has ended"
