"""The copy of the events in a real S3 server: what a reader on another host sees, and what an absent server does."""

from __future__ import annotations

import errno
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.dev import s3
from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.observe import mirror, watch
from oar_scale.observe.events import EventLog, attempts, read_events
from oar_scale.observe.mirror import Mirror, next_attempt, open_log, pull, run_id
from oar_scale.observe.watch import watching
from oar_scale.storage import Storage, join, open_storage
from tests.observe import synthetic_run
from tests.waiting import wait_until

QUICK = 0.1


@pytest.fixture(autouse=True)
def _time_for_a_slow_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((mirror, "CLAIM_S"), (mirror, "FLUSH_S"), (watch, "LAST_PULL_S")):
        monkeypatch.setattr(module, name, 600.0)


def test_an_attempt_begins_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The driver, too, records that workers have died, and must get to start others."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mirror, "_claim_next", lambda root, stage, number, token: number)
    monkeypatch.setattr(mirror, "_write_note", full)
    with open_log(str(tmp_path), "pretrain", "s3://bucket/run", QUICK) as log:
        log.emit("start", start_step=0)
    assert [event["kind"] for event in read_events(str(tmp_path), "pretrain")] == ["start"]
    assert "attempt 0 of pretrain is not copied to s3://bucket/run" in caplog.text


@pytest.fixture
def root(s3_root: str) -> str:
    return f"{s3_root}/{uuid.uuid4().hex[:8]}"


def hosts(folder: Path) -> tuple[str, str]:
    """The events folders of two hosts."""
    return str(folder / "host-1" / "events"), str(folder / "host-2" / "events")


def content(folder: str, stage: str = "pretrain") -> dict[str, bytes]:
    return {Path(path).name: Path(path).read_bytes() for _, path in attempts(folder, stage)}


class HeldUp:
    """Lets the copying of events stand still: where a mirror asks the storage, it waits until :meth:`go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self._over, self._opened = threading.Event(), threading.Event(), mirror.open_storage
        monkeypatch.setattr(mirror, "open_storage", self._open)

    def go_on(self) -> None:
        self._over.set()

    def _open(self, uri: str) -> Storage:
        if not self._over.is_set():
            assert threading.current_thread() is not threading.main_thread(), "the process that writes events asked the storage"
            self.asked.set()
            self._over.wait()
        return self._opened(uri)


def test_another_host_reads_events_while_they_are_written(tmp_path: Path, root: str) -> None:
    here, there = hosts(tmp_path)
    with open_log(here, "pretrain", root, QUICK) as log:
        synthetic_run.start(log)
        wait_until(lambda: pull(root, there) or content(there) == content(here))
        synthetic_run.train(log, 10)
        synthetic_run.samples(log, 10, Path(here).parent)
        wait_until(lambda: pull(root, there) or content(there) == content(here))
    with open_log(here, "pretrain", root, QUICK) as log:
        synthetic_run.start(log, 10)
    pull(root, there)
    assert content(there) == content(here) and len(content(there)) == 2
    picture = "samples/step-00000010.png"
    assert (Path(there).parent / picture).read_bytes() == (Path(here).parent / picture).read_bytes()


def test_long_events_are_copied_in_parts_and_brought_in_parts(tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "CHUNK_BYTES", 1000)
    here, there = hosts(tmp_path)
    with open_log(here, "pretrain", root, QUICK) as log:
        for step in range(1, 30):
            synthetic_run.train(log, step)
            if step in (10, 20):
                wait_until(lambda: pull(root, there) or content(there) == content(here))
        log.emit("resized", reason="x" * 3000)  # longer than a part
    pull(root, there)
    assert content(there) == content(here)
    uris = [uri for uri in open_storage(root).list(join(root, "events")) if uri.endswith(".jsonl")]
    assert len(uris) > 5


def test_attempts_on_two_hosts_never_have_the_same_number(tmp_path: Path, root: str) -> None:
    here, there = hosts(tmp_path)
    assert next_attempt(here, "pretrain", root) == 0  # claimed, and killed before its first event
    taken: list[int] = []
    threads = [
        threading.Thread(target=lambda folder=folder: taken.append(next_attempt(folder, "pretrain", root))) for folder in (here, there) * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [1, 2, 3, 4, 5, 6]
    assert next_attempt(there, "finetune", root) == 0
    assert next_attempt(str(tmp_path / "local"), "pretrain", str(tmp_path)) == 0


def test_the_history_goes_on_across_hosts(tmp_path: Path, root: str) -> None:
    here, there = hosts(tmp_path)
    with open_log(here, "pretrain", root, QUICK) as log:
        synthetic_run.start(log)
        for step in (10, 20, 30):
            synthetic_run.train(log, step)
    with open_log(there, "pretrain", root, QUICK) as log:
        synthetic_run.start(log, 20)
        synthetic_run.train(log, 30, loss=7.0)
    for folder in (here, there):
        pull(root, folder)
        points = [(e["step"], e["loss"]) for e in read_events(folder, "pretrain") if e["kind"] == "train"]
        assert [step for step, _ in points] == [10, 20, 30] and points[-1][1] == 7.0
    assert run_id(here, root) == run_id(there, root) != run_id(str(tmp_path / "other"), f"{root}/other")


class Unsteady:
    """A server of its own, that is taken down and brought up again."""

    def __init__(self, folder: str) -> None:
        self.folder, self.port = folder, s3.free_port()
        self.up()

    def up(self) -> None:
        self.env = s3.up(self.folder, self.port, "oar-mirror").env

    def down(self) -> None:
        s3.down(self.folder)


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unsteady]:
    server = Unsteady(str(tmp_path_factory.mktemp("unsteady")))
    yield server
    server.down()


@pytest.fixture
def unsteady(one_server: Unsteady, monkeypatch: pytest.MonkeyPatch) -> Unsteady:
    for name, value in {**one_server.env, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    return one_server


@pytest.fixture
def unsteady_root(unsteady: Unsteady) -> str:
    return f"s3://oar-mirror/{uuid.uuid4().hex[:8]}"


def test_a_server_away_for_a_while_gets_everything_later(
    tmp_path: Path, unsteady: Unsteady, unsteady_root: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile the training waits for nothing, not even for a request that hangs."""
    root, (here, there) = unsteady_root, hosts(tmp_path)
    with open_log(here, "pretrain", root, QUICK) as log:
        synthetic_run.start(log)
        wait_until(lambda: pull(root, there) or content(there) == content(here))
        unsteady.down()
        copying = HeldUp(monkeypatch)
        synthetic_run.train(log, 10)
        copying.asked.wait()
        for step in range(20, 60, 10):
            synthetic_run.train(log, step)
        copying.go_on()
        wait_until(lambda: "are not copied for now" in caplog.text)
        unsteady.up()
        wait_until(lambda: pull(root, there) or content(there) == content(here))


