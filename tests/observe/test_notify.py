"""Alerts to a real web server and a real command: what they get, and that nothing they do reaches the training."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
from waiting import wait_until

from oar_scale.config.loading import load_recipe
from oar_scale.config.run_sections import AlertKind
from oar_scale.config.schema import Recipe
from oar_scale.errors import Requeue, UserError
from oar_scale.observe import notify
from oar_scale.observe.events import EventLog, read_events
from oar_scale.observe.failure import RETRIED, reporting_failure
from oar_scale.observe.wandb_process import tell_lost
from oar_scale.observe.watch import wandb_spec, watching
from tests.observe import synthetic_run

SECRET = "T0SECRET/B0SECRET/xoxsecretpath"


class Web:
    """Takes alerts; the first ``refusals`` of them with status 500."""

    def __init__(self, refusals: int = 0) -> None:
        self.alerts: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.refusals = refusals
        self.status = 500
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                web.paths.append(self.path)
                if web.refusals > 0:
                    web.refusals -= 1
                    self.send_response(web.status)
                    self.send_header("Location", "/elsewhere")
                    self.end_headers()
                    return
                assert self.headers["Content-Type"] == "application/json"
                web.alerts.append(json.loads(body))
                self.send_response(204)
                self.end_headers()

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def kinds(self) -> list[str]:
        return [alert["kind"] for alert in self.alerts]


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """OAR_HOOK holds its address."""
    running = Web()
    monkeypatch.setenv("OAR_HOOK", f"http://127.0.0.1:{running.http.server_address[1]}/{SECRET}")
    monkeypatch.setattr(notify, "PAUSE_S", 0.0)
    monkeypatch.delenv(RETRIED, raising=False)
    yield running
    running.http.shutdown()
    running.http.server_close()


def recipe(folder: Path, stall_s: float = 600.0, **fields: Any) -> Recipe:
    return Recipe.model_validate({"name": "emoji", "run_dir": str(folder), "observe": {"stall_s": stall_s, "notify": fields}})


def watched(folder: Path, used: Recipe) -> Any:
    return watching(str(folder / "events"), "pretrain", used, str(folder), wait_s=600.0)


def test_a_webhook_and_a_command_get_each_alert_as_json(tmp_path: Path, web: Web) -> None:
    got = tmp_path / "got.jsonl"
    command = (sys.executable, "-c", f"import sys; open({str(got)!r}, 'a').write(sys.stdin.read() + chr(10))")
    with watched(tmp_path, recipe(tmp_path, webhook="$OAR_HOOK", command=command)):
        synthetic_run.interrupted(tmp_path / "events")
        synthetic_run.driver(tmp_path / "events")
    assert web.kinds == ["non_finite", "spike", "checkpoint_failed", "worker_failure"]
    assert [json.loads(line) for line in got.read_text().splitlines()] == web.alerts
    spike = web.alerts[1]
    assert spike.pop("time") > 1e9 and spike.pop("host")
    assert spike == {
        "version": 1,
        "kind": "spike",
        "severity": "warning",
        "title": "loss spike: emoji pretrain",
        "text": "step 30: loss 9.000 where 3.200 was expected; going on",
        "run": "emoji",
        "stage": "pretrain",
        "step": 30,
        "run_dir": str(tmp_path),
        "root": str(tmp_path),
    }


def test_the_command_for_slack_of_the_guide_works(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    [code] = re.findall(r"For Slack, .*:\n\n((?:    .*\n)+)", guide)
    (tmp_path / "tell.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("SLACK_URL", os.environ["OAR_HOOK"])
    with watched(tmp_path, recipe(tmp_path, command=(sys.executable, str(tmp_path / "tell.py")), kinds=("worker_failure",))):
        synthetic_run.driver(tmp_path / "events")
    [message] = web.alerts
    assert message["text"].startswith("*worker failure: emoji pretrain*\nthe workers failed: ActorDiedError: rank 1\n`oar status ")


def test_the_alert_of_the_guide_has_the_keys_that_are_sent(tmp_path: Path, web: Web) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    [shown] = re.findall(r'^    (\{"version": 1.*?\})\n', guide, re.DOTALL | re.MULTILINE)
    with watched(tmp_path, recipe(tmp_path, webhook="$OAR_HOOK")):
        synthetic_run.interrupted(tmp_path / "events")
    assert set(json.loads(shown)) == set(web.alerts[0])
    assert all(f"`{kind}`" in guide for kind in get_args(AlertKind))


def test_only_what_is_asked_for_is_sent_and_nothing_of_the_past(tmp_path: Path, web: Web) -> None:
    synthetic_run.driver(tmp_path / "events")  # an earlier attempt's
    with watched(tmp_path, recipe(tmp_path, webhook="$OAR_HOOK", kinds=("spike", "worker_failure"))):
        synthetic_run.interrupted(tmp_path / "events")
    assert web.kinds == ["spike"]


@pytest.mark.parametrize("stage", ["pretrain", "extract"])
def test_a_failure_is_an_event_and_an_alert(stage: str, tmp_path: Path, web: Web) -> None:
    events = tmp_path / "events"
    used = recipe(tmp_path, webhook="$OAR_HOOK")
    with pytest.raises(RuntimeError), watching(str(events), stage, used, str(tmp_path), wait_s=600.0):
        raise RuntimeError("out of memory\nlong trace")
    [event] = read_events(str(events), stage)
    assert (event["kind"], event["cause"], event["final"], event["pid"]) == ("failed", "RuntimeError: out of memory", True, os.getpid())
    [alert] = web.alerts
    assert (alert["kind"], alert["severity"], alert["stage"]) == ("failed", "critical", stage)
    assert alert["text"] == "the stage has ended: RuntimeError: out of memory"


def test_a_secret_in_an_error_is_in_no_alert(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_TOKEN", "s3cr3tvalue")
    used = recipe(tmp_path, webhook="$OAR_HOOK")
    with pytest.raises(RuntimeError), watched(tmp_path, used):
        raise RuntimeError("http://me:hunter22@store/?sig=abcdef refuses s3cr3tvalue")
    assert web.alerts[0]["text"] == "the stage has ended: RuntimeError: http://***@store/?sig=*** refuses ***"


@pytest.mark.parametrize("stop", [Requeue("SIGUSR1"), KeyboardInterrupt(), SystemExit(143)], ids=["requeue", "ctrl-c", "sigterm"])
def test_a_stop_on_request_is_no_failure(stop: BaseException, tmp_path: Path, web: Web) -> None:
    with pytest.raises(type(stop)), watched(tmp_path, recipe(tmp_path, webhook="$OAR_HOOK")):
        raise stop
    assert not web.alerts and not read_events(str(tmp_path / "events"), "pretrain")


@pytest.mark.parametrize(("error", "final"), [(RuntimeError("node"), False), (UserError("recipe"), True)])
def test_a_driver_that_its_job_starts_again_says_so(
    error: Exception, final: bool, tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRIED, "1")
    with pytest.raises(type(error)), watched(tmp_path, recipe(tmp_path, webhook="$OAR_HOOK")):
        raise error
    [event] = read_events(str(tmp_path / "events"), "pretrain")
    assert event["final"] is final
    assert web.alerts[0]["text"].endswith("its job starts it again") is not final


def test_a_task_of_an_array_reports_its_own_failure(tmp_path: Path, web: Web) -> None:
    """It is not watched: the first task is."""
    used = recipe(tmp_path, webhook="$OAR_HOOK")
    with pytest.raises(RuntimeError), reporting_failure(str(tmp_path / "events"), "extract", used, str(tmp_path)):
        raise RuntimeError("task 3")
    assert web.kinds == ["failed"]


def test_a_failed_delivery_is_tried_again(tmp_path: Path, web: Web, caplog: pytest.LogCaptureFixture) -> None:
    web.refusals = 2
    with watched(tmp_path, recipe(tmp_path, webhook="$OAR_HOOK", kinds=("spike",))):
        synthetic_run.interrupted(tmp_path / "events")
    assert web.kinds == ["spike"] and len(web.paths) == 3
    assert "observe.notify" not in caplog.text


def test_silence_is_an_alert_once(tmp_path: Path, web: Web) -> None:
    with watched(tmp_path, recipe(tmp_path, stall_s=0.2, webhook="$OAR_HOOK")):
        wait_until(lambda: web.alerts)
    assert web.kinds == ["pending"]  # no worker has started


def broken(how: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of a hook that does not work."""
    match how:
        case "refuses":
            return {"webhook": "$OAR_HOOK"}
        case "is elsewhere":
            return {"webhook": "$OAR_HOOK"}
        case "is not there":
            monkeypatch.setenv("OAR_HOOK", f"http://127.0.0.1:9/{SECRET}")
        case "is no address":
            monkeypatch.setenv("OAR_HOOK", f"hooks.example/{SECRET}")
        case "is not set":
            monkeypatch.delenv("OAR_HOOK")
        case "command fails":
            return {"command": ("sh", "-c", "exit 3")}
        case "no such command":
            return {"command": ("/no/such/program",)}
        case "command hangs":
            monkeypatch.setattr(notify, "TRY_S", 0.2)
            return {"command": ("sh", "-c", "sleep 3600 & sleep 3600")}
    return {"webhook": "$OAR_HOOK"}


