"""/metrics and /healthz over HTTP, and what is made of them: the dashboard and the alert rules."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML
from waiting import wait_until

from oar_scale.config.schema import ObserveConfig, Recipe
from oar_scale.launch.job_metrics import JOB_METRICS
from oar_scale.observe import prometheus as metrics
from oar_scale.observe import watch
from oar_scale.observe.events import EventLog
from oar_scale.observe.failure import Ending
from oar_scale.observe.prometheus import METRICS, MetricsServer, show_ending
from oar_scale.observe.watch import watching
from tests.observe import synthetic_run
from tests.observe.documented import promised_metrics

GRAFANA = Path(__file__).resolve().parents[2] / "cluster" / "grafana"


@contextmanager
def serving(events: Path, stage: str = "pretrain") -> Iterator[MetricsServer]:
    server = MetricsServer(str(events), stage, "emoji", ObserveConfig(metrics_port=0, stall_s=600.0), lambda text: None)
    try:
        yield server
    finally:
        server.stop(1.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """That of the server: it stands still but for what is added to ``now``."""
    now_clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now_clock.now, time=time.time))
    return now_clock


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=600) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(text: str) -> dict[str, float]:
    """``name{labels without run and stage}`` and value."""
    entries = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
            own = [label for label in labels.split(",") if not label.startswith(("run=", "stage="))]
            entries[name + (f"{{{','.join(own)}}}" if own else "")] = float(value)
    return entries


def exposed(folder: Path) -> set[str]:
    """The metrics of all stages of a run in which everything happened."""
    events = synthetic_run.whole_run(folder)
    names: set[str] = set()
    for stage in ("pretrain", "tokenizer", "extract"):
        with serving(events, stage) as server:
            names |= {name.partition("{")[0] for name in samples(get(f"{server.url}/metrics")[1])}
    return names


def test_metrics_follow_the_events_and_count_all_attempts(tmp_path: Path) -> None:
    events = tmp_path / "events"
    synthetic_run.interrupted(events)
    with serving(events) as server:
        before = samples(get(f"{server.url}/metrics")[1])
        assert before["oar_step"] == 60 and before["oar_loss"] == synthetic_run.loss_at(60) and before["oar_starts_total"] == 1
        synthetic_run.driver(events)
        synthetic_run.resumed(events)
        after = samples(get(f"{server.url}/metrics")[1])
    assert (after["oar_step"], after["oar_target_step"], after["oar_world_size"], after["oar_starts_total"]) == (100, 100, 1, 2)
    assert after['oar_state{doing="done"}'] == 1 and after['oar_state{doing="running"}'] == 0
    assert after['oar_loss_by_position{quarter="4"}'] == pytest.approx(synthetic_run.loss_at(100) - 0.4)
    assert after['oar_heldout_nll{orders="ema"}'] == pytest.approx(synthetic_run.loss_at(100) + 0.08)
    assert (after["oar_checkpoint_step"], after["oar_memory_bytes"], after["oar_disk_free_bytes"]) == (100, 1500 * 2**20, 80e9)
    counted = ("bad_samples", "storage_retries", "non_finite", "spikes", "worker_failures", "resizes")
    assert [after[f"oar_{name}_total"] for name in counted] == [1] * len(counted)
    assert after["oar_skipped_batches_total"] == 2  # step 60 was done twice


def test_metrics_have_help_and_type_and_labels_are_escaped(tmp_path: Path) -> None:
    events = tmp_path / "events"
    with EventLog(str(events), "pretrain") as log:
        synthetic_run.start(log, code='v1 "dirty"\\\n')
    with serving(events) as server:
        text = get(f"{server.url}/metrics")[1]
    assert 'code="v1 \\"dirty\\"\\\\\\n"' in text
    for name in samples(text.replace('\\"dirty\\"\\\\\\n', "")):
        bare = name.partition("{")[0]
        assert f"# HELP {bare} " in text and f"# TYPE {bare} " in text


def test_a_number_that_was_not_finite_is_left_out(tmp_path: Path) -> None:
    events = tmp_path / "events"
    with EventLog(str(events), "pretrain") as log:
        synthetic_run.start(log)
        synthetic_run.train(log, 10, loss=float("nan"))
    with serving(events) as server:
        values = samples(get(f"{server.url}/metrics")[1])
    assert "oar_loss" not in values and values["oar_step"] == 10


def test_health_turns_with_progress(tmp_path: Path, clock: SimpleNamespace) -> None:
    events = tmp_path / "events"
    with serving(events) as server, EventLog(str(events), "pretrain") as log:
        synthetic_run.start(log)
        synthetic_run.train(log, 10)
        assert get(f"{server.url}/healthz") == (200, "running, step 10 of 100, last progress 0 s ago\n")
        clock.now += 601
        log.emit("worker_failure", cause="lost")  # no progress
        status, text = get(f"{server.url}/healthz")
        assert status == 503 and text.startswith("stalled: no progress for ")
        synthetic_run.train(log, 20)
        assert get(f"{server.url}/healthz")[0] == 200
        log.emit("end", step=100, seconds=1.0)
        clock.now += 601
        assert get(f"{server.url}/healthz")[0] == 200  # done is not stalled


def test_a_stage_that_never_begins_is_stalled(tmp_path: Path, clock: SimpleNamespace) -> None:
    events = synthetic_run.whole_run(tmp_path)
    with serving(events) as server:
        assert get(f"{server.url}/healthz")[0] == 200
        clock.now += 601
        assert get(f"{server.url}/healthz")[0] == 503


def test_health_tells_of_a_failure_and_its_address_is_in_a_file(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"name": "emoji", "observe": {"metrics_port": 0}})
    events, seen = tmp_path / "events", []
    with serving(events) as server:
        server.fail(RuntimeError("out of memory at http://me:hunter22@store/\nlong trace"))
        assert get(f"{server.url}/healthz") == (503, "failed: RuntimeError: out of memory at http://***@store/\n")
        assert get(f"{server.url}/else")[0] == 404
    with pytest.raises(RuntimeError), watching(str(events), "pretrain", recipe, str(tmp_path)):
        [report] = json.loads((tmp_path / "metrics.json").read_text())
        seen += [get(f"http://{target}/healthz")[0] for target in report["targets"]]
        raise RuntimeError("stop")
    assert seen == [200] and report["targets"][0].startswith("127.0.0.1:")
    assert not (tmp_path / "metrics.json").exists()


def shown_at_the_end(server: MetricsServer, how: Ending) -> list[dict[str, float]]:
    """What a scraper sees that comes after the driver has ended; empty where the driver does not wait for it."""
    seen: list[dict[str, float]] = []

    def scrape() -> None:
        while not seen and not ended.wait(0.01):
            with contextlib.suppress(urllib.error.URLError):
                seen.append(samples(get(f"{server.url}/metrics")[1]))

    ended = threading.Event()
    scraper = threading.Thread(target=scrape)
    scraper.start()
    show_ending(server.events, how)
    ended.set()
    scraper.join()
    return seen


@pytest.mark.parametrize(("scraped", "how"), [(True, "failed"), (True, "done"), (True, "stopped"), (False, "failed"), (False, "done")])
def test_a_driver_stays_until_its_end_was_seen(scraped: bool, how: Ending, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody ever looked it waits for nobody, but after a failure, which may come before Prometheus has found it."""
    monkeypatch.setattr(metrics, "SEEN_S", 600.0)
    monkeypatch.setattr(metrics, "SEEN_STOPPED_S", 600.0)
    events = tmp_path / "events"
    synthetic_run.interrupted(events)
    with serving(events) as server:
        if scraped:
            get(f"{server.url}/metrics")
    if (scraped, how) == (False, "done"):
        assert shown_at_the_end(server, how) == []
        return
    [values] = shown_at_the_end(server, how)
    assert (
        values[f'oar_ended_timestamp_seconds{{how="{how}"}}']
        == values["oar_driver_timestamp_seconds"]
        >= values["oar_begun_timestamp_seconds"]
    )
    assert not (tmp_path / "metrics.json").exists()
    assert shown_at_the_end(server, "done") == []  # it was seen


