"""``/metrics`` for Prometheus and ``/healthz`` for the supervisor that restarts a hanging run, from the event files.

Every metric is one line of ``METRICS``: its name, what it is, and where in the state of the stage it comes from. What a
stage has not reported yet is left out, not zero. Counters count all attempts. The text that Prometheus reads is written by
prometheus_client, from a registry that holds this stage alone.

A driver that ends stays for a moment: until Prometheus has seen how it ended (:func:`show_ending`). A driver that is gone without that
was killed, which a rule of ``cluster/grafana/alerts.yaml`` tells apart.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Literal, cast, get_args

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from oar_scale.config.schema import ObserveConfig
from oar_scale.errors import error_line
from oar_scale.observe.events import EventReader
from oar_scale.observe.failure import Ending
from oar_scale.observe.formatting import duration
from oar_scale.observe.state import PROGRESS, StageState, StageStatus
from oar_scale.redaction import redact

log = logging.getLogger(__name__)

POLL_S = 1.0
SEEN_S = 60.0
"""How long a driver that ends waits for Prometheus to see how."""
SEEN_STOPPED_S = 15.0
"""The same where it was asked to stop: its time may be short; and where nobody has read /metrics yet."""
ASKED_S = 300.0
"""Who has not read /metrics for so long is not waited for."""

Labels = Mapping[str, str]
Sample = tuple[Labels, float | None]
"""Labels beside ``run`` and ``stage``, and a value; None for what the stage has not reported."""


@dataclass(frozen=True)
class MetricDefinition:
    """One metric: its name, type and help text at Prometheus, and how its samples follow from the stage's state."""

    name: str
    type: Literal["gauge", "counter"]
    help: str
    samples: Callable[[MetricsView], Iterable[Sample]]


@dataclass(frozen=True)
class MetricsView:
    """A stage at the time of a scrape."""

    state: StageState
    silent_s: float
    """Since it last showed progress."""
    stall_s: float
    begun: float
    """Unix time at which the driver began with it."""
    ended: tuple[Ending, float] | None
    """How the driver has ended, and when."""
    whole: bool
    """Whether the events of earlier attempts are here."""

    @property
    def checkpoint_age_s(self) -> float | None:
        """Since the newest committed checkpoint, or since the workers started where that is later."""
        times = [self.state.latest[kind]["time"] for kind in ("checkpoint", "start") if kind in self.state.latest]
        return time.time() - max(times) if "start" in self.state.latest and self.state.status != "done" else None


def _last(name: str, text: str, kind: str, field: str, scale: float = 1.0) -> MetricDefinition:
    """A number of the newest event of a kind."""

    def samples(view: MetricsView) -> Iterable[Sample]:
        value = view.state.value(kind, field)
        return [({}, None if value is None else value * scale)]

    return MetricDefinition(f"oar_{name}", "gauge", text, samples)


def _gauge(name: str, text: str, value: Callable[[MetricsView], float | None]) -> MetricDefinition:
    return MetricDefinition(f"oar_{name}", "gauge", text, lambda view: [({}, value(view))])


def _count(name: str, text: str, total: str) -> MetricDefinition:
    return MetricDefinition(f"oar_{name}_total", "counter", text, lambda view: [({}, view.state.totals[total] if view.whole else None)])


def _info(view: MetricsView) -> Iterable[Sample]:
    start = view.state.latest.get("start")
    if start is None:
        return []
    versions = {re.sub(r"\W", "_", f"{name}_version"): str(value) for name, value in start.get("versions", {}).items()}
    names = ("code", "host", "precision", "zero_stage")
    return [({**{name: str(start[name]) for name in names if name in start}, **versions}, 1)]


def _by_position(view: MetricsView) -> Iterable[Sample]:
    losses = view.state.latest.get("train", {}).get("loss_by_position") or []
    return [({"quarter": str(quarter)}, value) for quarter, value in enumerate(losses, start=1)]


def _ended(view: MetricsView) -> Iterable[Sample]:
    return [] if view.ended is None else [({"how": view.ended[0]}, view.ended[1])]


def _straggling(view: MetricsView) -> Iterable[Sample]:
    signs = view.state.signs
    return [({"rank": str(signs.slowest[0]), "host": signs.slowest[1]}, signs.straggling)] if signs.slowest else []


