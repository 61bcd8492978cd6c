"""Which actors the driver starts and where it sends a shard, on a simulated cluster: several hosts, and capacity for so many actors."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_clock import FakeClock

from oar_scale.errors import UserError
from oar_scale.runtime.stop_signals import StopSignals
from oar_scale.shard_pool import leases
from oar_scale.shard_pool.actor import ActorOutcome, ShardTask
from oar_scale.shard_pool.driver import PoolDriver
from oar_scale.shard_pool.leases import Lease
from oar_scale.shard_pool.ledger import Claim, Ledger, Record
from oar_scale.shard_pool.pool_types import ArrayTask, Bounds, PoolReport, Timing
from oar_scale.storage import Unreachable

"""A driver that waits for ever is what some of these are about."""


class Cluster:
    """Actors on the hosts round-robin; a shard fails on the host that ``broken`` names. Everything happens at once and in order.

    An outcome takes ``pace_s`` of the ``clock``; where there is none, the driver waits for as long as it wanted to.
    """

    def __init__(
        self,
        hosts: list[str],
        capacity: int,
        broken: dict[str, str] | None = None,
        *,
        pace_s: float = 0,
        how: Literal["failed", "user error"] = "failed",
    ) -> None:
        self.how = how
        self.hosts, self.free, self.broken, self.pace_s = hosts, capacity, broken or {}, pace_s
        self.count, self.most, self.alive = 0, 0, set[int]()
        self.log: list[tuple[str, str]] = []
        self.outcomes: deque[tuple[int, ActorOutcome]] = deque()
        self.clock = FakeClock()

    def host(self, actor: int) -> str:
        return self.hosts[actor % len(self.hosts)]

    def start(self) -> int:
        self.count += 1
        self.alive.add(self.count)
        self.most = max(self.most, len(self.alive))
        if len(self.alive) <= self.free:
            self.outcomes.append((self.count, ActorOutcome("placed")))
            self.make(self.count)
        return self.count

    def make(self, actor: int) -> None:
        self.outcomes.append((actor, ActorOutcome("started", info={"host": self.host(actor)})))

    def run(self, actor: int, task: ShardTask) -> None:
        host = self.host(actor)
        self.log.append((task.shard, host))
        failed = self.broken.get(task.shard) == host or self.broken.get("any") == host
        self.outcomes.append((actor, ActorOutcome(self.how, error="bad GPU") if failed else done()))

    def wait(self, timeout_s: float) -> list[tuple[int, ActorOutcome]]:
        self.clock.now += self.pace_s if self.outcomes else timeout_s
        return [self.outcomes.popleft()] if self.outcomes else []

    def kill(self, actor: int) -> None:
        self.alive.discard(actor)
        self.outcomes = deque(item for item in self.outcomes if item[0] != actor)

    def capacity(self) -> int:
        return max(0, self.free - len(self.alive))

    def close(self) -> None:
        self.alive.clear()


def done() -> ActorOutcome:
    return ActorOutcome("done", {}, {"holder": "", "seconds": 0.1})


class Slots(Cluster):
    """A place on each host: whoever is started gets the first that is free, that of a broken one, too.

    On the host ``bad`` shards fail after the first ``lasts``, and then workers cannot be made; elsewhere those of ``once`` fail once.
    """

    def __init__(self, hosts: list[str], lasts: int, how: Literal["failed", "user error"], once: Sequence[str] = ()) -> None:
        super().__init__(hosts, len(hosts))
        self.lasts, self.how, self.once, self.slots = lasts, how, set(once), dict[int, int]()

    def host(self, actor: int) -> str:
        return self.hosts[self.slots[actor]]

    def start(self) -> int:
        self.slots[self.count + 1] = min(set(range(len(self.hosts))) - {self.slots[actor] for actor in self.alive})
        return super().start()

    def works(self, actor: int) -> bool:
        return self.host(actor) != "bad" or sum(host == "bad" for _, host in self.log) <= self.lasts

    def make(self, actor: int) -> None:
        super().make(actor) if self.works(actor) else self.outcomes.append((actor, ActorOutcome(self.how, error="no GPU here")))

    def run(self, actor: int, task: ShardTask) -> None:
        self.log.append((task.shard, self.host(actor)))
        failed = not self.works(actor) or (self.host(actor) != "bad" and task.shard in self.once)
        self.once -= {task.shard}
        self.outcomes.append((actor, ActorOutcome("failed", error="CUDA error") if failed else done()))


class Hanging(Cluster):
    """The first ``starts`` workers are never made; the first try of any shard of ``shards`` never ends."""

    def __init__(self, hosts: list[str], starts: int = 0, shards: Sequence[str] = ()) -> None:
        super().__init__(hosts, len(hosts), pace_s=0.001)
        self.starts, self.shards = starts, set(shards)

    def make(self, actor: int) -> None:
        if actor > self.starts:
            super().make(actor)

    def run(self, actor: int, task: ShardTask) -> None:
        if task.shard in self.shards:
            self.shards.remove(task.shard)
        else:
            super().run(actor, task)


def play(
    ledger: Ledger,
    cluster: Cluster,
    shards: list[str],
    bounds: Bounds,
    timing: Timing | None = None,
    earlier_s: Sequence[float] = (),
    array: ArrayTask | None = None,
) -> tuple[PoolReport, list[tuple[str, Record]]]:
    """What the driver reports, and the events."""
    report, events = PoolReport(), list[tuple[str, Record]]()

    def say(kind: str, fields: Record) -> None:
        events.append((kind, fields))

    driver = PoolDriver(
        ledger, shards, bounds, 3, timing or Timing(), report, StopSignals(), array, earlier_s, on_event=say, clock=cluster.clock
    )
    driver.run(cluster)
    return report, events


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "ledger"))


def names(count: int) -> list[str]:
    return [f"{index}.tar" for index in range(count)]


def test_a_shard_that_failed_on_one_host_is_tried_on_another(ledger: Ledger) -> None:
    cluster = Cluster(["a", "a", "a", "b"], 100, {"any": "a"})
    report, _ = play(ledger, cluster, names(12), Bounds(4, 4))
    assert report.done.keys() == set(names(12))
    failed = [shard for shard, host in cluster.log if host == "a"]
    assert failed and len(set(failed)) == len(failed), "a shard was tried twice on the host where it fails"


def test_a_host_where_everything_fails_poisons_no_shard(ledger: Ledger) -> None:
    report, _ = play(ledger, Cluster(["bad", "bad", "bad", "good"], 100, {"any": "bad"}), names(20), Bounds(4, 4))
    assert len(report.done) == 20 and not report.poison


def test_a_sick_host_is_left_out_and_poisons_no_shard(ledger: Ledger) -> None:
    """Expired credentials on one of eight hosts: every shard fails there at once, with an error that a user can fix."""
    hosts = ["sick", *(f"healthy{number}" for number in range(7))]
    cluster = Cluster(hosts, 8, {"any": "sick"}, how="user error")
    report, events = play(ledger, cluster, names(400), Bounds(8, 8))
    assert len(report.done) == 400 and not report.poison
    (left_out,) = (fields for kind, fields in events if kind == "sick_host")
    assert left_out == {"host": "sick", "error": "bad GPU"}
    assert sum(host == "sick" for _, host in cluster.log) <= 4


class SlowStart(Cluster):
    """The first actor, on a host where every shard fails with what a user can fix, is there an hour before the ``others``, if they come."""

    def __init__(self, hosts: list[str], others: bool) -> None:
        super().__init__(hosts, len(hosts), {"any": hosts[1]}, how="user error")
        self.others, self.late = others, list[int]()

    def make(self, actor: int) -> None:
        super().make(actor) if actor == 1 else self.late.append(actor)

    def wait(self, timeout_s: float) -> list[tuple[int, ActorOutcome]]:
        outcomes = super().wait(timeout_s)
        if not outcomes and self.clock.now > 1000 + 3600:
            for actor in self.late:
                super().make(actor) if self.others else self.outcomes.append((actor, ActorOutcome("user error", error="no GPU here")))
            self.late = []
        return outcomes


def test_a_sick_host_that_is_there_first_poisons_nothing(ledger: Ledger) -> None:
    """It would have failed all shards before another one has its model."""
    cluster = SlowStart(["healthy", "sick", "fine"], others=True)
    report, _ = play(ledger, cluster, names(50), Bounds(3, 3), Timing(hang_s=1e6))
    assert len(report.done) == 50 and not report.poison
    alone = SlowStart(["healthy", "sick", "fine"], others=False)
    report, _ = play(Ledger(f"{ledger.uri}-alone"), alone, names(5), Bounds(3, 3), Timing(hang_s=1e6))
    assert len(report.poison) == 5 and set(report.poison.values()) == {"bad GPU"}, "nobody else came, and it waited for ever"


class Beside(Cluster):
    """Another pool, a task of a job array on a ``sick`` host, claims every shard first and gives it up at once."""

    def __init__(self, ledger: Ledger, sick: str) -> None:
        super().__init__(["a"], 1)
        self.ledger, self.sick = ledger, sick

    def run(self, actor: int, task: ShardTask) -> None:
        if task.claim:
            return super().run(actor, task)
        self.ledger.mark_poison(task.shard, "credentials have expired", "other", [self.sick])
        self.outcomes.append((actor, ActorOutcome("taken", claim=self.ledger.claim(task.shard, 0, "other"))))
        return None


def test_a_sick_task_of_a_job_array_poisons_nothing_for_others(ledger: Ledger) -> None:
    """Each has a host of its own, so that a task cannot tell by itself whether shard or host is at fault."""
    report, _ = play(ledger, Beside(ledger, "sick"), names(20), Bounds(1, 1))
    assert len(report.done) == 20 and not report.poison and not ledger.poison()
    same = Ledger(f"{ledger.uri}-same")
    report, _ = play(same, Beside(same, "a"), names(3), Bounds(1, 1))
    assert set(report.poison.values()) == {"credentials have expired"} and len(same.poison()) == 3


def test_a_sick_task_of_a_job_array_ends_if_it_has_others(ledger: Ledger) -> None:
    """It would get through the whole list before they have done a tenth of it."""
    cluster, array = Cluster(["sick"], 1, {"any": "sick"}, how="user error"), ArrayTask(0, 2)
    with (
        Lease(ledger, lambda: {"array": True}, heartbeat_s=10),
        pytest.raises(UserError, match="sick: every shard fails on this host, and other tasks of the array go on without it") as raised,
    ):
        play(ledger, cluster, names(50), Bounds(1, 1), array=array)
    assert "bad GPU" in str(raised.value) and len(cluster.log) == 3 and not ledger.claims()
    alone = Ledger(f"{ledger.uri}-alone")
    report, _ = play(alone, Cluster(["sick"], 1, {"any": "sick"}, how="user error"), names(5), Bounds(1, 1), array=array)
    assert len(report.poison) == 5


def test_what_a_user_can_fix_is_poison_once_two_hosts_say_so(ledger: Ledger) -> None:
    cluster = Cluster(["a", "b", "c"], 3, how="user error")
    run = cluster.run

    def fails(actor: int, task: ShardTask) -> None:
        cluster.broken = {"any": cluster.host(actor)} if task.shard == "3.tar" else {}
        run(actor, task)

    cluster.run = fails  # type: ignore[method-assign]
    report, _ = play(ledger, cluster, names(30), Bounds(3, 3))
    assert len(report.done) == 29 and list(report.poison) == ["3.tar"]
    tried = [host for shard, host in cluster.log if shard == "3.tar"]
    assert len(tried) == len(set(tried)) == 2


@pytest.mark.parametrize("how", ["failed", "user error"])
def test_a_broken_host_that_gets_every_new_actor_stops_nobody(ledger: Ledger, how: Literal["failed", "user error"]) -> None:
    cluster = Slots(["bad", "b", "c", "d"], 5, how)
    report, events = play(ledger, cluster, names(60), Bounds(4, 4))
    assert len(report.done) == 60 and not report.poison
    reasons = [fields for kind, fields in events if kind == "not_hiring"]
    assert reasons == [{"seconds": 30.0, "error": "no GPU here"}]
    assert cluster.count < 12, "it went on starting actors on the broken host"


def test_without_any_actor_new_ones_are_started_at_once(ledger: Ledger) -> None:
    """Whatever failed before the last one was lost."""
    cluster = Slots(["bad", "good"], -1, "failed", once=["30.tar"])
    began = cluster.clock.now
    report, events = play(ledger, cluster, names(40), Bounds(2, 2))
    assert len(report.done) == 40
    kinds = [kind for kind, _ in events]
    assert "not_hiring" in kinds[: kinds.index("retry")], "nothing had failed before"
    assert cluster.clock.now - began < 20


def test_a_worker_that_is_never_made_is_given_up(ledger: Ledger) -> None:
    report, events = play(ledger, Hanging(["a", "b"], starts=2), names(30), Bounds(2, 2), Timing(hang_s=0.1, patience_s=0, poll_s=0.01))
    assert (len(report.done), report.deaths) == (30, 2)
    lost = [fields["error"] for kind, fields in events if kind == "actor_lost"]
    assert len(lost) == 2 and all(error.startswith("no answer in 0 s") for error in lost)


def test_an_actor_that_waits_for_capacity_does_not_hang(ledger: Ledger) -> None:
    report, _ = play(ledger, Cluster(["a"], 2, pace_s=0.02), names(30), Bounds(4, 4), Timing(hang_s=0.1, patience_s=0, poll_s=0.01))
    assert (len(report.done), report.deaths) == (30, 0)


def test_a_first_shard_that_hangs_is_given_up(ledger: Ledger) -> None:
    """Though nothing tells yet how long one takes."""
    cluster = Hanging(["a", "b"], shards=["0.tar", "1.tar"])
    report, _ = play(ledger, cluster, names(2), Bounds(2, 2), Timing(hang_s=0.1, patience_s=0, poll_s=0.01))
    assert report.failures == {"0.tar": 1, "1.tar": 1} and len(report.done) == 2


class Long(Cluster):
    """Every shard takes ``steps`` minutes; ``hanging`` ones report progress after each minute until half-way, the others to the end."""

    def __init__(self, steps: int, hanging: Sequence[str] = ()) -> None:
        super().__init__(["a", "b"], 2, pace_s=30)
        self.steps, self.hanging = steps, set(hanging)
        self.tasks: dict[int, list[ActorOutcome]] = {}

    def run(self, actor: int, task: ShardTask) -> None:
        self.log.append((task.shard, self.host(actor)))
        self.tasks[actor] = [ActorOutcome("progress")] * self.steps + [done()]
        if task.shard in self.hanging:
            self.hanging.remove(task.shard)
            self.tasks[actor] = self.tasks[actor][: self.steps // 2]

    def wait(self, timeout_s: float) -> list[tuple[int, ActorOutcome]]:
        if self.outcomes:
            return super().wait(timeout_s)
        self.clock.now += 60
        return [(actor, outcomes.pop(0)) for actor, outcomes in self.tasks.items() if actor in self.alive and outcomes]


def test_first_shards_may_take_long_as_long_as_they_go_on(ledger: Ledger) -> None:
    """The largest recipe's take 68 minutes, longer than ``hang_s`` and the patience."""
    report, _ = play(ledger, Long(steps=200), names(4), Bounds(2, 2), Timing(hang_s=1800, patience_s=1200))
    assert (len(report.done), report.deaths, report.failures) == (4, 0, {})


