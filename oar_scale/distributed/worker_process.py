"""A worker process of a distributed training: its process group, its watchdog, and its handlers of stop signals.

    with WorkerProcess(job) as process:
        process.heartbeat("step 12")         every few seconds, or the watchdog writes all stacks to a file and ends the process
        process.stop_reason                  why it was asked to stop (SIGTERM, SIGUSR1, the driver), or None

The environment gives the rank: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. A gloo group of its own carries the few numbers
that the ranks agree on at each step; it never waits behind the training's own collectives on the GPU.

    RUN/logs/STAGE-rankR.stacks               of a worker that did not move: the stack of each thread
    RUN/logs/STAGE-rankR.collectives.json     and torch's flight recorder: its last collectives, and which of them are not done
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from oar_scale.config.schema import ParallelConfig
from oar_scale.errors import UserError
from oar_scale.runtime.stop_signals import StopSignals
from oar_scale.storage import join, open_storage
from oar_scale.training.job import TrainingJob

HUNG = 70
"""Exit code of a process that the watchdog has ended."""
T = TypeVar("T")


class WorkerProcess:
    """Implements :class:`~oar_scale.training.process.TrainingProcess` over ``torch.distributed``. Making one is collective."""

    def __init__(self, job: TrainingJob) -> None:
        """Join the process group. Raises UserError where the recipe asks for a GPU and there is none."""
        parallel = job.recipe.parallel
        self.device = _device(parallel)
        _start_group(self.device, parallel.hang_timeout_s)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._control: dist.ProcessGroup = dist.new_group(  # type: ignore[assignment]
            backend="gloo", timeout=timedelta(seconds=1.5 * parallel.hang_timeout_s)
        )
        self._requested: str | None = None
        self._signals = StopSignals()
        self._watchdog = _Watchdog(job, self.rank, parallel.hang_timeout_s)

    def __enter__(self) -> Self:
        self._signals.__enter__()  # in the main thread only: Ray Train runs the worker in another one, and its driver forwards signals
        self._watchdog.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watchdog.stop()
        self._signals.__exit__(kind, error, trace)

    @property
    def stop_reason(self) -> str | None:
        """Why this worker was asked to stop: the first signal's name, or the reason given to :meth:`request_stop`."""
        return self._requested or self._signals.reason

    def request_stop(self, reason: str) -> None:
        """Ask this worker, and through it all others, to save and stop after the step."""
        self._requested = self._requested or reason

    def heartbeat(self, doing: str) -> None:
        """Report progress to the watchdog; ``doing`` is what comes next."""
        self._watchdog.heartbeat(doing)

    def all_reduce(self, numbers: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Replace ``numbers`` by their sum or maximum over all ranks. Collective; numbers on a GPU go over NCCL."""
        group = self._control if numbers.device.type == "cpu" else None
        dist.all_reduce(numbers, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=group)
        return numbers

    def gather(self, value: T) -> list[T]:
        """Return the value of each rank on every rank. Collective."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values


class _Watchdog:
    """Ends a process that makes no progress, after writing down the stack of each of its threads.

    Every rank of a hung collective waits, so each writes its own stacks: the one that is elsewhere is the cause. A process that has
    written them waits a moment before it exits: without it the collective of the others would fail before they have written theirs.
    """

    def __init__(self, job: TrainingJob, rank: int, timeout_s: float) -> None:
        self._timeout_s, self._rank = timeout_s, rank
        self._local, self._root = join(job.local, "logs", f"{job.stage}-rank{rank}"), join(job.root, "logs", f"{job.stage}-rank{rank}")
        self._path = f"{self._local}.stacks"
        if dist.get_backend() == "nccl":  # its own dump, should it find a timeout before the watchdog does
            os.makedirs(join(job.local, "logs"), exist_ok=True)
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", join(job.local, "logs", f"{job.stage}-nccl-rank"))
        self._ended = threading.Event()
        self.heartbeat("start")

    def start(self) -> None:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def heartbeat(self, doing: str) -> None:
        self._last, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout_s / 10)):
            if time.monotonic() - self._last > self._timeout_s:
                try:
                    self._report()
                    time.sleep(min(10.0, self._timeout_s / 4))  # all collectives break by themselves after 1.5 times the timeout
                finally:
                    os._exit(HUNG)

    def _report(self) -> None:
        silence = f"nothing moved for {self._timeout_s:g} s (parallel.hang_timeout_s)"
        message = f"rank {self._rank}: {silence} in: {self._doing}; stacks in {self._path}\n"
        # In a thread: what hangs may be the disk, the storage, or what torch would ask.
        files = threading.Thread(target=self._write_files, args=(message,), daemon=True)
        files.start()
        files.join(10)
        sys.stderr.write(message)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    def _write_files(self, message: str) -> None:
        from torch._C._distributed_c10d import _dump_fr_trace_json

        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        with open(self._path, "w", encoding="utf-8") as file:
            file.write(message)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        self._upload(".stacks")
        with open(f"{self._local}.collectives.json", "wb") as file:
            file.write(_dump_fr_trace_json(backend=dist.get_backend()))
        self._upload(".collectives.json")

    def _upload(self, suffix: str) -> None:
        if self._root.startswith("s3://"):
            open_storage(self._root).upload(self._local + suffix, self._root + suffix)


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


def _leave_muon_uncompiled() -> None:
    """DeepSpeed asks at each reduction whether the optimizer is its Muon, and importing that module compiles kernels, which nobody calls
    here: with torch._dynamo that is seconds of CPU for each worker."""
    from deepspeed.runtime import compiler

    compiler.compile = lambda: lambda function: function


def _start_group(device: torch.device, timeout_s: float) -> None:
    import deepspeed

    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce at first use: a minute, and a C++ compiler. Gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _leave_muon_uncompiled()
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            # Longer than the watchdog waits: what hangs is to be written down, not to break at some rank first.
            timeout=timedelta(seconds=1.5 * timeout_s),
            device_id=device if device.type == "cuda" else None,  # else NCCL would guess it from the rank at the first barrier
        )
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