def _heldout(view: MetricsView) -> Iterable[Sample]:
    return [({"orders": name}, view.state.value("heldout", f"nll_{name}")) for name in ("random", "raster", "stored", "ema")]


METRICS = (
    MetricDefinition("oar_info", "gauge", "Always 1; the labels say what runs.", _info),
    MetricDefinition("oar_state", "gauge", "1 for what the stage is doing, 0 for the rest.",
           lambda view: [({"doing": each}, float(view.state.status == each)) for each in get_args(StageStatus)]),
    _gauge("driver_timestamp_seconds", "Unix time at which the driver was last at work.",
           lambda view: time.time() if view.ended is None else view.ended[1]),
    _gauge("begun_timestamp_seconds", "Unix time at which the driver began with the stage.", lambda view: view.begun),
    MetricDefinition("oar_ended_timestamp_seconds", "gauge", "Unix time at which the driver ended, and how.", _ended),
    _gauge("silent_seconds", "Time since the stage last showed progress.", lambda view: view.silent_s),
    _gauge("stall_limit_seconds", "observe.stall_s: a longer silence is a stall.", lambda view: view.stall_s),
    _gauge("step", "Steps done (of a pool: images).", lambda view: view.state.step),
    _gauge("target_step", "The step at which the stage is complete.", lambda view: view.state.steps),
    _gauge("remaining_seconds", "Time to the end at the pace of the last events.", lambda view: view.state.seconds_left()),
    _last("loss", "Training loss, nats per code.", "train", "loss"),
    MetricDefinition("oar_loss_by_position", "gauge", "Training loss by quarter of the generation order.", _by_position),
    _last("learning_rate", "Learning rate.", "train", "lr"),
    _last("gradient_norm", "Norm of the gradient before clipping.", "train", "grad_norm"),
    _last("images_per_second", "Images trained on per second, all workers.", "train", "images_per_s"),
    _gauge("images_per_second_median", "Median of the same over the stage.", lambda view: view.state.median_images_per_s),
    _gauge("speed_ratio", "Images/s of a worker over their median so far, as that of the MFU is.", lambda view: view.state.signs.speed),
    MetricDefinition("oar_straggling_ratio", "gauge", "Own time of the slowest rank in a step over that of the median rank.", _straggling),
    _last("tokens_per_second", "Codes trained on per second, all workers.", "train", "tokens_per_s"),
    _last("mfu_ratio", "Model FLOPs utilisation.", "train", "mfu"),
    _last("step_seconds", "Duration of a step.", "train", "step_s"),
    _last("data_wait_seconds", "Part of a step that waits for data.", "train", "data_wait_s"),
    _last("memory_bytes", "Memory in use, maximum over the ranks: the device's, else the process'.", "train", "memory_mb", 2**20),
    _last("disk_free_bytes", "Free disk space for checkpoints under way, minimum over the ranks.", "train", "disk_free_gb", 1e9),
    MetricDefinition("oar_heldout_nll", "gauge", "Held-out negative log-likelihood, nats per code.", _heldout),
    _last("heldout_step", "Step of the last held-out evaluation.", "heldout", "step"),
    _last("heldout_seconds", "Duration of the last held-out evaluation.", "heldout", "seconds"),
    _last("checkpoint_step", "Step of the last committed checkpoint.", "checkpoint", "step"),
    _gauge("checkpoint_age_seconds", "Time since the last commit, or since the workers started where that is later.",
           lambda view: view.checkpoint_age_s),
    _last("checkpoint_blocked_seconds", "Time that the last checkpoint held training up.", "checkpoint", "seconds"),
    _last("checkpoint_wait_seconds", "Part of it spent waiting for the upload before.", "checkpoint", "wait_s"),
    _last("checkpoint_upload_seconds", "Upload of the last checkpoint, beside training.", "checkpoint", "upload_s"),
    _last("checkpoint_bytes", "Size of the last checkpoint.", "checkpoint", "bytes"),
    _last("world_size", "Workers.", "start", "world_size"),
    _last("pool_images_per_second", "Images a pool of actors gets through per second.", "pool", "images_per_s"),
    _last("tokenizer_loss", "Loss of the image tokenizer's training.", "vq", "loss"),
    _last("tokenizer_psnr_db", "Reconstruction PSNR in the image tokenizer's training.", "vq", "psnr"),
    _last("tokenizer_codebook_use_ratio", "Share of the codebook in use.", "vq", "codebook_use"),
    _count("starts", "How often the workers were started.", "start"),
    _count("bad_samples", "Broken samples that were replaced.", "bad_samples"),
    _count("storage_retries", "Storage requests that were repeated.", "storage_retries"),
    _count("skipped_batches", "Batches left out because they were not finite.", "skipped_batches"),
    _count("non_finite", "Batches with a loss or gradient that was not finite.", "non_finite"),
    _count("spikes", "Loss spikes.", "spike"),
    _count("checkpoint_failures", "Checkpoints that could not be written.", "checkpoint_failed"),
    _count("rejected_checkpoints", "Checkpoints passed over at a start because they were damaged.", "rejected_checkpoint"),
    _count("worker_failures", "Times that workers died.", "worker_failure"),
    _count("resizes", "Changes of the number of workers.", "resized"),
)  # fmt: skip