def test_a_long_shard_that_goes_on_no_more_is_given_up(ledger: Ledger) -> None:
    """After ``hang_s`` and the patience, also where 20 times the median is a day."""
    cluster = Long(steps=200, hanging=["3.tar"])
    timing = Timing(hang_s=1800, patience_s=1200, straggler=1e6)
    report, events = play(ledger, cluster, names(4), Bounds(1, 1), timing, earlier_s=[12000.0] * 3)
    assert len(report.done) == 4 and report.failures == {"3.tar": 1}
    (lost,) = (fields["error"] for kind, fields in events if kind == "actor_lost")
    assert lost.startswith("no progress in 3000 s (parallel.hang_timeout_s and storage.patience_s)")


def test_times_of_earlier_pools_make_a_first_shard_a_straggler(ledger: Ledger) -> None:
    report, _ = play(ledger, Hanging(["a", "b"], shards=["0.tar"]), names(2), Bounds(2, 2), Timing(straggler_s=0.1), earlier_s=[0.01] * 3)
    assert (len(report.done), report.stragglers, report.failures) == (2, 1, {})


def test_times_of_earlier_pools_only_lengthen_the_stuck_limit(ledger: Ledger) -> None:
    timing = Timing(hang_s=0.1, stuck_s=0, stuck=2.0, straggler=99, patience_s=0, poll_s=0.01)
    cluster = Hanging(["a"], shards=["0.tar"])
    began = cluster.clock.now
    report, _ = play(ledger, cluster, names(1), Bounds(1, 1), timing, earlier_s=[0.5] * 3)
    assert report.failures == {"0.tar": 1} and cluster.clock.now - began > 1.0


