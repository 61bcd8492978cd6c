"""The driver where outcomes of several actors come together, where it is stopped, and where another pool finishes a shard."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Literal

import pytest
from test_pool_driver import Cluster, done, names, play

from oar_scale.errors import Requeue, UserError
from oar_scale.runtime.stop_signals import StopSignals
from oar_scale.shard_pool.actor import ActorOutcome, ShardTask
from oar_scale.shard_pool.driver import PoolDriver
from oar_scale.shard_pool.ledger import Claim, Ledger, LedgerEntry, ShardResult
from oar_scale.shard_pool.pool_types import Bounds, PoolReport, Timing


class AtOnce(Cluster):
    """Outcomes that are there come together, and an actor that is dead cannot be killed: as with Ray."""

    def wait(self, timeout_s: float) -> list[tuple[int, ActorOutcome]]:
        self.clock.now += self.pace_s if self.outcomes else timeout_s
        found, self.outcomes = list(self.outcomes), deque()
        return found

    def kill(self, actor: int) -> None:
        self.alive.remove(actor)
        super().kill(actor)


@pytest.mark.parametrize("how", ["failed", "user error"])
def test_outcomes_that_come_with_the_one_that_makes_a_host_sick(tmp_path: Path, how: Literal["failed", "user error"]) -> None:
    cluster = AtOnce(["good", *["bad"] * 7], 16, {"any": "bad"}, how=how)
    report, events = play(Ledger(str(tmp_path / "ledger")), cluster, names(60), Bounds(16, 16))
    assert len(report.done) == 60 and not report.poison
    assert "sick_host" in [kind for kind, _ in events]


class LongShards(Cluster):
    """A shard takes 20 s, and its actor says every 5 that it goes on. SIGTERM comes as the first one begins."""

    signals = StopSignals()

    def run(self, actor: int, task: ShardTask) -> None:
        self.outcomes += [*[(actor, ActorOutcome("progress"))] * 3, (actor, done())]
        self.signals.reason = "SIGTERM"


@pytest.mark.parametrize(("grace_s", "finished"), [(30, 1), (8, 0)])
def test_a_shard_that_reports_progress_has_the_grace_to_end(tmp_path: Path, grace_s: float, finished: int) -> None:
    cluster, report, events = LongShards(["a"], 1, pace_s=5), PoolReport(), list[tuple[str, ShardResult]]()
    cluster.signals = StopSignals()
    driver = PoolDriver(
        Ledger(str(tmp_path / "ledger")),
        names(3),
        Bounds(1, 1),
        3,
        Timing(grace_s=grace_s),
        report,
        cluster.signals,
        on_event=lambda kind, fields: events.append((kind, dict(fields))),
        clock=cluster.clock,
    )
    with pytest.raises(Requeue) as stop:
        driver.run(cluster)
    assert len(report.done) == finished and stop.value.unfinished == 1 - finished
    assert events[-1] == ("drained", {"finished": finished, "handed_back": 1 - finished})


class Beside(Ledger):
    """Another pool has claimed all shards but the last, and has finished them when we look for the second time."""

    looks = 0

    def claims(self) -> dict[str, Claim]:
        self.looks += 1
        if self.looks == 2:
            for shard in names(3):
                self.enter(shard, LedgerEntry({"bad": 9}, {"holder": "other", "seconds": 1.0}))
        return super().claims()


class Patient(Cluster):
    def wait(self, timeout_s: float) -> list[tuple[int, ActorOutcome]]:
        assert self.clock.now < 1000 + 3600, "it waits for ever"
        return super().wait(timeout_s)


def test_an_error_about_a_shard_of_another_pool_ends_this_one(tmp_path: Path) -> None:
    """As where too many samples cannot be used: ``on_progress`` raises, and that is no fault of the storage."""
    ledger, cluster = Beside(str(tmp_path / "ledger")), Patient(["a"], 1)
    for shard in names(3):
        ledger.claim(shard, 0, "other")

    def on_progress(shard: str, result: ShardResult, report: PoolReport) -> None:
        if result.get("bad"):
            raise UserError("9 of the first 10 images are bad")

    driver = PoolDriver(
        ledger, names(4), Bounds(1, 1), 3, Timing(), PoolReport(), StopSignals(), on_progress=on_progress, clock=cluster.clock
    )
    with pytest.raises(UserError, match="images are bad"):
        driver.run(cluster)
