"""A training job: on Ray a driver, whose TorchTrainer starts the workers, and restarts all from the last checkpoint when one dies.

The retries are ours and not Ray Train's, for three reasons: a mistake that the user can fix ends the stage at once, workers that made
progress since the last failure may fail again as often as before, and an elastic run restarts with as many workers as fit now.
Under torchrun there is no driver: this process is a worker itself.
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
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from oar_scale.distributed.checkpoints import committed_steps
from oar_scale.distributed.elastic import capacity_of, choose_workers, cluster_nodes, free_resources
from oar_scale.distributed.stop_request import GROW, StopRequest, StopWatcher, start_stop_request, wait_for_stop
from oar_scale.errors import Requeue, UserError
from oar_scale.json_object import JsonObject
from oar_scale.observe.console import Console
from oar_scale.observe.events import read_events, resumed_attempts
from oar_scale.observe.mirror import open_log
from oar_scale.observe.watch import watching
from oar_scale.runtime.ray_session import ray_session
from oar_scale.runtime.stop_signals import StopSignals
from oar_scale.storage import Unreachable, join
from oar_scale.training.job import TrainingJob

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train.torch import TorchTrainer

START_S = 60
"""Seconds that Ray Train may take to place an elastic run's workers; then the capacity is looked up again."""
RELEASE_S, RELEASE_POLL_S = 10.0, 0.5
"""How long an elastic run waits until Ray has released what the workers before held; otherwise it would start with fewer."""


