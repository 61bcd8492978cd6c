"""Several processes on one ledger, without Ray: the tasks of a job array, or pools that were started twice by mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pool_worker import living, pids, table_of, tries
from waiting import wait_until

from oar_scale.orders.order_table import write_orders
from oar_scale.shard_pool import Ledger

SHARDS = [f"{index:05d}.tar" for index in range(8)]
PROGRAM = """
import json, sys
sys.path[:0] = {path!r}
from functools import partial
from pool_worker import TableWriter
from oar_scale.shard_pool import ArrayTask, Timing, run_pool
from oar_scale.errors import Requeue, UserError
def say(kind, fields):
    print(json.dumps([kind, fields]), flush=True)
if __name__ == "__main__":
    try:
        report = run_pool(
            partial(TableWriter, {folder!r}, {folder!r} + "/log", {seconds!r}, {faults!r}), {shards!r}, {folder!r} + "/ledger",
            actors=1, array=ArrayTask({index}, {of}), timing=Timing(**{timing!r}), config={config!r}, max_retries=1, on_event=say)
    except UserError as error:
        sys.exit(str(error))
    except Requeue as stop:
        print(json.dumps(["requeue", [stop.reason, stop.state]]))
        sys.exit(75)
    print(json.dumps(["end", {{"done": list(report.done), "poison": report.poison, "elsewhere": report.done_elsewhere}}]))
