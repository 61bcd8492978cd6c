"""What pools write beside their results, on a folder and on a real S3 server: one winner of each claim, and a true status."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from oar_scale.errors import UserError
from oar_scale.shard_pool import Bounds, run_pool
from oar_scale.shard_pool import leases as holders
from oar_scale.shard_pool import pool_status as pool_status
from oar_scale.shard_pool import run_pool as pool_run
from oar_scale.shard_pool.leases import Holder, Watch, read_holders
from oar_scale.shard_pool.ledger import Entry, Facts, Ledger
from oar_scale.shard_pool.pool_status import read_status, status_lines
from oar_scale.shard_pool.run_pool import _bounds, _last_seconds
from oar_scale.storage import join, open_storage


@pytest.fixture(params=["folder", "s3"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    root = str(tmp_path) if request.param == "folder" else f"{request.getfixturevalue('s3_root')}/{uuid.uuid4().hex[:8]}"
    return Ledger(join(root, "ledger"))


def test_of_many_who_claim_a_shard_one_holds_it(ledger: Ledger) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda name=f"pool{i}": found.append(ledger.claim("a/0.tar", 0, name).holder)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert ledger.claims()["a/0.tar"].holder == found[0]


def test_the_highest_claim_counts_until_it_is_released(ledger: Ledger) -> None:
    ledger.claim("0.tar", 0, "dead")
    second = ledger.claim("0.tar", 1, "alive")
    assert ledger.claims() == {"0.tar": second}
    assert ledger.claim("0.tar", 0, "late").holder == "dead"
    ledger.release(second)
    assert not ledger.claims()


def test_a_shard_is_entered_once_and_read_as_it_was_entered(ledger: Ledger) -> None:
    first = Entry({"images": 3}, {"actor": "a:1", "seconds": 1.5})
    assert ledger.enter("0.tar", first)
    assert not ledger.enter("0.tar", Entry({"images": 3}, {"actor": "b:2", "seconds": 0.5}))
    assert ledger.entries(["1.tar", "0.tar"]) == {"0.tar": first}
    assert ledger.done() == {"0.tar"}


def test_an_entry_of_an_older_version_counts(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger/0.tar.json").write_text(json.dumps({"shard": "0.tar", "facts": {"images": 3}}))
    assert Ledger(str(tmp_path / "ledger")).entries(["0.tar"]) == {"0.tar": Entry({"images": 3})}


def test_what_a_pool_makes_is_said_once_and_for_all(ledger: Ledger) -> None:
    ledger.bind({"model_id": "aa", "settings_id": "bb"})
    ledger.bind({"model_id": "aa", "settings_id": "bb"})
    with pytest.raises(UserError, match=r"made with settings_id bb, now it is cc\.\n.*remove this folder, or write into another"):
        ledger.bind({"model_id": "aa", "settings_id": "cc"})


def test_a_pool_is_alive_while_it_beats_and_gone_when_it_has_left(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = a_clock(monkeypatch)
    monkeypatch.setattr(holders, "LAST_BEAT_S", 60.0)  # no beat on its way as the pool leaves comes after its last word
    watch, folder = Watch(ledger, lease_s=60), join(ledger.beside, "holders")
    with Holder(ledger, lambda: {"actors": 2}, beat_s=0.1) as holder:
        claim = ledger.claim("0.tar", 0, holder.id)
        for _ in range(4):
            watch.look()
            assert not watch.gone(holder.id)
            clock.now += 50  # less than the lease for each beat, more for two
            wait_for_another(lambda: max(open_storage(folder).list(folder), default=""))
        assert watch.living()[holder.id]["pid"] == os.getpid()
        assert ledger.claims() == {"0.tar": claim}
    watch.look()
    assert watch.gone(holder.id) and not watch.living()
    assert not ledger.claims(), "it kept what it had claimed"
    names = open_storage(ledger.beside).list(folder)
    assert [name.rsplit("/", 1)[1] for name in names] == [f"{holder.id}.ended.json"], "old beats were left behind"


def a_clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """That of the watch: it stands still but for what is added to ``now``."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(holders, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    return clock


def wait_for_another(value: Callable[[], str], timeout_s: float = 60) -> None:
    before, end = value(), time.monotonic() + timeout_s
    while value() in ("", before):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_a_pool_that_never_says_anything_is_gone_after_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = a_clock(monkeypatch)
    watch = Watch(Ledger(str(tmp_path / "ledger")), lease_s=60)
    watch.look()
    assert not watch.gone("nobody")
    clock.now += 59
    assert not watch.gone("nobody")
    clock.now += 2
    assert watch.gone("nobody")


