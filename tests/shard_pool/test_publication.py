"""Several actors make the same shard, with other bits: the bytes that stay and the entry in the ledger belong together."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from oar_scale.shard_pool import Ledger, OnStep, ShardOutput
from oar_scale.shard_pool.actor import Actor, ActorOutcome, ShardTask
from oar_scale.shard_pool.ledger import LedgerEntry
from oar_scale.shard_pool.publication import publish
from oar_scale.storage import Unreachable, join, open_storage

SHARD = "00000.tar"


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "folder" else f"{request.getfixturevalue('s3_root')}/{uuid.uuid4().hex[:8]}"


def output(root: str, data: bytes, settings: str = "s") -> ShardOutput:
    return ShardOutput(join(root, SHARD), data, {"settings_id": settings}, {"crc32c": crc32c(data)})


def ledger_of(root: str) -> Ledger:
    return Ledger(join(root, "ledger"))


def assert_agree(root: str, *datas: bytes) -> bytes:
    """Entry and object say the same, which is one of these; no draft is left. Returns it."""
    uri, ledger = join(root, SHARD), ledger_of(root)
    data, entry = open_storage(uri).read(uri), ledger.entry(SHARD)
    assert entry is not None and entry.result["crc32c"] == crc32c(data) and data in datas
    assert not open_storage(root).list(join(ledger.pool_folder, "drafts"))
    return data


@dataclass
class Bits:
    """A worker whose results have bits of their own; ``before`` it returns, something is waited for."""

    root: str
    data: bytes
    before: Callable[[], object]

    def run(self, shard: str, on_step: OnStep) -> ShardOutput:
        self.before()
        return output(self.root, self.data)


def test_a_late_duplicate_takes_the_first_ones_bytes(root: str) -> None:
    first_is_entered, second_has_begun, outcomes = threading.Event(), threading.Event(), dict[str, ActorOutcome]()

    def late() -> None:
        second_has_begun.set()
        first_is_entered.wait()

    def run(name: str, before: Callable[[], object]) -> None:
        actor = Actor(lambda: Bits(root, name.encode(), before), ledger_of(root), "pool1", 0)
        actor.start()
        outcomes[name] = actor.run(ShardTask(SHARD), lambda outcome: None)

    second = threading.Thread(target=run, args=("codes of GPU B", late))
    second.start()
    run("codes of GPU A", second_has_begun.wait)
    first_is_entered.set()
    second.join()
    assert_agree(root, b"codes of GPU A")
    assert {outcome.kind for outcome in outcomes.values()} == {"done"}
    assert outcomes["codes of GPU A"].result == outcomes["codes of GPU B"].result


def test_of_many_at_once_one_has_bytes_and_entry(root: str) -> None:
    """Also where the bytes of an earlier run, which are to be replaced, are in their way."""
    for stray in (b"", b"bytes of another run"):
        uri, ledger, start = join(root, SHARD), ledger_of(root), threading.Barrier(6)
        if stray:
            ledger.forget(SHARD)
            open_storage(uri).write(uri, stray)
        entries: list[LedgerEntry] = []

        def run(data: bytes, ledger: Ledger = ledger, start: threading.Barrier = start, entries: list[LedgerEntry] = entries) -> None:
            start.wait()
            entries.append(publish(ledger, SHARD, output(root, data), {"actor": data.decode()}))

        datas = [f"bits {number}".encode() for number in range(6)]
        threads = [threading.Thread(target=run, args=(data,)) for data in datas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winner = assert_agree(root, *datas)
        assert [entry.result["crc32c"] for entry in entries] == [crc32c(winner)] * 6
        assert {entry.work["actor"] for entry in entries} == {winner.decode()}


class Dying(Ledger):
    """The storage is lost before the entry is written."""

    def enter(self, shard: str, entry: LedgerEntry) -> bool:
        raise Unreachable("no route to the storage")


def test_bytes_of_who_died_before_the_entry_get_their_entry(root: str) -> None:
    with pytest.raises(Unreachable):
        publish(Dying(join(root, "ledger")), SHARD, output(root, b"first"), {"actor": "dead"})
    assert ledger_of(root).entry(SHARD) is None
    entry = publish(ledger_of(root), SHARD, output(root, b"second"), {"actor": "alive"})
    assert (entry.work["actor"], entry.result["crc32c"]) == ("dead", crc32c(b"first"))
    assert_agree(root, b"first")


def test_bytes_that_are_not_what_was_announced_are_replaced(root: str) -> None:
    """Damaged ones, and those made with other settings."""
    uri, dying = join(root, SHARD), Dying(join(root, "ledger"))
    with pytest.raises(Unreachable):
        publish(dying, SHARD, output(root, b"first"), {"actor": "dead"})
    open_storage(uri).write(uri, b"fir")
    publish(ledger_of(root), SHARD, output(root, b"second"), {"actor": "alive"})
    ledger_of(root).remove_drafts({SHARD})  # those of the dead: the pool does so at its end
    assert_agree(root, b"second")
    ledger_of(root).forget(SHARD)
    open_storage(uri).delete(uri)
    with pytest.raises(Unreachable):
        publish(dying, SHARD, output(root, b"other settings", settings="t"), {})
    publish(ledger_of(root), SHARD, output(root, b"third"), {})
    ledger_of(root).remove_drafts({SHARD})
    assert_agree(root, b"third")


def test_a_storage_lost_at_the_end_of_a_shard_costs_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been computed is written when the storage answers again."""
    runs, refused = list[str](), list[str]()
    enter = Ledger.enter

    def unreachable_once(self: Ledger, *arguments: Any) -> bool:
        if not refused:
            refused.append("once")
            raise Unreachable("no route to the storage")
        return enter(self, *arguments)

    monkeypatch.setattr(Ledger, "enter", unreachable_once)
    monkeypatch.setattr("oar_scale.runtime.retry.FIRST_S", 0.01)
    actor = Actor(lambda: Bits(str(tmp_path), b"bits", lambda: runs.append("run")), ledger_of(str(tmp_path)), "pool1", 60)
    actor.start()
    assert actor.run(ShardTask(SHARD), lambda outcome: None).kind == "done"
    assert refused and runs == ["run"], "the shard was computed again"
    assert_agree(str(tmp_path), b"bits")
