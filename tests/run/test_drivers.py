"""Who may do a stage of a run: one driver, or the pools that share it; one that is gone hinders nobody."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_clock import FakeClock

from oar_scale.config.schema import Recipe
from oar_scale.errors import Requeue, Unreachable, UserError
from oar_scale.observe.console import Console
from oar_scale.registry import STAGES
from oar_scale.run.context import Run
from oar_scale.run.drivers import JOB_LEASE, Drivers
from oar_scale.shard_pool.ledger import Record, write_record

PRETRAIN, EXTRACT = STAGES["pretrain"], STAGES["extract"]
ELSEWHERE = {"host": "node7", "pid": 12, "born_ticks": 1, "machine": "another", "started": 1.7e9, "time": 1.7e9, "ended": False}
HOLD = """
import sys
from oar_scale.config.schema import Recipe
from oar_scale.registry import STAGES
from oar_scale.run.context import Run
from oar_scale.run.drivers import Drivers

with Drivers(Run(Recipe(name="stub", run_dir=sys.argv[1]))) as drivers:
    drivers.take(STAGES["pretrain"])
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Recipe(name="stub", run_dir=str(tmp_path / "run")), Console(io.StringIO()))


def elsewhere(run: Run, heartbeat: int = 3, **fields: object) -> None:
    """A driver on another machine, which does the pretraining."""
    record: Record = {**ELSEWHERE, "stage": "pretrain", "job_lease": "", **fields}
    write_record(run.at("drivers-pool", "holders", f"node7-12-abc.{heartbeat:06d}.json"), record)
    write_record(run.at("drivers-pool", "stages", "pretrain", "node7-12-abc.json"), {})


def never(seconds: float) -> None:
    raise AssertionError(f"it waited {seconds} s")


def left(run: Run) -> list[str]:
    folder = Path(run.at("drivers-pool"))
    return [str(path.relative_to(folder)) for path in folder.rglob("*.json")]


def test_a_live_driver_here_is_seen_at_once_and_a_killed_one_too(run: Run) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, run.local()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "taken\n"
        with Drivers(run, sleep=never) as drivers, pytest.raises(UserError, match=rf"pid {other.pid}, .*, pretrain\)"):
            drivers.take(PRETRAIN)
        with Drivers(run, sleep=never) as drivers:
            drivers.take(STAGES["finetune"])  # two stages at a time, as somebody may do finetune and control
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with Drivers(run, sleep=never) as drivers:
        drivers.take(PRETRAIN)
        assert len(left(run)) == 2, "what the killed one left is gone"
    assert left(run) == []


def test_a_driver_elsewhere_is_judged_by_its_heartbeats(run: Run) -> None:
    clock = FakeClock()
    elsewhere(run)

    def beat(seconds: float) -> None:
        clock.sleep(seconds)
        elsewhere(run, heartbeat=4)

    with Drivers(run, clock=clock, sleep=beat) as drivers, pytest.raises(UserError, match=r"host node7, pid 12"):
        drivers.take(PRETRAIN)
    assert "drivers" not in " ".join(name for name in left(run) if "node7" not in name)
    with Drivers(run, clock=clock, sleep=clock.sleep) as drivers:
        drivers.take(PRETRAIN)  # now it stands still
    assert 60 <= sum(clock.slept[1:]) < 80
    assert left(run) == []


def test_a_requeued_job_takes_over_from_itself_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(run, job_lease="/runs/stub/jobs/holder")
    monkeypatch.setenv(JOB_LEASE, "/runs/stub/jobs/holder")
    with Drivers(run, sleep=never) as drivers:
        drivers.take(PRETRAIN)
    elsewhere(run, job_lease="/runs/other/jobs/holder")
    with Drivers(run, sleep=never) as drivers, pytest.raises(AssertionError, match="it waited"):
        drivers.take(PRETRAIN)


def test_pools_share_their_stage_unless_its_results_are_moved(run: Run) -> None:
    with Drivers(run, sleep=never) as one, Drivers(run, sleep=never) as two, Drivers(run, sleep=never) as mover:
        one.take(EXTRACT)
        two.take(EXTRACT)
        with pytest.raises(UserError, match="another driver works on this run"):
            mover.take_alone([PRETRAIN, EXTRACT])
    with Drivers(run, sleep=never) as mover, Drivers(run, sleep=never) as late, Drivers(run, sleep=never) as helper:
        mover.take_alone([PRETRAIN, EXTRACT])
        for stage in (PRETRAIN, EXTRACT):
            with pytest.raises(UserError, match="another driver works on this run"):
                late.take(stage)
        mover.take(EXTRACT)
        helper.take(EXTRACT)


def test_a_storage_that_is_away_at_the_end_does_not_change_how_the_run_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code 75 says that the job is to be queued again; an error that hides it, that it is not."""

    def away(uri: str) -> None:
        raise Unreachable("s3://b: no connection")

    with monkeypatch.context() as patch, pytest.raises(Requeue), Drivers(run, sleep=never) as drivers:
        drivers.take(PRETRAIN)
        for module in ("run.drivers", "shard_pool.leases", "shard_pool.ledger"):
            patch.setattr(f"oar_scale.{module}.open_storage", away)
        raise Requeue("SIGTERM")


def test_a_driver_that_was_refused_hinders_nobody(run: Run) -> None:
    with Drivers(run, sleep=never) as one, Drivers(run, sleep=never) as two:
        one.take(PRETRAIN)
        with pytest.raises(UserError, match="another driver"):
            two.take(PRETRAIN)
        one.take(STAGES["finetune"])
        assert [name for name in left(run) if name.startswith("stages/pretrain/")] != []
    assert left(run) == []
