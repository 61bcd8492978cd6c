"""The pool on a real Ray: whatever dies, every shard is done once, and the bytes are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from actors_here import pools_here
from pool_worker import TableWriter, living, pids, table_of, tries
from waiting import wait_until

from oar_scale.errors import UserError
from oar_scale.orders.order_table import write_orders
from oar_scale.shard_pool import Bounds, Ledger, OnStep, PoolReport, ShardOutput, Timing, actor, run_pool
from oar_scale.shard_pool.backends import ActorBackend, ProcessActors, RayActors
from oar_scale.shard_pool.ledger import Record

pytestmark = pytest.mark.usefixtures("shared_ray")
SHARDS = [f"{index:05d}.tar" for index in range(6)]
CALM = Timing(straggler_s=1e6, lease_s=1e6)
"""No shard is tried a second time because the machine is busy, and nothing waits for a lease."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tables as no pool at all writes them."""
    folder = tmp_path_factory.mktemp("calm")
    for shard in SHARDS:
        write_orders(str(folder / f"{shard[:-4]}.parquet"), table_of(shard))
    return tables(folder)


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def run(
    folder: Path, shards: list[str] = SHARDS, *, seconds: float = 0.0, faults: dict[str, str] | None = None, **options: Any
) -> PoolReport:
    make = partial(TableWriter, str(folder), str(folder / "log"), seconds, faults or {})
    return run_pool(make, shards, str(folder / "ledger"), **{"actors": 2, "timing": CALM, **options})


def clock_that_jumps(seconds: float, sign: Path) -> Callable[[], float]:
    """A clock that stands still, but for one jump as soon as the file ``sign`` is there."""
    return lambda: 1000.0 + (seconds if sign.exists() else 0.0)


@dataclass(frozen=True)
class Survived:
    """A pool that lost an actor at the begin of a shard, and one after it had written a table and before the entry."""

    folder: Path
    report: PoolReport
    seconds: float


