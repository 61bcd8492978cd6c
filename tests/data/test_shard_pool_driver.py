"""Whom the driver hires and where it sends a shard, on a cluster that is played: several hosts, and room for so many actors."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from oar_scale.data.pool.actor import Order, Outcome
from oar_scale.data.pool.driver import Driver
from oar_scale.data.pool.ledger import Ledger
from oar_scale.data.pool.signals import StopSignals
from oar_scale.data.pool.terms import Bounds, PoolReport, Timing


class Cluster:
    """Actors on hosts in turn; a shard fails on the host that ``broken`` says. Everything happens at once and in order."""

    def __init__(self, hosts: list[str], room: int, broken: dict[str, str]) -> None:
        self.hosts, self.free, self.broken = hosts, room, broken
        self.count, self.most, self.alive = 0, 0, set[int]()
        self.log: list[tuple[str, str]] = []
        self.outcomes: deque[tuple[int, Outcome]] = deque()

    def host(self, actor: int) -> str:
        return self.hosts[actor % len(self.hosts)]

    def start(self) -> int:
        self.count += 1
        self.alive.add(self.count)
        self.most = max(self.most, len(self.alive))
        if len(self.alive) <= self.free:
            self.outcomes.append((self.count, Outcome("started", work={"host": self.host(self.count)})))
        return self.count

    def run(self, actor: int, order: Order) -> None:
        host = self.host(actor)
        self.log.append((order.shard, host))
        failed = self.broken.get(order.shard) == host or self.broken.get("any") == host
        self.outcomes.append((actor, Outcome("failed", error="bad GPU") if failed else Outcome("done", {}, {"holder": "", "seconds": 0.1})))

    def wait(self, timeout_s: float) -> list[tuple[int, Outcome]]:
        return [self.outcomes.popleft()] if self.outcomes else []

    def kill(self, actor: int) -> None:
        self.alive.discard(actor)
        self.outcomes = deque(item for item in self.outcomes if item[0] != actor)

    def room(self) -> int:
        return max(0, self.free - len(self.alive))

    def close(self) -> None:
        self.alive.clear()


def play(folder: Path, shards: list[str], bounds: Bounds, hosts: list[str], room: int = 100, **broken: str) -> tuple[Cluster, PoolReport]:
    cluster, report = Cluster(hosts, room, {name.replace("_", "."): host for name, host in broken.items()}), PoolReport()
    nobody: Any = None
    driver = Driver(Ledger(str(folder / "ledger")), shards, bounds, 3, Timing(), report, StopSignals(), None, nobody, nobody)
    driver.do(cluster)
    return cluster, report


def names(count: int) -> list[str]:
    return [f"{index}.tar" for index in range(count)]


def test_a_shard_that_failed_on_one_host_is_tried_on_another(tmp_path: Path) -> None:
    cluster, report = play(tmp_path, names(12), Bounds(4, 4), ["a", "a", "a", "b"], any="a")
    assert report.done.keys() == set(names(12))
    failed = [shard for shard, host in cluster.log if host == "a"]
    assert failed and len(set(failed)) == len(failed), "a shard was tried twice on the host where it fails"


def test_a_host_where_everything_fails_poisons_no_shard(tmp_path: Path) -> None:
    _, report = play(tmp_path, names(20), Bounds(4, 4), ["bad", "bad", "bad", "good"], any="bad")
    assert len(report.done) == 20 and not report.poison


def test_a_shard_that_fails_on_every_host_is_set_aside(tmp_path: Path) -> None:
    cluster, report = play(tmp_path, names(3), Bounds(2, 2), ["a"], **{"1_tar": "a"})
    assert list(report.poison) == ["1.tar"] and report.failures == {"1.tar": 4}
    assert len([shard for shard, _ in cluster.log if shard == "1.tar"]) == 4


def test_beyond_the_least_it_hires_what_there_is_room_for_and_asks_for_some_more(tmp_path: Path) -> None:
    cluster, report = play(tmp_path / "narrow", names(200), Bounds(2, 50), ["a"], room=10)
    assert report.most_actors == 10
    assert 10 < cluster.most <= 15, "a cluster that can grow was asked for nothing, or for everything"
    cluster, report = play(tmp_path / "wide", names(200), Bounds(2, 50), ["a"], room=100)
    assert report.most_actors == 50 == cluster.most


def test_no_more_actors_are_hired_than_there_are_shards(tmp_path: Path) -> None:
    cluster, _ = play(tmp_path, names(3), Bounds(1, 50), ["a"])
    assert cluster.count <= 3