class StageCollector(Collector):
    """Gives prometheus_client the metrics of one stage. Metrics without a sample are left out."""

    def __init__(self, labels: Labels, view: Callable[[], MetricsView]) -> None:
        """``labels`` go to every sample; ``view`` is called at each scrape."""
        self._labels, self._view = labels, view

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        view = self._view()
        for definition in METRICS:
            # A counter is known to prometheus_client without its suffix, which it adds itself.
            metric = Metric(definition.name.removesuffix("_total"), definition.help, definition.type)
            for own, value in definition.samples(view):
                if value is not None:
                    metric.add_sample(definition.name, {**self._labels, **own}, float(value))
            if metric.samples:
                yield metric


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for the host's name, which may take long


class MetricsServer:
    """Answers while a stage runs. Its address is in ``metrics.json`` in the run's folder, as Prometheus' file_sd reads it."""

    def __init__(
        self,
        events: str,
        stage: str,
        recipe_name: str,
        observe: ObserveConfig,
        say: Callable[[str], None],
        whole: Callable[[], bool] = lambda: True,
    ) -> None:
        """Start the server.

        Args:
            whole: whether the events of earlier attempts on other hosts are here. A counter that began without them would jump later.

        Raises:
            OSError: the port is taken, or the address is none of this host.
        """
        assert observe.metrics_port is not None
        self.events = events
        self._registry = CollectorRegistry()
        self._stall_s = observe.stall_s
        self._state, self._lock = StageState(stage), threading.Lock()
        self._reader = EventReader(events, stage)
        self._progressed, self._failure = time.monotonic(), ""
        self._old = EventReader(events, stage, from_now=True).ends
        self._began = False
        self._begun, self._ended_as = time.time(), cast(tuple[Ending, float] | None, None)
        self._asked: dict[str, float] = {}
        """Who has read /metrics, by address, and when last."""
        self._waited_for: set[str] = set()
        self._seen = threading.Event()
        self._registry.register(StageCollector({"run": recipe_name, "stage": stage}, self._view))
        self._whole, self._is_whole = whole, False
        self._address = (observe.metrics_address, observe.metrics_port)
        self._recipe_name = recipe_name
        self._note = os.path.join(os.path.dirname(os.path.abspath(events)), "metrics.json")
        self._open()
        self._say = say
        say(f"metrics: {self.url}/metrics")
        global _latest
        _latest = self

    def _open(self) -> None:
        address, port = self._address
        self._server = _Server((address, port), self._handler())
        self.port = int(self._server.server_address[1])
        self._address = (address, self.port)
        host = socket.gethostname() if address in ("0.0.0.0", "::", "") else address
        self.url = f"http://{host}:{self.port}"
        self._ended = threading.Event()
        for work in (self._server.serve_forever, self._read):
            threading.Thread(target=work, name=f"metrics-{self._state.stage}", daemon=True).start()
        os.makedirs(os.path.dirname(self._note), exist_ok=True)
        with open(self._note, "w", encoding="utf-8") as file:
            json.dump([{"targets": [f"{host}:{self.port}"], "labels": {"recipe": self._recipe_name}}], file)

    def fail(self, error: BaseException) -> None:
        """Mark the stage as failed; ``/healthz`` reports it until the server ends."""
        self._failure = redact(f"failed: {error_line(error)}")

    def stop(self, wait_s: float) -> None:
        """Stop answering, and remove ``metrics.json``. It takes no time to speak of, whatever ``wait_s``."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._note)

    def show_ending(self, how: Ending, wait_s: float) -> None:
        """Answer once more with how the driver ended, until that is seen, at most ``wait_s``.

        Everyone who has asked lately is waited for: there may be several replicas of Prometheus. Where nobody has ever asked nobody is,
        but after a failure: it may have come before Prometheus found the driver.
        """
        if not self._asked and how != "failed":
            return
        self._waited_for = {client for client, at in dict(self._asked).items() if time.monotonic() - at < ASKED_S}
        self._say(f"waiting up to {wait_s:.0f} s until Prometheus has seen how this ended ({how})")
        self._ended_as = (how, time.time())
        self._open()
        self._seen.wait(wait_s)
        self.stop(0.0)

    @property
    def asked(self) -> bool:
        """Whether anybody has read /metrics."""
        return bool(self._asked)

    def _answered(self, client: str) -> None:
        """Somebody has read /metrics."""
        self._asked[client] = time.monotonic()
        if self._ended_as is not None:
            self._waited_for.discard(client)
            if not self._waited_for:
                self._seen.set()

    def health(self) -> tuple[bool, str]:
        """Whether the stage is well, and what it is doing."""
        self._update()
        with self._lock:
            silent, state = time.monotonic() - self._progressed, self._state
        if self._failure:
            return False, self._failure
        if silent > self._stall_s and state.status != "done":
            return False, f"stalled: no progress for {duration(silent)}; it was {state.status} at step {state.step}"
        return True, f"{state.status}, step {state.step} of {state.steps}, last progress {duration(silent)} ago"

    def metrics(self) -> bytes:
        """The answer to ``/metrics``, in Prometheus' text format."""
        self._update()
        with self._lock:
            return generate_latest(self._registry)

    def _view(self) -> MetricsView:
        return MetricsView(self._state, time.monotonic() - self._progressed, self._stall_s, self._begun, self._ended_as, self._is_whole)

    def _read(self) -> None:
        while not self._ended.wait(POLL_S):
            try:
                self._update()
            except Exception as error:  # a view of the run must not be able to end it; tried again
                log.warning("/metrics: %s: %s", type(error).__name__, error)
                self._ended.wait(60.0)

    def _update(self) -> None:
        """Take what is new. Time is counted from when it is seen: the clocks of hosts differ."""
        with self._lock:
            self._is_whole = self._whole()  # before what it speaks of is read
            for entry in self._reader.poll():
                if not self._began and entry.end > self._old.get(entry.file, 0):
                    self._began = True
                    self._state.begins()
                self._state.take(entry.attempt, entry.event)
                if entry.event["kind"] in PROGRESS:
                    self._progressed = time.monotonic()
            if not self._began:  # whatever earlier attempts came to, the one that is watched is yet to begin
                self._state.begins()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, server.metrics(), CONTENT_TYPE_PLAIN_0_0_4)
                    server._answered(self.client_address[0])
                elif self.path == "/healthz":
                    well, text = server.health()
                    self._answer(200 if well else 503, f"{text}\n".encode(), "text/plain; charset=utf-8")
                else:
                    self._answer(404, b"there are /metrics and /healthz\n", "text/plain; charset=utf-8")

            def _answer(self, status: int, body: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Print no line for each scrape."""

        return Handler


_latest: MetricsServer | None = None
"""The last one of this process."""


def show_ending(events: str, how: Ending) -> None:
    """Let Prometheus see how the driver of a run ends: to be called last. Never raises.

    Args:
        events: local folder of the run's events.
    """
    global _latest
    server, _latest = _latest, None  # what this process does next, if anything, is no matter of this server
    try:
        if server is not None and server.events == events:
            server.show_ending(how, SEEN_S if server.asked and how != "stopped" else SEEN_STOPPED_S)
    except Exception as error:  # a view of the run must not be able to change how it ends
        log.warning("/metrics: %s: %s", type(error).__name__, error)