def test_a_driver_stays_until_every_replica_has_seen_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas of Prometheus ask in turn; the first that asks must not take the end from the other."""
    monkeypatch.setattr(metrics, "SEEN_S", 600.0)

    def ask(server: MetricsServer, source: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600, source_address=(source, 0))
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()

    with serving(tmp_path / "events") as server:
        for source in ("127.0.0.2", "127.0.0.3"):
            ask(server, source)
    ending = threading.Thread(target=show_ending, args=(server.events, "done"), daemon=True)
    ending.start()
    wait_until((tmp_path / "metrics.json").exists)
    for _ in range(3):
        assert "oar_ended_timestamp_seconds{" in ask(server, "127.0.0.2")
    assert not server._seen.is_set() and ending.is_alive()
    assert "oar_ended_timestamp_seconds{" in ask(server, "127.0.0.3")
    ending.join()


def test_an_end_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run of the same process, in the same folder, is another story. Nobody has asked: the wait is short."""
    waits: list[float] = []
    monkeypatch.setattr(MetricsServer, "show_ending", lambda self, how, wait_s: waits.append(wait_s))
    with serving(tmp_path / "events") as server:
        pass
    show_ending(server.events, "failed")
    show_ending(server.events, "failed")
    assert waits == [metrics.SEEN_STOPPED_S]