@pytest.mark.parametrize(
    "how", ["refuses", "is elsewhere", "is not there", "is no address", "is not set", "command fails", "no such command", "command hangs"]
)
def test_a_hook_that_fails_is_one_warning(
    how: str, tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stage goes on to its end, and its address is nowhere."""
    web.refusals = 1000
    web.status = 302 if how == "is elsewhere" else 500
    settings = broken(how, monkeypatch)
    with pytest.raises(RuntimeError), caplog.at_level(logging.INFO), watched(tmp_path, recipe(tmp_path, **settings)):
        synthetic_run.interrupted(tmp_path / "events")
        raise RuntimeError("the stage's own error")
    assert caplog.text.count("did not take an alert") == 1
    assert SECRET not in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_a_webhook_that_never_ends_its_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends a byte now and then, so that no limit between two bytes is ever reached."""
    over = threading.Event()

    class Dripping(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with suppress(OSError):
                while not over.wait(0.01):
                    self.wfile.write(b"H")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OAR_HOOK", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setattr(notify, "PAUSE_S", 0.0)
    monkeypatch.setattr(notify, "TRY_S", 0.5)
    hook = notify.Hook(str(tmp_path / "events"), "pretrain", recipe(tmp_path, webhook="$OAR_HOOK"), str(tmp_path))
    sending = threading.Thread(target=hook.send, args=("failed", "a", 0.0), daemon=True)
    sending.start()
    sending.join(120.0)
    assert not sending.is_alive()
    over.set()
    server.shutdown()
    server.server_close()


def test_a_stage_done_anew_is_compared_with_itself_alone(tmp_path: Path, web: Web) -> None:
    """Its first time was three times as fast: on other nodes, or with another model."""
    with EventLog(str(tmp_path / "events"), "pretrain") as log:
        synthetic_run.start(log)
        for step in range(30):
            synthetic_run.train(log, step, images_per_s=180.0)
        log.emit("end", step=30, seconds=1.0)
    with watched(tmp_path, recipe(tmp_path, webhook="$OAR_HOOK")), EventLog(str(tmp_path / "events"), "pretrain") as log:
        synthetic_run.start(log)
        for step in range(30):
            synthetic_run.train(log, step, images_per_s=60.0)
    assert web.kinds == []


def test_faults_of_another_host_that_come_late_are_no_alerts(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(tmp_path, recipe(tmp_path, webhook="$OAR_HOOK")), EventLog(str(tmp_path / "events"), "pretrain") as log:
        log.emit("spike", step=1, loss=9.0, expected=3.0, action="warn")
        path = next((tmp_path / "events").glob("pretrain-*.jsonl"))
    assert web.kinds == ["spike"]
    line = json.loads(path.read_text()) | {"kind": "worker_failure", "cause": "a", "time": time.time() - 7200}
    with watched(tmp_path, recipe(tmp_path, webhook="$OAR_HOOK")):
        path.with_name("pretrain-007.jsonl").write_text(json.dumps(line) + "\n")
    assert web.kinds == ["spike"]


@pytest.mark.parametrize("left", ["failed", "end"])
def test_a_killed_driver_is_told_whatever_was_before_it(left: str, tmp_path: Path, web: Web) -> None:
    events, used = tmp_path / "events", recipe(tmp_path, webhook="$OAR_HOOK").model_dump(mode="json")
    used["observe"]["wandb"] = "offline"
    with EventLog(str(events), "pretrain") as log:
        log.emit(left, cause="RuntimeError: a", final=True, step=1, seconds=1.0)
    tell_lost(wandb_spec(str(events), "pretrain", Recipe.model_validate(used), str(tmp_path)))
    assert web.kinds == ["driver_lost"]
    spec = wandb_spec(str(events), "pretrain", Recipe.model_validate(used), str(tmp_path))
    with EventLog(str(events), "pretrain") as log:
        log.emit(left, cause="RuntimeError: a", final=True, step=1, seconds=1.0)
    tell_lost(spec)
    assert web.kinds == ["driver_lost"]  # this one has said how it ended


def test_an_address_in_a_recipe_is_refused_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nobserve:\n  notify: {{webhook: 'https://hooks.example/{SECRET}'}}\n")
    with pytest.raises(UserError, match=r"mine.yaml:3  observe.notify\n.*the environment variable that holds the address") as refused:
        load_recipe(str(path))
    assert SECRET not in str(refused.value)
    path.write_text("name: mine\nobserve:\n  notify: {webhook: $OAR_HOOK}\n")
    assert load_recipe(str(path)).observe.notify.webhook == "$OAR_HOOK"


def test_a_slow_hook_holds_up_the_end_for_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still to be sent then is left out: the sender is a thread that does not keep the process alive."""
    go_on = tmp_path / "go on"
    used = recipe(tmp_path, command=("sh", "-c", f"while [ ! -e '{go_on}' ]; do sleep 0.05; done"))
    monkeypatch.setattr(notify, "TRY_S", 600.0)
    watcher = notify.Notifier(str(tmp_path / "events"), "pretrain", used, str(tmp_path))
    with EventLog(str(tmp_path / "events"), "pretrain") as log:
        synthetic_run.faults(log, 1)
    wait_until(lambda: watcher._queue.qsize() == 2)
    watcher.stop(0.5)
    assert watcher._sender.is_alive() and watcher._sender.daemon
    go_on.touch()
    watcher._sender.join()
