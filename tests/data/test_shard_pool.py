"""The pool on a real Ray: whatever dies, every shard is done once, and the bytes are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from oar_scale.data.ray_session import ray_session
from oar_scale.data.shard_pool import Facts, read_ledger, run_pool
from oar_scale.errors import UserError
from oar_scale.storage import join, open_storage

SHARDS = [f"{index:05d}.tar" for index in range(6)]


@pytest.fixture(scope="module", autouse=True)
def ray_for_this_file() -> Iterator[None]:
    with ray_session(cpus=2):
        yield


@dataclass
class Writer:
    """Writes one small file a shard and notes in ``log`` each time that it does."""

    output: str
    log: str
    die_once_on: str = ""
    die_on: str = ""
    fail_on: str = ""
    fault_on: str = ""

    def run(self, shard: str) -> Facts:
        with open(self.log, "a") as log:
            log.write(f"{shard} {os.getpid()}\n")
        if shard == self.die_on:
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == self.fail_on:
            raise RuntimeError("the accelerator caught fire")
        if shard == self.fault_on:
            raise UserError(f"{shard}: sample 'cat' has no caption")
        uri = join(self.output, shard)
        if shard == self.die_once_on and not open_storage(uri).exists(uri):
            open_storage(uri).write(uri, b"output without an entry in the ledger")
            os.kill(os.getpid(), signal.SIGKILL)
        open_storage(uri).write(uri, f"the work of {shard}".encode())
        return {"bytes": len(shard)}


def tries(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make(folder: Path, **faults: str) -> Callable[[], Writer]:
    return partial(Writer, str(folder / "out"), str(folder.parent / f"{folder.name}.log"), **faults)


def undisturbed(folder: Path) -> dict[str, bytes]:
    run_pool(make(folder), SHARDS, str(folder / "ledger"), actors=2)
    return all_bytes(folder)


def test_a_dead_actor_loses_no_shard_and_the_bytes_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    disturbed = tmp_path / "disturbed"
    report = run_pool(make(disturbed, die_once_on=SHARDS[2]), SHARDS, str(disturbed / "ledger"), actors=2)
    assert list(report.done) == SHARDS
    assert report.failures == {SHARDS[2]: 1}
    assert sorted(tries(tmp_path / "disturbed.log")) == sorted([*SHARDS, SHARDS[2]])
    assert all_bytes(disturbed) == undisturbed(tmp_path / "calm")


def test_a_restarted_pool_does_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_pool(make(folder), SHARDS[:3], str(folder / "ledger"), actors=2)
    seen: list[str] = []
    report = run_pool(make(folder), SHARDS, str(folder / "ledger"), actors=2, on_progress=lambda shard, _: seen.append(shard))
    assert (report.found, list(report.done)) == (3, SHARDS)
    assert sorted(tries(tmp_path / "run.log")) == SHARDS
    assert seen[:3] == SHARDS[:3]
    assert sorted(seen) == SHARDS
    assert all_bytes(folder) == undisturbed(tmp_path / "calm")


def test_a_finished_pool_makes_no_worker(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    undisturbed(folder)

    def never() -> Writer:
        raise AssertionError("a worker was made")

    assert run_pool(never, SHARDS, str(folder / "ledger"), actors=2).found == len(SHARDS)


def test_a_poison_shard_is_set_aside_and_named_and_the_others_are_done(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report = run_pool(make(folder, fail_on=SHARDS[1]), SHARDS, str(folder / "ledger"), actors=2, max_retries=2)
    assert list(report.done) == [shard for shard in SHARDS if shard != SHARDS[1]]
    assert tries(tmp_path / "run.log").count(SHARDS[1]) == 3
    assert SHARDS[1] not in read_ledger(str(folder / "ledger"))
    with pytest.raises(UserError, match=r"1 of 6 shards could not be done:\n  00001\.tar: RuntimeError: the accelerator caught fire"):
        report.raise_for_poison()


def test_a_shard_that_kills_every_actor_is_set_aside_and_the_others_are_done(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report = run_pool(make(folder, die_on=SHARDS[0]), SHARDS, str(folder / "ledger"), actors=2, max_retries=1)
    assert list(report.done) == SHARDS[1:]
    assert report.failures == {SHARDS[0]: 2}
    assert report.poison[SHARDS[0]].startswith("its process died")


def test_a_failed_shard_is_tried_by_another_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_pool(make(folder, fail_on=SHARDS[0]), SHARDS[:1], str(folder / "ledger"), actors=1, max_retries=1)
    processes = {line.split()[1] for line in (tmp_path / "run.log").read_text().splitlines()}
    assert len(processes) == 2


def test_a_fault_of_the_data_is_not_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report = run_pool(make(folder, fault_on=SHARDS[4]), SHARDS, str(folder / "ledger"), actors=2)
    assert report.poison == {SHARDS[4]: "00004.tar: sample 'cat' has no caption"}
    assert tries(tmp_path / "run.log").count(SHARDS[4]) == 1
    assert len(report.done) == 5


def user_fault() -> Writer:
    raise UserError("models/anyorder.safetensors: no such file")


def broken_worker() -> Writer:
    raise OSError("no GPU here")


def deadly_worker() -> Writer:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_worker_that_cannot_be_made_stops_the_pool(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        run_pool(user_fault, SHARDS, str(tmp_path / "ledger"), actors=2)
    with pytest.raises(RuntimeError, match=r"(?s)no worker could be made in 2 tries.*no GPU here"):
        run_pool(broken_worker, SHARDS, str(tmp_path / "ledger"), actors=1, max_retries=1)
    with pytest.raises(RuntimeError, match=r"no worker could be made in 2 tries"):
        run_pool(deadly_worker, SHARDS, str(tmp_path / "ledger"), actors=1, max_retries=1)


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_shard_pool import SHARDS, SlowWriter
from oar_scale.data.shard_pool import run_pool
from functools import partial
run_pool(partial(SlowWriter, {out!r}, {log!r}), SHARDS, {ledger!r}, actors=2)
"""


class SlowWriter(Writer):
    def run(self, shard: str) -> Facts:
        time.sleep(0.3)
        return super().run(shard)


def test_a_killed_driver_leaves_nothing_running_and_its_successor_finishes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    names = {"out": str(folder / "out"), "log": str(tmp_path / "run.log"), "ledger": str(folder / "ledger")}
    program = DRIVER.format(here=str(Path(__file__).parent), **names)
    driver = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    wait_until(lambda: len(read_ledger(names["ledger"])) >= 2)
    workers = {int(line.split()[1]) for line in (tmp_path / "run.log").read_text().splitlines()}
    driver.kill()
    driver.wait()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))
    before = len(read_ledger(names["ledger"]))
    assert 2 <= before < len(SHARDS)
    report = run_pool(make(folder), SHARDS, names["ledger"], actors=2)
    assert (report.found, list(report.done)) == (before, SHARDS)
    assert all_bytes(folder) == undisturbed(tmp_path / "calm")


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_the_ledger_is_readable_json(tmp_path: Path) -> None:
    undisturbed(tmp_path / "run")
    assert json.loads((tmp_path / "run/ledger/00000.tar.json").read_text()) == {"shard": "00000.tar", "facts": {"bytes": 9}}
