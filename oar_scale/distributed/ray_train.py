"""A training job on Ray: TorchTrainer starts the workers; when one dies, all start again from the last checkpoint.

The retries are ours and not Ray Train's, for three reasons: a mistake that the user can mend ends the stage at once, workers that got
further since the last failure may fail again as often as before, and an elastic run starts with as many workers as there is room for now.
Under torchrun there is no driver: the process is a worker itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from oar_scale.distributed.checkpoints import committed_steps
from oar_scale.distributed.elastic import choose_workers, room_for_workers
from oar_scale.distributed.stop_request import GROW, Watch, make_bell, wait_for
from oar_scale.errors import Requeue, UserError
from oar_scale.observe.console import Console
from oar_scale.observe.events import read_events
from oar_scale.observe.mirror import open_log
from oar_scale.observe.watch import watching
from oar_scale.runtime.ray_session import ray_session
from oar_scale.runtime.stop_signals import StopSignals
from oar_scale.storage import Unreachable, join
from oar_scale.training.job import TrainingJob

START_S = 60
"""Seconds that Ray Train may take to place an elastic run's workers; then the room is looked at again."""


def run_training(job: TrainingJob, console: Console) -> dict[str, Any]:
    """Run a training stage to its end.

    Returns:
        steps, attempts, seconds, images_per_s (median over the stage) and parameters.

    Raises:
        UserError: a worker met something the user can mend, or the workers died more often than ``parallel.max_failures``.
        Requeue: asked to stop by a signal; everything is saved.
    """
    started, events = time.monotonic(), join(job.local, "events")
    first = _starts(events, job.stage)
    watched = watching(events, job.stage, job.recipe, job.root, console=console, steps=job.training.steps, result=job.result)
    if under_torchrun():
        from oar_scale.distributed.worker import train

        with watched if os.environ["RANK"] == "0" else nullcontext():
            train(job)
    else:
        parallel = job.recipe.parallel
        with (
            ray_session(cpus=parallel.max_workers, gpus=parallel.gpus_per_worker * parallel.max_workers),
            watched,
        ):
            _Driver(job, console).run()
    history = read_events(events, job.stage)
    rates = sorted(event["images_per_s"] for event in history if event["kind"] == "train")
    return {
        "steps": job.training.steps,
        "attempts": _starts(events, job.stage) - first,
        "seconds": time.monotonic() - started,
        "images_per_s": rates[len(rates) // 2] if rates else None,
        "parameters": next((event["parameters"] for event in reversed(history) if event["kind"] == "start"), None),
    }


def _starts(events: str, stage: str) -> int:
    return sum(event["kind"] == "start" for event in read_events(events, stage))


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of its workers."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class _Driver:
    """Starts groups of workers until the stage is done."""

    def __init__(self, job: TrainingJob, console: Console) -> None:
        self._job, self._console = job, console
        self._elastic = len(job.recipe.worker_counts()) > 1
        self._failures = 0
        self._furthest = 0
        self._furthest = self._reached()
        self._workers = 0
        self._stop = StopSignals()

    def run(self) -> None:
        with self._stop:
            while True:
                workers = self._choose()
                if self._stop.reason is not None:
                    raise Requeue(self._stop.reason)
                if self._workers not in (0, workers):
                    self._note("resized", from_workers=self._workers, to_workers=workers, reason="room in the cluster")
                    self._console.say(f"  going on with {workers} workers instead of {self._workers}")
                self._workers = workers
                error = self._fit(workers)
                if error is None:
                    return
                self._judge(error)

    def _choose(self) -> int:
        recipe = self._job.recipe
        return choose_workers(recipe, room_for_workers(recipe.parallel, asking=True)) if self._elastic else recipe.parallel.max_workers

    def _judge(self, error: BaseException) -> None:
        """Return to try again, raise to give up."""
        causes = worker_errors(error)
        for cause in causes:
            if isinstance(cause, UserError) and not isinstance(cause, Unreachable):
                raise UserError(str(cause)) from error
            if isinstance(cause, Requeue):
                reason = self._stop.reason if cause.reason == GROW else cause.reason
                if reason is None:
                    return
                raise Requeue(reason) from error
        limit, reached = self._job.recipe.parallel.max_failures, self._reached()
        self._failures = 1 if reached > self._furthest else self._failures + 1
        self._furthest = max(reached, self._furthest)
        cause_text = _cause(error, causes)
        self._note("worker_failure", cause=cause_text)
        if self._stop.reason is not None:
            raise Requeue(self._stop.reason) from error
        if self._failures > limit:
            raise UserError(
                f"stage {self._job.stage}: the workers failed more than parallel.max_failures = {limit} times without a new checkpoint; "
                f"the last cause: {cause_text}\nRun the same command again to go on from the last checkpoint."
            ) from error
        left = limit - self._failures
        self._console.say(f"  the workers failed ({cause_text}); starting them again, {left} more tries without a new checkpoint")

    def _reached(self) -> int:
        """The newest committed step; as far as was known where the storage does not answer, which must not end the run."""
        try:
            return max(committed_steps(self._job.checkpoints), default=0)
        except Unreachable as error:
            self._console.say(f"  {error}")
            return self._furthest

    def _note(self, kind: str, **fields: Any) -> None:
        """An event between two attempts, in a file of its own."""
        with open_log(join(self._job.local, "events"), self._job.stage, self._job.root, self._job.recipe.observe.mirror_s) as log:
            log.emit(kind, **fields)

    def _fit(self, workers: int) -> BaseException | None:
        """One group of workers; what it failed with, or None."""
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError

        scratch = tempfile.mkdtemp(prefix="oar-train-")  # Ray Train's own bookkeeping; checkpoints are ours
        bell, began = make_bell(), self._reached()

        def may_grow() -> bool:
            """Only after a checkpoint, or a cluster that comes and goes would keep the run from ever getting on."""
            more = choose_workers(self._job.recipe, room_for_workers(self._job.recipe.parallel, asking=False)) > workers
            return more and self._reached() > began

        self._stop.arm()
        try:
            with _sigint_kept(), Watch(bell, self._stop, may_grow if self._elastic else None):
                self._trainer(workers, bell, scratch).fit()
        except TrainingFailedError as error:
            if self._stop.reason is not None and not worker_errors(error):
                raise Requeue(self._stop.reason) from error  # it came before the workers ran
            return error
        except RayError as error:
            if self._stop.reason is None:
                raise
            raise Requeue(self._stop.reason) from error  # a scheduler tells Ray's own processes to end as well, and they may be faster
        except SystemExit as stop:  # Ray Train's answer to Ctrl-C, once it has ended the workers
            raise KeyboardInterrupt from stop
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return None

    def _trainer(self, workers: int, bell: Any, scratch: str) -> Any:
        import ray.train
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        parallel = self._job.recipe.parallel
        use_gpu = parallel.gpus_per_worker > 0
        if self._elastic:
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_S))
        failures: Any = ray.train.FailureConfig
        return TorchTrainer(
            _worker,
            train_loop_config={"job": self._job, "bell": bell},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(1.5 * parallel.hang_timeout_s) + 1),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": 1, **({"GPU": parallel.gpus_per_worker} if use_gpu else {})},
                placement_strategy=parallel.placement,
                accelerator_type=parallel.gpu_type,
            ),
            run_config=RunConfig(
                name=self._job.stage,
                storage_path=scratch,
                failure_config=failures(max_failures=0, max_preemption_failures=0, controller_failure_limit=0 if self._elastic else -1),
            ),
        )


@contextmanager
def _sigint_kept() -> Iterator[None]:
    """Ray Train leaves its own handler of SIGINT behind."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _worker(config: dict[str, Any]) -> None:
    """Runs in a Ray Train worker."""
    import ray.train

    context = ray.train.get_context()
    os.environ |= {
        "RANK": str(context.get_world_rank()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    from oar_scale.distributed.worker import train

    train(config["job"], asked=lambda: wait_for(config["bell"]))


def worker_errors(error: BaseException) -> list[BaseException]:
    """The workers' own exceptions inside Ray Train's."""
    found = []
    for failure in getattr(error, "worker_failures", {}).values():
        while True:
            inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure.__cause__
            if not isinstance(inner, BaseException):
                break
            failure = inner
        found.append(failure)
    return found


def _cause(error: BaseException, causes: list[BaseException]) -> str:
    """The first line of what the first failed worker died of."""
    first = next(iter(causes), error)
    lines = str(first).strip().splitlines()
    return f"{type(first).__name__}: {lines[0] if lines else ''}"
