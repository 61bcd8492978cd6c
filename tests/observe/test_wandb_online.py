"""The real wandb client against a small server: everything arrives once, whatever dies in between, and nothing waits for it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import wait_until

from oar_scale.config.schema import Recipe
from oar_scale.observe.events import EventLog, read_events
from oar_scale.observe.wandb_process import WandbSpec, is_delivered
from oar_scale.observe.wandb_sink import send_stage
from oar_scale.observe.watch import watching
from tests.observe import synthetic_run
from tests.observe.documented import promised_at_wandb
from tests.wandb_file import offline_runs
from tests.wandb_server import KEY, ServedRun, WandbServer

OWN = {"_step", "_timestamp", "_runtime"}
QUICK = {"FILE_STREAM_RETRY_WAIT_MIN_SECONDS": 0.2, "GRAPHQL_RETRY_WAIT_MIN_SECONDS": 0.2}
"""wandb's own waiting, which would only make the tests longer."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    running = WandbServer()
    for name, value in {**running.environment, **{f"WANDB__{name}": str(seconds) for name, seconds in QUICK.items()}}.items():
        monkeypatch.setenv(name, value)
    yield running
    running.close()


def spec(events: Path, stage: str = "pretrain", **changed: Any) -> WandbSpec:
    fields = {"events": str(events), "stage": stage, "recipe_name": "emoji", "root": str(events.parent), "mode": "online", "project": "p"}
    fields |= {"finish_s": 100.0}  # however slow this machine is
    return WandbSpec(**(fields | changed))


def recipe(folder: Path, **observe: Any) -> Recipe:
    return Recipe.model_validate({"name": "emoji", "run_dir": str(folder), "observe": {"wandb": "online", **observe}})


def send(events: Path, stage: str = "pretrain", wait_s: float = 120.0, **changed: Any) -> list[str]:
    messages: list[str] = []
    send_stage(spec(events, stage, **changed), messages.append, wait_s)
    return messages


def only_run(server: WandbServer) -> ServedRun:
    [run] = server.runs.values()
    return run


def names(run: ServedRun) -> set[str]:
    return {name for row in run.history for name in row} - OWN


def wandb_processes() -> list[psutil.Process]:
    """The sending process of this test's driver, and the server that wandb starts for it."""
    processes = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends just now
            if "wandb" in " ".join(child.cmdline()):
                processes.append(child)
    return processes


def assert_nothing_twice(run: ServedRun) -> None:
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    for kind, axis in (("train", "step"), ("heldout", "step"), ("checkpoint", "step"), ("samples", "step"), ("pool", "done")):
        seen = Counter(row[f"{kind}/{axis}"] for row in run.history if f"{kind}/{axis}" in row)
        assert set(seen.values()) <= {1}, (kind, seen)


def assert_agrees_with_the_files(run: ServedRun, events: Path) -> None:
    expected = [(e["step"], e["loss"]) for e in read_events(str(events), "pretrain") if e["kind"] == "train"]
    assert [(row["train/step"], row["train/loss"]) for row in run.history if "train/step" in row] == expected


