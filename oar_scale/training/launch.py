"""A training job on Ray: TorchTrainer starts the workers; when one dies, all start again from the last checkpoint.

The retries are ours and not Ray Train's: a mistake that the user can mend ends the stage at once instead of being tried
again, and only what was lost to a dead worker or node is.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import time
from typing import Any

from oar_scale.data.ray_session import ray_session
from oar_scale.errors import UserError
from oar_scale.observe.console import Console
from oar_scale.observe.events import attempts, read_events
from oar_scale.storage import join
from oar_scale.training.job import TrainingJob


def run_training(job: TrainingJob, console: Console) -> dict[str, Any]:
    """Run a training stage to its end.

    Returns:
        steps, attempts, seconds, images_per_s (median over the stage) and parameters.

    Raises:
        UserError: a worker met something the user can mend, or the workers died more often than ``parallel.max_failures``.
    """
    started, events = time.monotonic(), join(job.local, "events")
    first = len(attempts(events, job.stage))
    parallel = job.recipe.parallel
    with (
        ray_session(cpus=parallel.workers, gpus=parallel.gpus_per_worker * parallel.workers),
        console.follow(events, job.stage, job.training.steps),
    ):
        _fit_with_retries(job, console)
    history = read_events(events, job.stage)
    rates = sorted(event["images_per_s"] for event in history if event["kind"] == "train")
    return {
        "steps": job.training.steps,
        "attempts": len(attempts(events, job.stage)) - first,
        "seconds": time.monotonic() - started,
        "images_per_s": rates[len(rates) // 2] if rates else None,
        "parameters": next(event["parameters"] for event in reversed(history) if event["kind"] == "start"),
    }


def _fit_with_retries(job: TrainingJob, console: Console) -> None:
    left = job.recipe.parallel.max_failures
    while (error := _fit(job)) is not None:
        mistake = _user_error(error)
        if mistake is not None:
            raise mistake
        if left == 0:
            raise UserError(
                f"stage {job.stage}: the workers failed more than parallel.max_failures = {job.recipe.parallel.max_failures} times; "
                f"the last cause: {_cause(error)}\nRun the same command again to go on from the last checkpoint."
            ) from error
        console.say(f"  the workers failed ({_cause(error)}); starting them again, {left} tries left")
        left -= 1


def _fit(job: TrainingJob) -> BaseException | None:
    """One group of workers; what it failed with, or None."""
    from ray.train import TrainingFailedError

    scratch = tempfile.mkdtemp(prefix="oar-train-")  # Ray Train's own bookkeeping; checkpoints are ours
    handler = signal.getsignal(signal.SIGINT)
    try:
        _trainer(job, scratch).fit()
    except TrainingFailedError as error:
        return error
    except SystemExit as stop:  # Ray Train's answer to Ctrl-C, once it has ended the workers
        raise KeyboardInterrupt from stop
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # Ray Train leaves its own behind
        shutil.rmtree(scratch, ignore_errors=True)
    return None


def _trainer(job: TrainingJob, scratch: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    parallel = job.recipe.parallel
    use_gpu = parallel.gpus_per_worker > 0
    return TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=parallel.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1, **({"GPU": parallel.gpus_per_worker} if use_gpu else {})},
        ),
        run_config=RunConfig(name=job.stage, storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
    )


def _worker(config: dict[str, Any]) -> None:
    """Runs in a Ray Train worker, which has set the rank's environment."""
    from oar_scale.training.worker import train

    train(config["job"])


def _user_error(error: BaseException) -> UserError | None:
    """The mistake that a worker named, if one did; the other workers fail with it, of broken connections."""
    for cause in _worker_errors(error):
        if isinstance(cause, UserError):
            return UserError(str(cause))
    return None


def _cause(error: BaseException) -> str:
    """The first line of what the first failed worker died of."""
    first = next(iter(_worker_errors(error)), error)
    lines = str(first).strip().splitlines()
    return f"{type(first).__name__}: {lines[0] if lines else ''}"


def _worker_errors(error: BaseException) -> list[BaseException]:
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
