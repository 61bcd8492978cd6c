"""A worker as a process: its rank and device, the signals it is sent, and what it does when nothing moves any more.

    with Process(job) as process:
        process.beat("step 12")              every few seconds, or the watchdog writes all stacks to a file and ends the process
        process.leaving                      why it was asked to leave (SIGTERM, SIGUSR1, the driver), or None

The environment gives the rank: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. ``process.control`` is a group over gloo for the
few numbers that the ranks agree on at each step; it never waits behind the training's own collectives on the GPU.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from oar_scale.config.schema import ParallelConfig
from oar_scale.errors import UserError
from oar_scale.storage import join, open_storage
from oar_scale.training.job import TrainingJob

HUNG = 70
"""Exit code of a process that ended itself because nothing moved."""
LEAVE_ON = (signal.SIGTERM, signal.SIGUSR1)


class Process:
    """See the top of this file. Making one is collective."""

    def __init__(self, job: TrainingJob) -> None:
        parallel = job.recipe.parallel
        self.device = _device(parallel)
        _start_group(self.device, parallel.hang_timeout_s)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.control: dist.ProcessGroup = dist.new_group(  # type: ignore[assignment]
            backend="gloo", timeout=timedelta(seconds=1.5 * parallel.hang_timeout_s)
        )
        self.leaving: str | None = None
        self._watchdog = _Watchdog(job, self.rank, parallel.hang_timeout_s)
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Ray Train runs the worker in another one, and tells it itself
            self._handlers = {number: signal.signal(number, self._signalled) for number in LEAVE_ON}
        self._watchdog.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watchdog.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def beat(self, doing: str) -> None:
        """Something moved; ``doing`` is what comes next."""
        self._watchdog.beat(doing)

    def leave(self, reason: str) -> None:
        """Ask this worker, and through it all others, to save and leave at the next step."""
        self.leaving = self.leaving or reason

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self.leave(signal.Signals(number).name)


class _Watchdog:
    """Ends a process that does not move, after writing down where each of its threads is.

    Every rank of a hung collective waits, so each writes its own stacks: the one that is elsewhere is the one to look at. Who has written
    stays for a moment: a peer that is gone would break the collective of the others, who then had no stacks to show.
    """

    def __init__(self, job: TrainingJob, rank: int, timeout_s: float) -> None:
        self._timeout_s, self._rank = timeout_s, rank
        self._path = join(job.local, "logs", f"{job.stage}-rank{rank}.stacks")
        self._copy = join(job.root, "logs", f"{job.stage}-rank{rank}.stacks") if job.root.startswith("s3://") else None
        self._ended = threading.Event()
        self.beat("start")

    def start(self) -> None:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def beat(self, doing: str) -> None:
        self._last, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout_s / 10)):
            if time.monotonic() - self._last > self._timeout_s:
                self._report()
                time.sleep(min(10.0, self._timeout_s / 4))  # all collectives break by themselves after 1.5 times the timeout
                os._exit(HUNG)

    def _report(self) -> None:
        silence = f"nothing moved for {self._timeout_s:g} s (parallel.hang_timeout_s)"
        said = f"rank {self._rank}: {silence} in: {self._doing}; stacks in {self._path}\n"
        sys.stderr.write(said)
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        with open(self._path, "w", encoding="utf-8") as file:
            file.write(said)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if self._copy is not None:
            # In a thread: a storage that hangs may be the very cause.
            upload = threading.Thread(target=open_storage(self._copy).upload, args=(self._path, self._copy), daemon=True)
            upload.start()
            upload.join(10)


def _device(parallel: ParallelConfig) -> torch.device:
    """This worker's device, and what has to be set before DeepSpeed is imported."""
    if parallel.gpus_per_worker > 0:
        if not torch.cuda.is_available():
            raise UserError("parallel.gpus_per_worker is above 0, and this worker sees no CUDA GPU. Set it to 0 to train on the CPU.")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(parallel.cpu_threads)
    return torch.device("cpu")


def _start_group(device: torch.device, timeout_s: float) -> None:
    import deepspeed

    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce at first use: a minute, and a C++ compiler. Gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        # Longer than the watchdog waits: what hangs is to be written down, not to break at some rank first.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=1.5 * timeout_s))
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