def run_training(job: TrainingJob, console: Console) -> JsonObject:
    """Run a training stage to its end.

    Returns:
        steps, images_per_s (median over the stage) and parameters; attempts and seconds, those of earlier commands that this one resumed
        among them.

    Raises:
        UserError: a worker met something the user can fix, or the workers died more often than ``parallel.max_failures``.
        Requeue: asked to stop by a signal; everything is saved.
    """
    began, started, events = time.time(), time.monotonic(), join(job.local, "events")
    first = _starts(events, job.stage)
    watched = watching(events, job.stage, job.recipe, job.root, console=console, steps=job.training.steps, result=job.result)
    if under_torchrun():
        from oar_scale.distributed.worker import train

        with watched if os.environ["RANK"] == "0" else nullcontext():
            train(job)
    else:
        parallel = job.recipe.parallel
        most, least = (parallel.gpus_per_worker * workers for workers in (parallel.max_workers, parallel.min_workers))
        with (
            ray_session(cpus=parallel.max_workers, gpus=most, least_gpus=least),
            watched,
        ):
            TrainingDriver(job, console).run()
    history = read_events(events, job.stage)
    attempts_before, seconds_before = resumed_attempts(events, job.stage, began)
    rates = sorted(event["images_per_s"] for event in history if event["kind"] == "train")
    return {
        "steps": job.training.steps,
        "attempts": attempts_before + _starts(events, job.stage) - first,
        "seconds": seconds_before + time.monotonic() - started,
        "images_per_s": rates[len(rates) // 2] if rates else None,
        "parameters": next((event["parameters"] for event in reversed(history) if event["kind"] == "start"), None),
    }


def _starts(events: str, stage: str) -> int:
    return sum(event["kind"] == "start" for event in read_events(events, stage))


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of its workers."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class TrainingDriver:
    """Starts worker groups until the stage is done."""

    def __init__(self, job: TrainingJob, console: Console) -> None:
        self._job, self._console = job, console
        self._elastic = len(job.recipe.worker_counts()) > 1
        self._failures = 0
        self._furthest = 0
        self._furthest = self._newest_checkpoint()
        self._workers = 0
        self._signals = StopSignals()

    def run(self) -> None:
        """Run worker groups, one after the other, until one finishes the stage.

        Raises:
            Requeue: asked to stop; everything is saved.
            UserError: what the user can fix, or more failures than ``parallel.max_failures``.
        """
        with self._signals:
            while True:
                workers = self._choose_workers()
                if self._signals.reason is not None:
                    raise Requeue(self._signals.reason)
                if self._workers not in (0, workers):
                    self._emit("resized", from_workers=self._workers, to_workers=workers, reason="room in the cluster")
                    self._console.say(f"  continuing with {workers} workers instead of {self._workers}")
                self._workers = workers
                error = self._fit(workers)
                if error is None:
                    return
                self._retry_or_raise(error)

    def _choose_workers(self) -> int:
        """As many as there is room for now."""
        recipe, parallel = self._job.recipe, self._job.recipe.parallel
        if not self._elastic:
            return parallel.max_workers
        nodes = cluster_nodes(ping=True)
        most = choose_workers(recipe, capacity_of(nodes.values(), parallel))
        deadline = time.monotonic() + (RELEASE_S if self._workers else 0.0)
        while True:
            workers = choose_workers(recipe, capacity_of(free_resources(nodes, parallel, own={}), parallel))
            if workers >= most or time.monotonic() >= deadline or self._signals.reason is not None:
                return workers
            time.sleep(RELEASE_POLL_S)

    def _retry_or_raise(self, error: BaseException) -> None:
        """Return to start another group, raise to end the stage."""
        causes = worker_errors(error)
        for cause in causes:
            if isinstance(cause, UserError) and not isinstance(cause, Unreachable):
                raise UserError(str(cause)) from error
            if isinstance(cause, Requeue):
                reason = self._signals.reason if cause.reason == GROW else cause.reason
                if reason is None:
                    return
                raise Requeue(reason) from error
        if self._elastic and _found_no_room(error):
            self._console.say(f"  no room for {self._workers} workers within {START_S} s; looking at the cluster again")
            return
        limit, newest = self._job.recipe.parallel.max_failures, self._newest_checkpoint()
        self._failures = 1 if newest > self._furthest else self._failures + 1
        self._furthest = max(newest, self._furthest)
        cause_text = _cause(error, causes)
        self._emit("worker_failure", cause=cause_text)
        if self._signals.reason is not None:
            raise Requeue(self._signals.reason) from error
        if self._failures > limit:
            raise UserError(
                f"stage {self._job.stage}: the workers failed more than parallel.max_failures = {limit} times without a new checkpoint; "
                f"the last cause: {cause_text}\nRun the same command again to resume from the last checkpoint."
            ) from error
        left = limit - self._failures
        self._console.say(f"  the workers failed ({cause_text}); restarting them, {left} more tries without a new checkpoint")

    def _newest_checkpoint(self) -> int:
        """The newest committed step; the last known one where the storage does not answer, which must not end the run."""
        try:
            return max(committed_steps(self._job.checkpoints), default=0)
        except Unreachable as error:
            self._console.say(f"  {error}")
            return self._furthest

    def _emit(self, kind: str, **fields: object) -> None:
        """An event between two attempts, in a file of its own."""
        with open_log(join(self._job.local, "events"), self._job.stage, self._job.root, self._job.recipe.observe.mirror_s) as log:
            log.emit(kind, **fields)

    def _fit(self, workers: int) -> BaseException | None:
        """Run one worker group to its end; return what it failed with, or None."""
        import ray
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError

        scratch = tempfile.mkdtemp(prefix="oar-train-")  # Ray Train's own bookkeeping; checkpoints are ours
        stop_request, first = start_stop_request(), self._newest_checkpoint()

        def may_grow() -> bool:
            """Whether the run may grow now: only after a checkpoint, since nodes that come and go would else prevent all progress."""
            own = cast(dict[str, int], ray.get(stop_request.workers_by_node.remote()))
            free = free_resources(cluster_nodes(ping=False), self._job.recipe.parallel, own)
            more = choose_workers(self._job.recipe, capacity_of(free, self._job.recipe.parallel)) > workers
            return more and sum(own.values()) == workers and self._newest_checkpoint() > first

        self._signals.arm()
        try:
            with _sigint_kept(), StopWatcher(stop_request, self._signals, may_grow if self._elastic else None):
                self._trainer(workers, stop_request, scratch).fit()
        except TrainingFailedError as error:
            if self._signals.reason is not None and not worker_errors(error):
                raise Requeue(self._signals.reason) from error  # it came before the workers ran
            return error
        except RayError as error:
            if self._signals.reason is None:
                raise
            raise Requeue(self._signals.reason) from error  # a scheduler signals Ray's own processes as well, and they may end first
        except SystemExit as stop:  # Ray Train's answer to Ctrl-C, once it has ended the workers
            raise KeyboardInterrupt from stop
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return None

    def _trainer(self, workers: int, stop_request: ActorHandle[StopRequest], scratch: str) -> TorchTrainer:
        import ray.train
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        parallel = self._job.recipe.parallel
        use_gpu = parallel.gpus_per_worker > 0
        if self._elastic:
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_S))
        failures: Any = ray.train.FailureConfig
        return TorchTrainer(
            partial(_ray_worker, self._job, stop_request),  # as `train_loop_config` they would reach Ray Train's own actors as well
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


def _ray_worker(job: TrainingJob, stop_request: ActorHandle[StopRequest]) -> None:
    """Runs in a Ray Train worker."""
    import ray
    import ray.train

    context = ray.train.get_context()
    os.environ |= {
        "RANK": str(context.get_world_rank()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    from oar_scale.distributed.worker import train

    stop_request.started_on.remote(ray.get_runtime_context().get_node_id())
    train(job, lambda: wait_for_stop(stop_request))


def _found_no_room(error: BaseException) -> bool:
    """Whether the workers could not be placed in time: others hold the resources, or a node was lost since they were counted."""
    return type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError"


def worker_errors(error: BaseException) -> list[BaseException]:
    """Return the workers' own exceptions inside Ray Train's."""
    errors = []
    for failure in getattr(error, "worker_failures", {}).values():
        while True:
            inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure.__cause__
            if not isinstance(inner, BaseException):
                break
            failure = inner
        errors.append(failure)
    return errors


def _cause(error: BaseException, causes: list[BaseException]) -> str:
    """The first line of the first failed worker's error."""
    first = next(iter(causes), error)
    lines = str(first).strip().splitlines()
    return f"{type(first).__name__}: {lines[0] if lines else ''}"