@pytest.fixture(scope="module")
def survived(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Survived:
    folder, began = tmp_path_factory.mktemp("survived"), time.monotonic()
    report = run(folder, seconds=0.2, faults={SHARDS[0]: "die once", SHARDS[2]: "crash 2 after"})
    return Survived(folder, report, time.monotonic() - began)


def test_dead_actors_lose_no_shard_and_change_no_byte(survived: Survived, calm: dict[str, bytes]) -> None:
    assert list(survived.report.done) == SHARDS
    assert survived.report.failures == {SHARDS[0]: 1, SHARDS[2]: 1}
    assert sorted(tries(survived.folder / "log")) == sorted([*SHARDS, SHARDS[0], SHARDS[2]])
    assert tables(survived.folder) == calm


def test_the_ledger_says_who_did_what_and_how_long_it_took(survived: Survived) -> None:
    entries = Ledger(str(survived.folder / "ledger")).entries(SHARDS)
    assert {shard: entry.result for shard, entry in entries.items()} == survived.report.done
    assert all(0.2 <= entry.work["seconds"] < survived.seconds for entry in entries.values())
    assert [entries[shard].work["attempt"] for shard in SHARDS] == [2, 1, 1, 1, 1, 1], "the other one's table stayed, with its entry"
    assert {int(entry.work["actor"].split(":")[1]) for entry in entries.values()} <= set(pids(survived.folder / "log"))
    assert survived.report.actor_seconds > sum(entry.work["seconds"] for entry in entries.values())


@pytest.mark.usefixtures("pool_here")
def test_a_restarted_pool_does_what_is_missing_and_nothing_else(tmp_path: Path, calm: dict[str, bytes]) -> None:
    run(tmp_path, SHARDS[:3])
    seen: list[str] = []
    report = run(tmp_path, on_progress=lambda shard, *_: seen.append(shard))
    assert (report.already_done, list(report.done)) == (3, SHARDS)
    assert sorted(tries(tmp_path / "log")) == SHARDS
    assert seen[:3] == SHARDS[:3]
    assert sorted(seen) == SHARDS
    assert tables(tmp_path) == calm
    assert run_pool(never, SHARDS, str(tmp_path / "ledger"), actors=2).already_done == len(SHARDS), "a finished pool made a worker"


def never() -> TableWriter:
    raise AssertionError("a worker was made")


@pytest.mark.usefixtures("pool_here")
def test_a_poison_shard_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    report = run(tmp_path, faults={SHARDS[1]: "fail"}, max_retries=2)
    assert list(report.done) == [shard for shard in SHARDS if shard != SHARDS[1]]
    assert tries(tmp_path / "log").count(SHARDS[1]) == 3
    ledger = Ledger(str(tmp_path / "ledger"))
    assert SHARDS[1] not in ledger.done()
    assert ledger.poison()[SHARDS[1]]["error"].startswith("RuntimeError: the accelerator caught fire")
    with pytest.raises(UserError, match=r"1 of 6 shards could not be done:\n  00001\.tar: RuntimeError: the accelerator caught fire"):
        report.raise_for_poison()
    run(tmp_path)  # fixed
    assert not ledger.poison()


def test_a_shard_that_kills_every_actor_is_poison(tmp_path: Path) -> None:
    report = run(tmp_path, faults={SHARDS[0]: "die"}, max_retries=1)
    assert list(report.done) == SHARDS[1:]
    assert report.failures == {SHARDS[0]: 2}
    assert report.poison[SHARDS[0]].startswith("its process died")


def test_a_failed_shard_is_tried_by_another_process(tmp_path: Path) -> None:
    run(tmp_path, SHARDS[:1], faults={SHARDS[0]: "fail"}, actors=1, max_retries=1)
    assert len(set(pids(tmp_path / "log"))) == 2


@pytest.mark.usefixtures("pool_here")
def test_a_fault_of_the_data_is_not_tried_again(tmp_path: Path) -> None:
    report = run(tmp_path, faults={SHARDS[4]: "broken"})
    assert report.poison == {SHARDS[4]: "00004.tar: sample 'cat' has no caption"}
    assert tries(tmp_path / "log").count(SHARDS[4]) == 1
    assert len(report.done) == 5


class Stepping:
    """Reports each of its steps."""

    def __init__(self) -> None:
        actor.PROGRESS_S = 0.0  # of this process, which is an actor's

    def run(self, shard: str, on_step: OnStep) -> ShardOutput:
        for _ in range(3):
            on_step()
        return ShardOutput(shard, b"done", {})


@pytest.mark.parametrize("backend", ["ray", "processes"])
def test_progress_inside_a_shard_reaches_the_driver(tmp_path: Path, backend: str) -> None:
    make_actor = partial(actor.Actor, Stepping, Ledger(str(tmp_path / "ledger")), "pool1", 0.0)
    actors: ActorBackend = RayActors(make_actor, 1, 0) if backend == "ray" else ProcessActors(make_actor)
    outcomes: list[tuple[int, str]] = []

    def until(kind: str) -> None:
        while not outcomes or outcomes[-1][1] != kind:
            outcomes.extend((number, outcome.kind) for number, outcome in actors.wait(1.0))

    number = actors.start()
    until("started")
    for index in range(2):
        outcomes.clear()
        actors.run(number, actor.ShardTask(str(tmp_path / f"{index}.tar")))
        until("done")
        assert outcomes == [(number, "progress")] * 3 + [(number, "done")]
    actors.close()


def test_a_straggler_is_done_by_an_idle_actor_as_well(tmp_path: Path, calm: dict[str, bytes]) -> None:
    clock = clock_that_jumps(100, tmp_path / f"log/{SHARDS[1]}.struck")
    report = run(tmp_path, faults={SHARDS[1]: "hang"}, timing=Timing(), clock=clock)
    assert (list(report.done), report.stragglers, report.failures) == (SHARDS, 1, {})
    assert tries(tmp_path / "log").count(SHARDS[1]) == 2
    assert tables(tmp_path) == calm


def test_an_actor_that_never_answers_is_replaced(tmp_path: Path) -> None:
    clock = clock_that_jumps(10_000, tmp_path / f"log/{SHARDS[5]}.struck")
    report = run(tmp_path, faults={SHARDS[5]: "hang"}, actors=1, clock=clock)
    assert (list(report.done), report.failures, report.deaths) == (SHARDS, {SHARDS[5]: 1}, 1)


def test_a_pool_grows_as_far_as_there_is_room(tmp_path: Path) -> None:
    started: list[str] = []

    def say(kind: str, _: Record) -> None:
        started.extend([kind] if kind == "actor_started" else [])
        if len(started) == 2:
            (tmp_path / "both/log/go on").touch()  # until then the first one waits, however long the second takes to start

    waiting = dict.fromkeys(SHARDS, "wait")
    assert run(tmp_path / "both", faults=waiting, actors=Bounds(1, 4), on_event=say).peak_actors == 2
    with pools_here():
        assert run(tmp_path / "few", SHARDS[:1], actors=Bounds(1, 4)).peak_actors == 1


def user_fault() -> TableWriter:
    raise UserError("models/any_order.safetensors: no such file")


def broken_worker() -> TableWriter:
    raise OSError("no GPU here")


def deadly_worker() -> TableWriter:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.usefixtures("pool_here")
def test_a_worker_that_cannot_be_made_stops_the_pool(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        run_pool(user_fault, SHARDS, str(tmp_path / "ledger"), actors=2)
    with pytest.raises(RuntimeError, match=r"(?s)no worker could be made in 2 tries.*no GPU here"):
        run_pool(broken_worker, SHARDS, str(tmp_path / "ledger"), actors=1, max_retries=1)


def test_a_worker_that_kills_its_process_stops_the_pool(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no worker could be made in 2 tries"):
        run_pool(deadly_worker, SHARDS, str(tmp_path / "ledger"), actors=1, max_retries=1)


DRIVER = """
import sys
sys.path[:0] = {path!r}
from functools import partial
from pool_worker import TableWriter
from oar_scale.shard_pool import run_pool
run_pool(partial(TableWriter, {folder!r}, {log!r}, 0.3, {faults!r}), {shards!r}, {folder!r} + "/ledger", actors=2)
"""


def test_a_killed_driver_leaves_nothing_running(tmp_path: Path, calm: dict[str, bytes]) -> None:
    """Its successor does what is missing, without waiting for the lease."""
    faults = {SHARDS[4]: "wait"}  # so that not all is done before the kill
    program = DRIVER.format(path=sys.path, folder=str(tmp_path), log=str(tmp_path / "log"), shards=SHARDS, faults=faults)
    driver = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    ledger = Ledger(str(tmp_path / "ledger"))
    wait_until(lambda: len(ledger.done()) >= 2)
    driver.kill()
    driver.wait()
    wait_until(lambda: not living(tmp_path / "log"))
    before = len(ledger.done())
    assert 2 <= before < len(SHARDS)
    with pools_here():
        report = run(tmp_path)  # it does not wait for the lease of the process that is gone
    assert (report.already_done, list(report.done)) == (before, SHARDS)
    assert tables(tmp_path) == calm