def test_an_attempt_without_a_server_is_copied_by_the_next_one(
    tmp_path: Path, unsteady: Unsteady, unsteady_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, (here, there) = unsteady_root, hosts(tmp_path)
    unsteady.down()
    with EventLog(here, "pretrain", next_attempt(here, "pretrain", root)) as log:
        copying = HeldUp(monkeypatch)
        flush = Mirror(here, "pretrain", root, QUICK)
        synthetic_run.start(log)
        synthetic_run.train(log, 10)
        copying.asked.wait()
        flush.close(0.1)
        assert flush._thread.is_alive(), "it waited for the copy"
        copying.go_on()
        flush._thread.join()
    unsteady.up()
    with open_log(here, "pretrain", root, QUICK) as log:
        assert log.attempt == 1
        synthetic_run.start(log, 10)
        wait_until(lambda: pull(root, there) or content(there) == content(here))


def test_two_hosts_with_one_attempt_number_do_not_mix_lines(
    tmp_path: Path, unsteady: Unsteady, unsteady_root: str, caplog: pytest.LogCaptureFixture
) -> None:
    root, (here, there) = unsteady_root, hosts(tmp_path)
    unsteady.down()
    for folder, step in ((here, 10), (there, 20)):
        with EventLog(folder, "pretrain", next_attempt(folder, "pretrain", root)) as log:
            synthetic_run.train(log, step)
    unsteady.up()
    for folder in (here, there):
        Mirror(folder, "pretrain", root, QUICK).close(600)
    assert "another host made attempt 0" in caplog.text
    before = content(there)
    for folder in (here, there, str(tmp_path / "third")):
        pull(root, folder)
    assert content(there) == before  # what a host wrote itself stays
    assert content(str(tmp_path / "third")) == content(here)


def test_a_server_that_never_answers_holds_no_attempt_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        monkeypatch.setattr(mirror, "CLAIM_S", 0.5)
        monkeypatch.setattr(mirror, "FLUSH_S", 0.5)
        with open_log(str(tmp_path), "pretrain", "s3://away/run", QUICK) as log:
            synthetic_run.start(log)
        mirrors = [thread for thread in threading.enumerate() if thread.name == "mirror-pretrain"]
        assert mirrors, "the end waited for the copy"
    assert "could not be claimed (TimeoutError)" in caplog.text
    assert len(read_events(str(tmp_path), "pretrain")) == 1


def test_a_driver_counts_on_from_what_other_hosts_did(tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first moment: a count that began at nothing and then leapt would look like many restarts."""
    monkeypatch.setattr(watch, "FIRST_PULL_S", 600.0)
    there, here = hosts(tmp_path)
    with open_log(there, "pretrain", root, QUICK) as log:
        synthetic_run.start(log)
    recipe = Recipe.model_validate({"name": "emoji", "observe": {"mirror_s": 600}})
    with watching(here, "pretrain", recipe, root, wait_s=600):
        assert content(here) == content(there)


def test_a_driver_watches_workers_of_another_host(tmp_path: Path, root: str) -> None:
    here, there = hosts(tmp_path)
    recipe = Recipe.model_validate({"name": "emoji", "storage": {"root": root}, "observe": {"mirror_s": QUICK}})
    with watching(here, "pretrain", recipe, root, wait_s=600), open_log(there, "pretrain", root, QUICK) as log:
        synthetic_run.start(log)
        synthetic_run.train(log, 10)
        wait_until(lambda: content(here) == content(there) != {})
        synthetic_run.train(log, 20)
    assert content(here) == content(there)  # the end of the stage brings the rest


def test_events_that_cannot_be_written_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: str, *_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(os, "open", read_only)
    with (
        pytest.raises(UserError, match=r"events: Read-only file system\. .*set run_dir"),
        open_log(str(tmp_path / "events"), "vq", "", 1.0),
    ):
        pass
