"""What training costs besides the steps themselves: observing it, waiting for data, saving it, and starting it again after a death.

    for stage in prepare tokenizer tokens; do oar $stage recipes/quickstart.yaml -o run_dir=/tmp/prepared; done
    python tools/benchmarks/train.py /tmp/prepared                              overhead of observation, data wait, bytes of a checkpoint
    python tools/benchmarks/train.py /tmp/prepared --kill                       from `kill -9` of a worker to the next step, with Ray

The stall of a checkpoint is measured by ``checkpoint_stall.py``. Two workers over gloo train the recipe's model for some steps, once bare
(no events, no callbacks, nothing that watches), once as a user's run: events every five steps, memory, the loss by position, the console,
the metrics server and the real W&B client (offline). Sides run in fresh processes, in alternation. A shared machine is noisier than what
is measured, so the figure is CPU time of all processes for each step after the first few; wall time is given beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from measure import alternate, in_fresh_process, machine, median_ratio, table

from oar_scale.runtime.program import program

STEPS, WARM_UP, WORKERS = 40, 10, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run whose stage tokens is done")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--side", choices=("bare", "observed"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    if arguments.side:
        print(json.dumps(measure_side(arguments.run, arguments.side)))
    elif arguments.kill:
        print(kill_report(arguments.run, arguments.rounds))
    else:
        print(overhead_report(arguments.run, arguments.rounds))


def overhead_report(run: str, rounds: int) -> str:
    sides = ("bare", "observed")
    results = alternate(sides, rounds, lambda side: in_fresh_process(__file__, [run, "--side", side], 1))
    cpu = {side: [each["cpu_s"] for each in results[side]] for side in sides}
    wall = {side: [each["wall_s"] for each in results[side]] for side in sides}
    rows = [(side, f"{1000 * statistics.median(cpu[side]):.1f}", f"{1000 * statistics.median(wall[side]):.1f}") for side in sides]
    last = results["observed"][-1]
    return "\n".join(
        [
            machine("cpu", 1),
            table(("run", "CPU time of a step, ms, all processes", "wall time of a step, ms"), rows),
            f"observing: {median_ratio(cpu['observed'], cpu['bare']) - 1:+.1%} CPU time, "
            f"{median_ratio(wall['observed'], wall['bare']) - 1:+.1%} wall time",
            f"of which the processes that watch: {last['watching_s'] / last['cpu_s']:.1%}",
            f"waiting for data: {last['data_wait']:.2%} of the step",
            f"a checkpoint: {last['bytes']:,} bytes, {last['bytes'] / last['least']:.3f} of the least (float32 weights and two moments)",
        ]
    )


def measure_side(prepared: str, side: str) -> dict[str, Any]:
    """One training of two workers, bare or observed."""
    from contextlib import nullcontext

    from oar_scale.observe.console import Console
    from oar_scale.observe.events import read_events
    from oar_scale.observe.watch import watching

    with tempfile.TemporaryDirectory() as folder:
        job = _job(prepared, folder)
        events = os.path.join(folder, "events")
        with open(os.devnull, "w") as nowhere:
            console = Console(nowhere)
            watched = watching(events, job.stage, job.recipe, job.root, console=console, steps=STEPS)
            with watched if side == "observed" else nullcontext():
                figures, watching_s = _train(job, side)
        steps = [event for event in read_events(events, job.stage) if event["kind"] == "train"]
        saved = next((event for event in read_events(events, job.stage) if event["kind"] == "checkpoint"), {"bytes": 0})
    wall_s = statistics.median(each["wall_s"] for each in figures)
    share = statistics.median(event["data_wait_s"] / event["step_s"] for event in steps[2:]) if steps else 0.0
    workers_s = sum(each["cpu_s"] for each in figures)
    return {
        "cpu_s": workers_s + watching_s * (side == "observed"),
        "wall_s": wall_s,
        "watching_s": watching_s,
        "data_wait": share,
        "bytes": saved["bytes"],
        "least": 12 * figures[0]["parameters"],
    }


def _watching_cpu(workers: set[int]) -> float:
    """CPU seconds up to now of what watches: threads of this process, and the W&B processes below it."""
    total = 0.0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            if process.pid not in workers:
                times = process.cpu_times()
                total += times.user + times.system
    return total


def _job(prepared: str, folder: str, **observe: Any) -> Any:
    """Pretraining of the prepared run's model in a folder of its own, ``STEPS`` steps with one checkpoint at the end."""
    from oar_scale.config.loading import load_recipe
    from oar_scale.run.context import Run
    from oar_scale.stages.train import write_base
    from oar_scale.storage import join
    from oar_scale.training.job import TrainingJob

    for part in ("tokens", "tokenizers"):
        os.symlink(os.path.abspath(join(prepared, part)), join(folder, part))
    overrides = [
        f"run_dir={folder}",
        "storage.root=null",
        f"parallel.workers={WORKERS}",
        f"pretrain.steps={STEPS}",
        f"pretrain.warmup_steps={WARM_UP}",
        "pretrain.log_every=5",
        f"pretrain.evaluate_every={10 * STEPS}",
        f"pretrain.checkpoint_every={10 * STEPS}",
        "observe.wandb=offline",
        "observe.metrics_port=0",
    ]
    recipe = load_recipe(join(prepared, "recipe.yaml"), overrides)
    run = Run(recipe)
    write_base(run)
    return TrainingJob(recipe, "pretrain", folder, folder, run.model_uri("base"), join(folder, "models", "benchmark.safetensors"))