"""


class Task:
    """One process of the array."""

    def __init__(self, folder: Path, index: int = 0, of: int = 1, seconds: float = 0.2, **settings: Any) -> None:
        given: dict[str, Any] = {"faults": {}, "config": {}, "timing": {"poll_s": 0.2}, **settings}
        self.script = folder / f"task{index}-{time.monotonic_ns()}.py"
        folder.mkdir(exist_ok=True)
        self.script.write_text(
            PROGRAM.format(path=sys.path, folder=str(folder), seconds=seconds, shards=SHARDS, index=index, of=of, **given)
        )
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, str(self.script)], start_new_session=True, **pipes)
        self.events: list[Any] = []
        self.errors = ""

    def hear(self, kind: str) -> None:
        """Wait for an event of this kind."""
        assert self.process.stdout
        while not self.events or self.events[-1][0] != kind:
            self.events.append(json.loads(self.process.stdout.readline()))

    def end(self, timeout_s: float = 600) -> list[Any]:
        """Its events; the last item is how it ended."""
        output, self.errors = self.process.communicate(timeout=timeout_s)
        return [*self.events, *(json.loads(line) for line in output.splitlines())]


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("calm")
    for shard in SHARDS:
        write_orders(str(folder / f"{shard[:-4]}.parquet"), table_of(shard))
    return tables(folder)


def two_at_once(folder: Path, faults: dict[str, str] | None = None) -> list[Task]:
    """Two tasks that wait for each other in their first shards, however long one of them takes to start."""
    first_shards = [SHARDS[index * len(SHARDS) // 2] for index in range(2)]
    tasks = [Task(folder, index, 2, faults={**(faults or {}), first_shards[index]: "wait"}) for index in range(2)]
    wait_until(lambda: all((folder / f"log/{shard}.struck").exists() for shard in first_shards))
    (folder / "log/go on").touch()
    return tasks


def one_that_waits(folder: Path, shard: str, **settings: Any) -> Task:
    """The first of two tasks, busy with a shard that it does not finish before the test lets it."""
    task = Task(folder, 0, 2, faults={shard: "wait"}, **settings)
    wait_until((folder / f"log/{shard}.struck").exists)
    return task


def test_tasks_share_the_shards_and_each_is_done_once(tmp_path: Path, calm: dict[str, bytes]) -> None:
    tasks = two_at_once(tmp_path)
    for text in (task.end() for task in tasks):
        assert text[-1][0] == "end" and text[-1][1]["done"] == SHARDS
        assert not any(kind == "helping" for kind, _ in text), "the other tasks of an array are no mistake"
    assert sorted(tries(tmp_path / "log")) == SHARDS
    assert len(set(pids(tmp_path / "log"))) == 2
    assert tables(tmp_path) == calm
    assert not Ledger(str(tmp_path / "ledger")).claims()


def test_a_killed_tasks_shards_are_taken_over_without_its_lease(tmp_path: Path, calm: dict[str, bytes]) -> None:
    killed = one_that_waits(tmp_path, SHARDS[2])
    other = Task(tmp_path, 1, 2, timing={"poll_s": 0.2, "lease_s": 1e6})  # it does not wait for the lease
    wait_until(lambda: len(pids(tmp_path / "log")) == 2)
    os.killpg(killed.process.pid, signal.SIGKILL)
    output = other.end()
    assert output[-1][1]["done"] == SHARDS
    assert any(kind == "taken_over" for kind, _ in output)
    assert tables(tmp_path) == calm


def test_a_frozen_task_loses_its_claims(tmp_path: Path, calm: dict[str, bytes]) -> None:
    """And does no harm when it resumes."""
    frozen = one_that_waits(tmp_path, SHARDS[2])
    os.killpg(frozen.process.pid, signal.SIGSTOP)
    output = Task(tmp_path, 1, 2, timing={"poll_s": 0.2, "lease_s": 2.0}).end()
    assert output[-1][1]["done"] == SHARDS
    assert [fields["shard"] for kind, fields in output if kind == "taken_over"] == [SHARDS[2]]
    (tmp_path / "log/go on").touch()
    os.killpg(frozen.process.pid, signal.SIGCONT)
    assert frozen.end()[-1][1]["done"] == SHARDS
    assert tables(tmp_path) == calm
    assert sorted(Ledger(str(tmp_path / "ledger")).done()) == SHARDS


def test_a_stopped_task_ends_its_shard_and_hands_back_the_rest(tmp_path: Path, calm: dict[str, bytes]) -> None:
    task = one_that_waits(tmp_path, SHARDS[2])
    task.process.send_signal(signal.SIGTERM)
    task.hear("draining")
    (tmp_path / "log/go on").touch()
    output = task.end()
    assert task.process.returncode == 75 and output[-1] == ["requeue", ["SIGTERM", "everything saved"]]
    assert dict(output)["drained"] == {"finished": 1, "handed_back": 0}
    ledger = Ledger(str(tmp_path / "ledger"))
    assert sorted(ledger.done()) == sorted(tries(tmp_path / "log")), "a shard that was begun was not ended"
    assert not ledger.claims()
    assert Task(tmp_path).end()[-1][1]["done"] == SHARDS
    assert sorted(tries(tmp_path / "log")) == SHARDS
    assert tables(tmp_path) == calm


def test_what_does_not_end_in_the_grace_period_is_handed_back(tmp_path: Path) -> None:
    task = Task(tmp_path, seconds=60, timing={"grace_s": 0.5})
    wait_until(lambda: bool(pids(tmp_path / "log")) and (tmp_path / "log/tries.log").exists())
    task.process.send_signal(signal.SIGUSR1)
    output = dict(task.end())
    assert output["drained"] == {"finished": 0, "handed_back": 1}
    reason, state = output["requeue"]
    assert reason == "SIGUSR1" and "1 part was still being computed and will be computed anew" in state
    assert not Ledger(str(tmp_path / "ledger")).claims()
    assert not living(tmp_path / "log")


def test_a_shard_that_kills_its_process_is_poison_for_all_tasks(tmp_path: Path) -> None:
    tasks = two_at_once(tmp_path, {SHARDS[3]: "die", SHARDS[6]: "broken"})
    for text in (task.end() for task in tasks):
        poison = text[-1][1]["poison"]
        assert poison.keys() == {SHARDS[3], SHARDS[6]}
        assert poison[SHARDS[3]].startswith("its process died: exit code -9") and "no caption" in poison[SHARDS[6]]
    assert tries(tmp_path / "log").count(SHARDS[3]) == 2
    assert tries(tmp_path / "log").count(SHARDS[6]) == 1


def test_a_second_pool_with_another_config_is_refused(tmp_path: Path) -> None:
    """Before it writes anything."""
    first = Task(tmp_path, config={"model_id": "aaaa"})
    wait_until(lambda: bool(pids(tmp_path / "log")))
    second = Task(tmp_path, config={"model_id": "bbbb"})
    second.end()
    assert second.process.returncode == 1
    assert "the shards here are made with model_id aaaa, now it is bbbb" in second.errors
    assert first.end()[-1][1]["done"] == SHARDS
    assert sorted(tries(tmp_path / "log")) == SHARDS


def test_the_child_of_a_killed_task_does_not_outlive_it_for_long(tmp_path: Path) -> None:
    task = Task(tmp_path, seconds=60)
    wait_until(lambda: bool(pids(tmp_path / "log")))
    task.process.kill()
    task.end()
    wait_until(lambda: not living(tmp_path / "log"))