def test_a_shard_that_fails_on_every_host_is_poison(ledger: Ledger) -> None:
    cluster = Cluster(["a"], 100, {"1.tar": "a"})
    report, _ = play(ledger, cluster, names(3), Bounds(2, 2))
    assert list(report.poison) == ["1.tar"] and report.failures == {"1.tar": 4}
    assert len([shard for shard, _ in cluster.log if shard == "1.tar"]) == 4


def test_more_actors_than_the_least_start_with_the_capacity(tmp_path: Path) -> None:
    cluster = Cluster(["a"], 10)
    report, _ = play(Ledger(str(tmp_path / "narrow")), cluster, names(200), Bounds(2, 50))
    assert report.peak_actors == 10
    assert 10 < cluster.most <= 15, "a cluster that can grow was requested for nothing, or for everything"
    cluster = Cluster(["a"], 100)
    report, _ = play(Ledger(str(tmp_path / "wide")), cluster, names(200), Bounds(2, 50))
    assert report.peak_actors == 50 == cluster.most


def test_no_more_actors_are_started_than_there_are_shards(ledger: Ledger) -> None:
    cluster = Cluster(["a"], 100)
    play(ledger, cluster, names(3), Bounds(1, 50))
    assert cluster.count <= 3


def test_a_pool_beside_another_reports_that_it_helps(ledger: Ledger) -> None:
    _, alone = play(ledger, Cluster(["a"], 100), names(2), Bounds(1, 1))
    assert "helping" not in Counter(kind for kind, _ in alone)
    with Lease(ledger, lambda: {"array": False}, heartbeat_s=10) as other:
        _, events = play(ledger, Cluster(["a"], 100), names(2), Bounds(1, 1))
    assert [fields["holder"] for kind, fields in events if kind == "helping"] == [other.holder]