def test_every_documented_metric_arrives_once_despite_failures(tmp_path: Path, server: WandbServer) -> None:
    events = tmp_path / "events"
    server.fail("UpsertBucket", 503, 1)
    server.fail("file_stream", 500, 2)
    server.fail("PUT", 500, 1)
    synthetic_run.interrupted(events)
    synthetic_run.driver(events)
    messages = send(events)
    assert server.failures >= 3
    synthetic_run.resumed(events)
    server.fail("file_stream", 500, 1)
    send(events)
    run = only_run(server)
    assert messages == [f"W&B: {server.url}/tests/p/runs/{run.name}"]
    assert_nothing_twice(run)
    assert_agrees_with_the_files(run, events)
    synthetic_run.pools(events)
    for stage in ("tokenizer", "extract"):
        send(events, stage)
    assert {name for each in server.runs.values() for name in names(each)} == promised_at_wandb()
    assert all(is_delivered(str(events), stage) for stage in ("pretrain", "tokenizer", "extract"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_run_has_its_group_job_type_tags_and_configuration(tmp_path: Path, server: WandbServer) -> None:
    events = synthetic_run.whole_run(tmp_path)
    send(events, tags=("emoji", "5m"))
    send(events, "extract", config={"name": "emoji"})
    pretrain, extract = server.runs.values()
    name = (events / "run.id").read_text().strip()
    assert (pretrain.name, pretrain.title, pretrain.job_type, pretrain.tags) == (
        f"{name}-pretrain",
        "emoji-pretrain",
        "pretrain",
        ["emoji", "5m"],
    )
    assert pretrain.group == extract.group == f"emoji-{name}"
    settings = pretrain.settings()
    assert settings["model"] == {"dim": 256} and extract.settings() == {"name": "emoji"}
    assert settings["start"]["code"] == "v0.5.0-3-gabc1234" and settings["start"]["versions"]["deepspeed"] == "0.19.8"
    assert settings["start"]["world_size"] == 1  # as it was resumed
    assert pretrain.exit_code == extract.exit_code == 0
    assert len([file for file in pretrain.files if file.startswith("media/images/samples/")]) == 2
    [row] = [row for row in pretrain.history if "samples/image" in row]
    assert row["samples/image"]["caption"] == "a grinning cat\npizza"


def test_late_events_of_another_host_are_rows_behind_those_sent(tmp_path: Path, server: WandbServer) -> None:
    events = tmp_path / "events"
    events.mkdir()

    def append(attempt: int, time: float, **fields: Any) -> None:
        with open(events / f"pretrain-{attempt:03d}.jsonl", "a") as file:
            file.write(json.dumps({"time": time, "stage": "pretrain", **fields}) + "\n")

    append(1, 100.0, kind="worker_failure", cause="the driver's own event, seen at once")
    append(1, 101.0, kind="resized", from_workers=2, to_workers=1, reason="lost")
    send(events)
    for step in (1, 2, 3):
        append(0, 50.0 + step, kind="train", step=step, loss=float(step))  # before, and brought here later
    append(1, 102.0, kind="resized", from_workers=1, to_workers=2, reason="back")
    send(events)
    run = only_run(server)
    assert_nothing_twice(run)
    assert [row["train/step"] for row in run.history if "train/step" in row] == [1, 2, 3]
    assert [row["resized/total"] for row in run.history if "resized/total" in row] == [1, 2]
    assert len(run.history) == 6


def test_alerts_name_what_happened_and_are_sent_once(tmp_path: Path, server: WandbServer) -> None:
    events = tmp_path / "events"
    synthetic_run.interrupted(events)
    send(events)
    synthetic_run.driver(events)
    synthetic_run.resumed(events)
    send(events)
    alerts = only_run(server).alerts
    assert sorted(alert.split(":")[0] for alert in alerts) == [
        "checkpoint failed", "checkpoint rejected", "failed", "loss spike", "non-finite batch", "worker failure",
    ]  # fmt: skip
    assert "non-finite batch: emoji pretrain | step 30: batch skipped: loss nan and grad_norm inf (samples 3, 17, 99)" in alerts
    assert only_run(server).exit_code == 0


def test_a_stage_that_is_begun_anew_is_a_new_run(tmp_path: Path, server: WandbServer) -> None:
    events = synthetic_run.whole_run(tmp_path)
    send(events)
    with EventLog(str(events), "pretrain") as log:
        synthetic_run.start(log)
        synthetic_run.train(log, 10, loss=1.25)
    send(events)
    first, second = server.runs.values()
    assert second.name == f"{first.name}-2" and second.title == "emoji-pretrain-2"
    assert [row["train/loss"] for row in second.history if "train/loss" in row] == [1.25]
    send(events)
    assert len(server.runs) == 2 and len(second.history) == 2


DRIVER = """
import sys, time
from pathlib import Path
from oar_scale.config.loading import load_recipe
from oar_scale.observe.events import EventLog
from oar_scale.observe.watch import watching
from tests.observe import synthetic_run
folder, first = Path(sys.argv[1]), int(sys.argv[2])
events = folder / "events"
with watching(str(events), "pretrain", load_recipe(sys.argv[3]), str(folder), wait_s=600), EventLog(str(events), "pretrain") as log:
    synthetic_run.start(log, first)
    for step in range(first + 10, 101, 10):
        synthetic_run.train(log, step)
        print(step, flush=True)
        time.sleep(0.01 if first else 3600 if step == 80 else 0.4)  # the first one is killed before its end, however late that is
    log.emit("end", step=100, seconds=1.0)
"""


@pytest.fixture
def drive(tmp_path: Path) -> Callable[[int], subprocess.Popen[str]]:
    """Starts a driver of the stage, from a step on."""
    path = tmp_path / "recipe.yaml"
    path.write_text("name: emoji\nobserve: {wandb: online}\n")

    def start(first: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, str(tmp_path), str(first), str(path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    return start


def kill_at(driver: subprocess.Popen[str], step: int) -> None:
    """Kill a driver once it has printed that it is at this step."""
    assert driver.stdout is not None
    while driver.stdout.readline() != f"{step}\n":
        pass
    driver.kill()
    driver.wait()


def test_a_killed_drivers_run_is_resumed(tmp_path: Path, server: WandbServer, drive: Callable[[int], subprocess.Popen[str]]) -> None:
    killed = drive(0)
    kill_at(killed, 60)
    assert drive(40).wait() == 0
    run = only_run(server)
    assert_nothing_twice(run)
    assert_agrees_with_the_files(run, tmp_path / "events")
    assert [row["start/start_step"] for row in run.history if "start/start_step" in row] == [0, 40]


def test_a_killed_driver_is_an_alert_and_its_run_has_failed(
    tmp_path: Path, server: WandbServer, drive: Callable[[int], subprocess.Popen[str]]
) -> None:
    """The process beside it tells W&B and the hook, as it cannot; the W&B run is no finished one."""
    command = [sys.executable, "-c", f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(sys.stdin.read())"]
    (tmp_path / "recipe.yaml").write_text(f"name: emoji\nobserve: {{wandb: online, notify: {{command: {json.dumps(command)}}}}}\n")
    killed = drive(0)
    kill_at(killed, 20)
    server.wait_until(lambda: server.runs and only_run(server).exit_code is not None)
    run = only_run(server)
    assert run.exit_code == 1
    [alert] = run.alerts
    assert alert.startswith("driver lost: emoji pretrain | the driver was killed")
    wait_until(lambda: (tmp_path / "told").exists() and (tmp_path / "told").read_text())
    told = json.loads((tmp_path / "told").read_text())
    assert (told["kind"], told["run"]) == ("driver_lost", "emoji") and told["step"] >= 20


def test_a_final_failure_is_an_alert_and_the_run_has_failed(tmp_path: Path, server: WandbServer) -> None:
    events = tmp_path / "events"
    with pytest.raises(RuntimeError), watching(str(events), "pretrain", recipe(tmp_path), str(tmp_path), wait_s=600.0):
        with EventLog(str(events), "pretrain") as log:
            synthetic_run.start(log)
        raise RuntimeError("out of memory")
    run = only_run(server)
    assert run.exit_code == 1
    assert run.alerts == ["failed: emoji pretrain | the stage has ended: RuntimeError: out of memory"]


@pytest.mark.parametrize("sender", ["waits for the server", "is suspended"])
def test_the_next_driver_takes_over_from_a_stuck_sender(
    sender: str, tmp_path: Path, server: WandbServer, drive: Callable[[int], subprocess.Popen[str]]
) -> None:
    """The sender of a killed driver still holds the W&B run when the next driver begins and ends: every row arrives, once."""
    server.stall("file_stream", times=1)
    killed = drive(0)
    server.wait_until(lambda: server.held)
    stuck = psutil.Process(killed.pid).children(recursive=True)
    if sender == "is suspended":
        for process in stuck:
            process.suspend()
    killed.kill()
    killed.wait()
    assert drive(40).wait() == 0
    assert not psutil.wait_procs(stuck, timeout=600)[1]
    assert server.held == 1
    server.release()  # the request of the first sender counts only now
    run = only_run(server)
    assert_nothing_twice(run)
    assert_agrees_with_the_files(run, tmp_path / "events")
    assert [row["start/start_step"] for row in run.history if "start/start_step" in row] == [0, 40]
    assert is_delivered(str(tmp_path / "events"), "pretrain")


def test_a_killed_sender_loses_and_doubles_no_row(tmp_path: Path, server: WandbServer) -> None:
    """Rows arrive while the stage runs; those that a killed sender had not sent are sent when the stage is resumed."""
    events = tmp_path / "events"
    with watching(str(events), "pretrain", recipe(tmp_path), str(tmp_path)), EventLog(str(events), "pretrain") as log:
        synthetic_run.start(log)
        for step in (10, 20, 30):
            synthetic_run.train(log, step)
        server.wait_until(lambda: server.runs and only_run(server).history)
        arrived = len(only_run(server).history)
        for step in (40, 50, 60):
            synthetic_run.train(log, step)
        sender, *_ = wandb_processes()
        sender.kill()
    assert 0 < arrived <= len(only_run(server).history)
    synthetic_run.resumed(events)
    send(events)
    assert_nothing_twice(only_run(server))
    assert_agrees_with_the_files(only_run(server), events)


def test_a_server_that_stops_answering_gets_the_rest_later(tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture) -> None:
    """The end of the stage does not wait for it: here it answers only after that."""
    events = tmp_path / "events"
    server.stall("file_stream")
    with watching(str(events), "pretrain", recipe(tmp_path), str(tmp_path), wait_s=5.0):
        synthetic_run.interrupted(events)
        server.wait_until(lambda: server.held)
    assert "the rest is sent when the run is resumed" in caplog.text
    assert server.held and not only_run(server).history
    server.release()
    synthetic_run.resumed(events)
    send(events)
    assert_nothing_twice(only_run(server))
    assert_agrees_with_the_files(only_run(server), events)


def test_a_client_that_hangs_is_killed_at_the_end(tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture) -> None:
    """It holds nothing up and leaves no process."""
    events = tmp_path / "events"
    with watching(str(events), "pretrain", recipe(tmp_path), str(tmp_path), wait_s=2.0):
        synthetic_run.interrupted(events)
        server.wait_until(lambda: server.runs)
        started = wandb_processes()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):  # a helper that has ended
                process.suspend()
    assert "did not finish with pretrain within 2 s" in caplog.text
    assert len(started) >= 2 and not psutil.wait_procs(started, timeout=600)[1]


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_an_unreachable_server_leaves_an_offline_run(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))  # nobody else gets the port meanwhile
    port = listener.getsockname()[1]
    if how == "silent":
        listener.listen()  # takes connections, and never answers
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    events = tmp_path / "events"
    with watching(str(events), "pretrain", recipe(tmp_path), str(tmp_path), wait_s=600.0):
        synthetic_run.interrupted(events)
    listener.close()
    assert "no answer" in caplog.text
    [run] = offline_runs(tmp_path)
    assert [row["train/step"] for row in run.history if "train/step" in row] == [10, 20, 30, 40, 50, 60]
    assert not is_delivered(str(events), "pretrain")  # it is tried again


def test_a_run_kept_offline_is_sent_whole_once_it_answers(tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    events = tmp_path / "events"
    synthetic_run.interrupted(events)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    send(events)
    assert len(offline_runs(tmp_path)) == 1
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    send(events)
    assert_agrees_with_the_files(only_run(server), events)
    assert not offline_runs(tmp_path)  # all of it is at the server


def test_a_refused_key_is_a_warning_and_an_offline_run(tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture) -> None:
    events = tmp_path / "events"
    synthetic_run.interrupted(events)
    server.fail("UpsertBucket", 401, 1000)
    send(events)
    assert "kept offline" in caplog.text
    assert len(offline_runs(tmp_path)) == 1


def test_silence_is_an_alert_once(tmp_path: Path, server: WandbServer) -> None:
    events = tmp_path / "events"
    with watching(str(events), "pretrain", recipe(tmp_path, stall_s=0.5), str(tmp_path)):
        with EventLog(str(events), "pretrain") as log:
            synthetic_run.start(log)
        server.wait_until(lambda: server.runs and only_run(server).alerts)
    [alert] = only_run(server).alerts
    assert alert.startswith("stall: emoji pretrain | no progress for ")


def test_the_exported_model_is_an_artifact_where_asked_for(tmp_path: Path, server: WandbServer) -> None:
    events = synthetic_run.whole_run(tmp_path)
    model = tmp_path / "any_order.safetensors"
    model.write_bytes(b"weights")
    send(events)
    assert not server.artifacts
    with EventLog(str(events), "pretrain") as log:
        log.emit("end", step=100, seconds=1.0)
    send(events, artifact=str(model))
    assert set(server.artifacts.values()) == {"COMMITTED"}