def test_the_status_counts_what_is_done_and_names_what_is_slow_or_wrong(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    now, sizes = time.time(), {f"{index}.tar": 100 for index in range(10)}
    monkeypatch.setattr(pool_status, "time", SimpleNamespace(time=lambda: now))  # whatever the storage takes
    for index, (actor, seconds) in enumerate([("fast:1", 10), ("fast:2", 10), ("slow:3", 40), ("fast:1", 10)]):
        work = {"actor": actor, "seconds": seconds, "finished": now - 10 * index, "attempt": 1}
        ledger.enter(f"{index}.tar", Entry({}, work))
    ledger.set_aside("4.tar", "4.tar: sample 'cat' has no codes\nTraceback", "me")
    ledger.set_aside("3.tar", "done since", "me")
    with Holder(ledger, lambda: {"actors": 3, "actor_seconds": 100.0, "retries": 2}, beat_s=10) as holder:
        ledger.claim("5.tar", 0, holder.id)
        ledger.claim("6.tar", 0, "somebody who is gone")
        status = read_status(ledger.uri, sizes)
    assert (len(status.done), status.images_done, status.images) == (4, 400, 1000)
    assert status.images_per_s == pytest.approx(400 / 60, rel=0.1)  # the slow one began 60 s ago
    assert (status.actor_seconds, status.busy_seconds) == (100.0, 70.0)
    assert (list(status.at_work), list(status.poison)) == (["5.tar"], ["4.tar"])
    assert next(iter(status.ms_per_image.items())) == ("slow:3", 400.0)
    text = "\n".join(status_lines(status, "orders/train"))
    for said in (
        "4 of 10 shards, 400 of 1000 images (40.0 %)",
        "images/s, 1 min",
        "3 actors, since 0 s; 2 retries",
        "70 % of it in finished shards",
    ):
        assert said in text
    for said in ("slow:3 400.0 ms/image (4.00 x the median)", "poison    4.tar: 4.tar: sample 'cat' has no codes", "5.tar ("):
        assert said in text
    after = "\n".join(status_lines(read_status(ledger.uri, sizes), "orders/train"))
    assert "none at work; the same command goes on from here" in after and "left" not in after


def test_the_status_of_nothing_is_nothing(tmp_path: Path) -> None:
    lines = status_lines(read_status(str(tmp_path / "ledger"), {"0.tar": 5}), "orders")
    assert lines[0] == "orders: 0 of 1 shards, 0 of 5 images (0.0 %)"
    assert not (tmp_path / "ledger").exists()


def test_holders_that_ended_keep_what_they_cost(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger"))
    for seconds in (10.0, 5.0):
        with Holder(ledger, lambda seconds=seconds: {"actor_seconds": seconds}, beat_s=10):
            pass
    assert sorted(record["actor_seconds"] for record in read_holders(ledger).values()) == [5.0, 10.0]
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
        run_pool(dict, ["0", "1", "2", "3"], str(tmp_path / "ledger"), actors=4, gpus_per_actor=1, what={"model_id": "a"})
    assert not list(tmp_path.iterdir()), "something was written"
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    assert _bounds(Bounds(4, 8), 100, 1, 1, gpus=0) == Bounds(4, 8)


def test_the_last_shards_of_earlier_pools_say_what_one_takes() -> None:
    works = [{"seconds": float(index), "finished": 100.0 - index} for index in range(20)]
    assert _last_seconds([Entry({}, work) for work in works] + [Entry({})]) == [float(index) for index in range(9, -1, -1)]


def test_a_pool_does_not_seem_dead_when_somebody_sets_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(str(tmp_path / "ledger"))
    with Holder(ledger, lambda: {}, beat_s=10) as holder:
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: 1.0)
        monkeypatch.setattr(time, "time", lambda: 1e9)
        watch = Watch(ledger, lease_s=60)
        watch.look()
        assert not watch.gone(holder.id)


def test_a_beat_that_hangs_does_not_keep_a_pool_from_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, hanging, over, write = Ledger(str(tmp_path / "ledger")), threading.Event(), threading.Event(), holders.write_record

    def stalled(uri: str, record: Facts, **options: bool) -> bool:
        if threading.current_thread() is not threading.main_thread():
            hanging.set()
            over.wait(120)
        return write(uri, record, **options)

    monkeypatch.setattr(holders, "write_record", stalled)
    monkeypatch.setattr(holders, "LAST_BEAT_S", 0.1)
    with Holder(ledger, lambda: {}, beat_s=0.01) as holder:
        assert hanging.wait(60)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    over.set()
    holder._thread.join()
    assert read_holders(ledger)[holder.id]["ended"], "a late beat took back that it has ended"
