"""``train`` events: loss, rate, what the step waits for. A window of steps ends at each checkpoint too, so that a resumed run logs the
same means as an undisturbed one."""

from __future__ import annotations

import socket
import statistics

import torch

from oar_scale.model.flops import useful_flops
from oar_scale.runtime.gpu_peaks import peak_flops
from oar_scale.training.loop import Callback, Loop
from oar_scale.training.process import EventSink

COUNTS = ("skipped_batches", "bad_samples", "storage_retries")


class Speed(Callback):
    """Measures and logs each window of steps."""

    def __init__(self) -> None:
        self._mfu_per_image: float | None = None
        self._hosts: list[str] = []

    def start(self, loop: Loop) -> None:
        """Look up what the device could do at most, and where each rank is."""
        self._hosts = loop.process.gather(socket.gethostname())
        name = torch.cuda.get_device_name(loop.process.device) if loop.process.device.type == "cuda" else ""
        peak = peak_flops(name, loop.job.recipe.parallel.precision)
        self._mfu_per_image = None if peak is None else useful_flops(loop.engine.spec) / (peak * loop.process.world)

    def after_step(self, loop: Loop) -> None:
        """Add the step to its window, and log the window at its end."""
        metrics, batch, result = loop.metrics, loop.batch, loop.result
        if not result.skipped:
            metrics.add("loss", loop.loss)
            for number, quarter in enumerate(result.quarters.tolist()):
                metrics.add(f"quarter{number}", quarter)
        metrics.add("steps", 1 / loop.process.world, "sum")
        metrics.add("skipped_batches", result.skipped / loop.process.world, "sum")
        metrics.add("bad_samples", len(batch.bad), "sum")
        metrics.add("storage_retries", batch.fetched.retries, "sum")
        metrics.add("data_wait_s", loop.waited_s)
        metrics.add("busy_s", loop.busy_s)
        metrics.add_own("own_s", loop.waited_s + result.own_s)
        if loop.closes_window:
            values = metrics.flush()
            if loop.events:
                self._log(loop, loop.events, values)

    def _log(self, loop: Loop, events: EventSink, values: dict[str, float]) -> None:
        step_s = values.pop("busy_s") + values["data_wait_s"]
        images_per_s = loop.job.training.global_batch / step_s
        quarters = [values.pop(name) for name in sorted(values) if name.startswith("quarter")]
        del values["steps"]
        events.emit(
            "train",
            step=loop.step,
            loss=values.pop("loss", None),
            loss_by_position=quarters,
            lr=loop.lr,
            grad_norm=loop.result.grad_norm,
            images_per_s=images_per_s,
            tokens_per_s=images_per_s * loop.engine.spec.cells,
            mfu=None if self._mfu_per_image is None else images_per_s * self._mfu_per_image,
            step_s=step_s,
            **self._slowest(loop.metrics.by_rank["own_s"]),
            **{name: int(value) if name in COUNTS else value for name, value in values.items()},
        )

    def _slowest(self, own_s: list[float]) -> dict[str, object]:
        """Which rank does its own part of a step last. All ranks take the same time for a step as a whole: they wait for that one."""
        if len(own_s) < 2:
            return {}
        rank = max(range(len(own_s)), key=own_s.__getitem__)
        return {
            "slowest_rank": rank,
            "slowest_host": self._hosts[rank],
            "slowest_rank_s": own_s[rank],
            "median_rank_s": statistics.median_low(own_s),
        }