def test_counters_wait_for_the_events_of_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the storage is away as the driver begins, they would start at 0, and jump by all faults of the past when it is back."""
    reachable = threading.Event()

    def pull(root: str, folder: str) -> None:
        if not reachable.is_set():
            raise OSError("no answer")
        if not (Path(folder) / "pretrain-000.jsonl").exists():
            synthetic_run.driver(Path(folder))

    monkeypatch.setattr(watch, "pull", pull)
    recipe = Recipe.model_validate({"name": "emoji", "observe": {"metrics_port": 0, "mirror_s": 0.1}})
    with watching(str(tmp_path / "events"), "pretrain", recipe, "s3://bucket/run"):
        [report] = json.loads((tmp_path / "metrics.json").read_text())
        url = f"http://{report['targets'][0]}/metrics"
        assert "_total{" not in get(url)[1]
        reachable.set()
        wait_until(lambda: samples(get(url)[1]).get("oar_worker_failures_total") == 1)


def test_speed_and_straggler_are_compared(tmp_path: Path) -> None:
    events = tmp_path / "events"
    with EventLog(str(events), "pretrain") as log:
        synthetic_run.start(log)
        for step in range(10, 310, 10):
            synthetic_run.train(log, step, images_per_s=60.0)
        synthetic_run.train(log, 310, images_per_s=45.0)
    with serving(events) as server:
        values = samples(get(f"{server.url}/metrics")[1])
    assert values["oar_speed_ratio"] == 0.75
    assert values['oar_straggling_ratio{host="node-2",rank="1"}'] == pytest.approx(1.1)


def test_a_port_that_is_taken_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path / "events") as server:
        recipe = Recipe.model_validate({"name": "emoji", "observe": {"metrics_port": server.port}})
        with watching(str(tmp_path / "events"), "pretrain", recipe, str(tmp_path)):
            pass
    assert "/metrics: OSError" in caplog.text


def test_the_documentation_names_exactly_the_served_metrics(tmp_path: Path) -> None:
    served = exposed(tmp_path)
    later = {"oar_remaining_seconds", "oar_speed_ratio", "oar_ended_timestamp_seconds"}  # with time, many events, and at the end
    assert served | later == promised_metrics()
    assert promised_metrics() == {metric.name for metric in METRICS}


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    board = json.loads((GRAFANA / "dashboard.json").read_text())
    assert board["uid"] == "oar-scale" and [v["type"] for v in board["templating"]["list"]] == ["datasource", "query", "query"]
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert set(re.findall(r"oar_\w+", " ".join(expressions))) == promised_metrics()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    assert all('run=~"$run"' in expression and 'stage=~"$stage"' in expression for expression in expressions)


def test_alert_rules_name_metrics_and_cover_what_must_be_known() -> None:
    rules = [rule for group in YAML(typ="safe").load((GRAFANA / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in rules} >= {
        "OarStalled", "OarNoCheckpoint", "OarNonFinite", "OarSpike", "OarWaitsForData", "OarRestarts", "OarTargetDown",
        "OarFailed", "OarGone", "OarNotContinued", "OarJobFailed", "OarJobPending", "OarPending", "OarSlow", "OarStraggler",
    }  # fmt: skip
    for rule in rules:
        named = set(re.findall(r"\b(?:oar_\w+|up)\b", rule["expr"]))
        assert (named and named <= promised_metrics() | set(JOB_METRICS) | {"up"}) or "DCGM_FI_DEV_" in rule["expr"], rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]
