"""``oar train --profile N``: where does a step go? A trace for chrome://tracing or Perfetto, and a table.

The first steps are not profiled: they build caches and start threads.
"""

from __future__ import annotations

import os

from torch.profiler import ProfilerActivity, profile

from oar_scale.training.loop import Callback, Loop
from oar_scale.training.process import EventSink

WARM_UP = 3
PREFIX = "oar::"
"""What the parts of a step are marked with (the engines, ``loop.py``)."""


class Profiling(Callback):
    """Profiles rank 0's next ``steps`` steps after the first few."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._profile: profile | None = None
        self._from = 0

    def start(self, loop: Loop) -> None:
        """Choose the steps."""
        self._from = loop.step + WARM_UP

    def after_step(self, loop: Loop) -> None:
        """Start the profiler before the first of them, and write what it saw after the last."""
        if loop.events is None:
            return
        if loop.step == self._from:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if loop.process.device.type == "cuda" else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
        elif loop.step == self._from + self._steps:
            self._write(loop, loop.events)

    def end(self, loop: Loop) -> None:
        """Write what the profiler saw of a stage that was shorter."""
        if loop.events is not None:
            self._write(loop, loop.events)

    def _write(self, loop: Loop, events: EventSink) -> None:
        if self._profile is None:
            return
        profiler, self._profile = self._profile, None
        profiler.stop()
        folder = os.path.join(loop.job.local, "profile")
        os.makedirs(folder, exist_ok=True)
        name = os.path.join(folder, f"{loop.job.stage}-step{self._from:08d}")
        profiler.export_chrome_trace(f"{name}.json.gz")
        averages = profiler.key_averages()
        device = loop.process.device.type
        operators = [(event.key, event.device_time_total if device == "cuda" else event.cpu_time_total) for event in averages]
        steps = max(1, loop.step - self._from)
        lines = [f"rank 0, {steps} steps from step {self._from}, milliseconds a step", ""]
        lines += [f"{key.removeprefix(PREFIX):24} {time / 1000 / steps:10.2f}" for key, time in operators if key.startswith(PREFIX)]
        table = averages.table(sort_by=f"self_{device}_time_total", row_limit=30, max_name_column_width=60)
        with open(f"{name}.txt", "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n" + table)
        events.emit("profile", step=loop.step, trace=f"{name}.json.gz", table=f"{name}.txt")
