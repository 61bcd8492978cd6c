"""Peak memory of any rank, and the free disk space where checkpoints are written first."""

from __future__ import annotations

import os
import shutil

import psutil
import torch

from oar_scale.training.loop import Callback, Loop


class MemoryUsage(Callback):
    """Adds ``memory_mb`` (of the GPU, or of the process) and ``disk_free_gb`` to the ``train`` events."""

    def after_step(self, loop: Loop) -> None:
        """Measure where a window of steps ends."""
        if not loop.closes_window:
            return
        if loop.process.device.type == "cuda":
            used = torch.cuda.max_memory_allocated(loop.process.device)
            torch.cuda.reset_peak_memory_stats(loop.process.device)
        else:
            used = psutil.Process().memory_info().rss
        loop.metrics.add("memory_mb", used / 2**20, "max")
        scratch = loop.job.scratch
        while not os.path.isdir(scratch):
            scratch = os.path.dirname(scratch)
        loop.metrics.add("disk_free_gb", shutil.disk_usage(scratch).free / 1e9, "min")