class Failing(Ledger):
    """A storage that cannot be reached at the first poll for poison, and at no poll for claims once ``out``."""

    out, polled = False, False

    def poison(self) -> dict[str, Record]:
        self.polled, before = True, self.polled
        if not before:
            raise Unreachable("no route to the storage")
        return super().poison()

    def claims(self) -> dict[str, Claim]:
        if self.out:
            raise Unreachable("no route to the storage")
        return super().claims()


def test_a_pool_waits_for_a_storage_as_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failed = leases.write_record, list[str]()

    def once(uri: str, record: Record, **options: Any) -> bool:
        if not failed:
            failed.append(uri)
            raise Unreachable("no route to the storage")
        return write(uri, record, **options)

    monkeypatch.setattr(leases, "write_record", once)
    ledger = Failing(str(tmp_path / "ledger"))
    report, _ = play(ledger, Cluster(["a"], 100), names(2), Bounds(1, 1))
    assert len(report.done) == 2 and failed and ledger.polled


def test_a_storage_out_of_reach_at_the_end_fails_nothing(tmp_path: Path) -> None:
    ledger = Failing(str(tmp_path / "ledger"))

    class Last(Cluster):
        def run(self, actor: int, task: ShardTask) -> None:
            ledger.out = task.shard == "1.tar"
            super().run(actor, task)

    report, events = play(ledger, Last(["a"], 100), names(2), Bounds(1, 1))
    assert len(report.done) == 2
    assert [fields["error"] for kind, fields in events if kind == "storage"] == ["no route to the storage"]
