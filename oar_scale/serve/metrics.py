"""``/metrics``: what the server does, for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class ServeMetrics:
    """Each metric under the name that docs/serving.md explains."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("oar_serve_requests", "Requests answered.", ["path", "status"], registry=registry)
        how = "Jobs that ended, and how: done, error, timeout, cancelled."
        self.jobs = Counter("oar_serve_jobs", how, ["kind", "how"], registry=registry)
        self.images = Counter("oar_serve_images", "Images finished.", ["kind"], registry=registry)
        self.passes = Counter("oar_serve_passes", "Passes of the batch through the model.", registry=registry)
        self.cells = Counter("oar_serve_cells", "Cells placed.", registry=registry)
        self.queue_seconds = Histogram("oar_serve_queue_seconds", "From a request to its first slot.", buckets=_SECONDS, registry=registry)
        self.job_seconds = Histogram(
            "oar_serve_job_seconds", "From a request to its last image.", ["kind"], buckets=_SECONDS, registry=registry
        )
        self.pass_seconds = Histogram(
            "oar_serve_pass_seconds", "Duration of a pass.", buckets=tuple(each / 50 for each in _SECONDS), registry=registry
        )

    def show(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is asked for at each scrape."""
        Gauge(f"oar_serve_{name}", text, registry=self._registry).set_function(value)

    def page(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)
