"""``train`` events: loss, rate, what the step waits for. A window of steps ends at each checkpoint too, so that a resumed run logs the
same means as an undisturbed one."""

from __future__ import annotations

import torch

from oar_scale.model.flops import peak_flops, training_flops
from oar_scale.training.callbacks import Callback
from oar_scale.training.loop import Loop


class Speed(Callback):
    """Measures and logs each window of steps."""

    def __init__(self, loop: Loop) -> None:
        name = torch.cuda.get_device_name(loop.process.device) if loop.process.device.type == "cuda" else ""
        peak = peak_flops(name, loop.job.recipe.parallel.precision)
        self._flops_per_peak = None if peak is None else training_flops(loop.spec) / (peak * loop.process.world)

    def after_step(self, loop: Loop) -> None:
        metrics, batch, done = loop.metrics, loop.batch, loop.done
        if not done.left_out:
            metrics.add("loss", loop.loss)
            for number, quarter in enumerate(done.quarters.tolist()):
                metrics.add(f"quarter{number}", quarter)
        metrics.add("steps", 1 / loop.process.world, "sum")
        metrics.add("skipped_batches", done.left_out / loop.process.world, "sum")
        metrics.add("bad_samples", len(batch.bad), "sum")
        metrics.add("storage_retries", batch.fetched.retries, "sum")
        metrics.add("data_wait_s", loop.waited_s)
        metrics.add("busy_s", loop.busy_s)
        if loop.closes_window:
            self._log(loop)

    def _log(self, loop: Loop) -> None:
        found = loop.metrics.flush()
        if loop.log is None:
            return
        step_s = found.pop("busy_s") + found["data_wait_s"]
        images_per_s = loop.job.training.global_batch / step_s
        quarters = [found.pop(name) for name in sorted(found) if name.startswith("quarter")]
        del found["steps"]
        loop.log.emit(
            "train",
            step=loop.step,
            loss=found.pop("loss", None),
            loss_by_position=quarters,
            lr=loop.lr,
            grad_norm=loop.done.grad_norm,
            images_per_s=images_per_s,
            tokens_per_s=images_per_s * loop.spec.cells,
            mfu=None if self._flops_per_peak is None else images_per_s * self._flops_per_peak,
            step_s=step_s,
            **{name: int(value) if name in COUNTS else value for name, value in found.items()},
        )


COUNTS = ("skipped_batches", "bad_samples", "storage_retries")
