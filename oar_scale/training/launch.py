"""A training job on Ray: TorchTrainer starts the workers, restarts them when one dies, and they go on from the last checkpoint."""

from __future__ import annotations

import shutil
import tempfile
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
        ray_session(cpus=parallel.workers, gpus=int(parallel.gpus_per_worker * parallel.workers)),
        console.follow(events, job.stage, job.training.steps),
    ):
        _fit(job)
    history = read_events(events, job.stage)
    rates = sorted(event["images_per_s"] for event in history if event["kind"] == "train")
    return {
        "steps": job.training.steps,
        "attempts": len(attempts(events, job.stage)) - first,
        "seconds": time.monotonic() - started,
        "images_per_s": rates[len(rates) // 2] if rates else None,
        "parameters": next(event["parameters"] for event in reversed(history) if event["kind"] == "start"),
    }


def _fit(job: TrainingJob) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    parallel = job.recipe.parallel
    use_gpu = parallel.gpus_per_worker > 0
    scratch = tempfile.mkdtemp(prefix="oar-train-")  # Ray Train's own bookkeeping; checkpoints are ours
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=parallel.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1, **({"GPU": parallel.gpus_per_worker} if use_gpu else {})},
        ),
        run_config=RunConfig(name=job.stage, storage_path=scratch, failure_config=FailureConfig(max_failures=parallel.max_failures)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        events = join(job.local, "events")
        last = read_events(events, job.stage)[-1:]
        if last and last[0]["kind"] == "failed":
            raise UserError(last[0]["error"]) from error
        raise UserError(
            f"stage {job.stage}: the workers failed more than parallel.max_failures = {parallel.max_failures} times; "
            f"the last cause:\n{error}\n"
            "Run the same command again to go on from the last checkpoint."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _worker(config: dict[str, Any]) -> None:
    """Runs in a Ray Train worker, which has set the rank's environment."""
    from oar_scale.training.worker import train

    train(config["job"])