def _train(job: Any, side: str) -> tuple[list[dict[str, float]], float]:
    """The measurements of each worker, and the CPU seconds a step of the processes that watch them."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results, marks = context.Queue(), context.Queue()
    workers = [context.Process(target=_worker, args=(job, side, rank, port, results, marks)) for rank in range(WORKERS)]
    for worker in workers:
        worker.start()
    pids = {worker.pid for worker in workers if worker.pid}
    seen = []
    for _ in range(2):  # rank 0 has passed the first steps; the last one
        _heard(marks, workers)
        seen.append(_watching_cpu(pids))
    figures = [_heard(results, workers) for _ in workers]
    for worker in workers:
        worker.join()
    return figures, (seen[1] - seen[0]) / (STEPS - 1 - WARM_UP)


def _heard(said: Any, workers: Sequence[Any], limit_s: float = 500.0) -> Any:
    """What a worker puts into a queue next.

    Raises:
        SystemExit: a worker has failed, and has said how, or none says anything. All are ended then: others would wait for that one.
    """
    until = time.monotonic() + limit_s
    while time.monotonic() < until and not any(worker.exitcode for worker in workers):
        with suppress(queue.Empty):
            return said.get(timeout=0.5)
    for worker in workers:
        worker.kill()
        worker.join()
    raise SystemExit("a worker failed" if time.monotonic() < until else f"the workers said nothing for {limit_s:.0f} s")


def _worker(job: Any, side: str, rank: int, port: int, results: Any, passed: Any) -> None:
    """Trains; CPU and wall time of the steps after the first few."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine

    marks: list[tuple[float, float]] = []
    one_step = DeepSpeedEngine.train_step

    def marked(engine: Any, batch: Any, lr: float, seeds: Any) -> Any:
        marks.append((time.process_time(), time.perf_counter()))
        if rank == 0 and len(marks) - 1 in (WARM_UP, STEPS - 1):
            passed.put(len(marks))
        return one_step(engine, batch, lr, seeds)

    DeepSpeedEngine.train_step = marked  # type: ignore[method-assign]
    if side == "observed":
        from oar_scale.distributed.worker import train

        train(job)
    else:
        _bare(job)
    parameters = _parameters(job)
    (cpu, wall), (cpu_end, wall_end) = marks[WARM_UP], marks[STEPS - 1]
    count = STEPS - 1 - WARM_UP
    results.put({"cpu_s": (cpu_end - cpu) / count, "wall_s": (wall_end - wall) / count, "parameters": parameters})


def _bare(job: Any) -> None:
    """The loop with nothing beside it."""
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker_process import WorkerProcess
    from oar_scale.training.inputs import job_prompts, job_stream
    from oar_scale.training.loop import Loop

    with WorkerProcess(job) as process:
        prompts = job_prompts(job)
        engine = DeepSpeedEngine(job, prompts, process)
        stream = job_stream(job, prompts, process.rank, process.world)
        Loop(job, process, engine, stream).run()


def _parameters(job: Any) -> int:
    from oar_scale.model import load_model

    return sum(parameter.numel() for parameter in load_model(job.start_from).parameters())


def kill_report(prepared: str, rounds: int) -> str:
    seconds = []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            seconds.append(_seconds_to_next_step(prepared, folder))
    return f"{machine('cpu', 1)}\nfrom kill -9 of a worker to the end of the next step, Ray Train: " + ", ".join(
        f"{s:.1f} s" for s in seconds
    )


def _seconds_to_next_step(prepared: str, folder: str) -> float:
    from oar_scale.observe.events import read_events

    for part in ("images", "tokens", "tokenizers"):
        os.symlink(os.path.abspath(os.path.join(prepared, part)), os.path.join(folder, part))
    os.makedirs(os.path.join(folder, "stages"))
    for stage in ("data", "tokenizer", "tokens"):
        marker = Path(prepared, "stages", f"{stage}.json").read_bytes()
        Path(folder, "stages", f"{stage}.json").write_bytes(marker)
    settings = [f"run_dir={folder}", "pretrain.steps=400", "pretrain.checkpoint_every=5", "pretrain.log_every=1"]
    options = [option for setting in settings for option in ("-o", setting)]
    command = [sys.executable, "-m", "oar_scale.cli", "train", os.path.join(prepared, "recipe.yaml"), *options]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    events = os.path.join(folder, "events")

    def wait(kind: str, after: float) -> dict[str, Any]:
        while driver.poll() is None:
            for event in read_events(events, "pretrain"):
                if event["kind"] == kind and event["time"] > after:
                    return event
            time.sleep(0.05)
        raise SystemExit("the training ended before it was killed")

    try:
        wait("checkpoint", 0)
        victim, killed = wait("start", 0)["pid"], time.time()
        os.kill(victim, signal.SIGKILL)
        wait("start", killed)
        return float(wait("train", killed)["time"] - killed)
    finally:
        driver.send_signal(signal.SIGTERM)
        driver.wait(120)


if __name__ == "__main__":
    program(main)
