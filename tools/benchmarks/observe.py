#!/usr/bin/env python3
"""What watching a run costs, in CPU time: the event itself, the driver's readers, the W&B process.

    python tools/benchmarks/observe.py [--events 1000] [--seconds 20]

One process emits ``train`` events as rank 0 does; another one watches them as a driver does, with console, /metrics (scraped
every second) and W&B (offline). It is done once with all the events and once with almost none, over the same time: the
difference is what events cost, the rest is what waiting for them costs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from measure import machine

from oar_scale.observe.events import EventLog
from oar_scale.runtime.program import program

STAGE = "pretrain"


def emit(events: str, count: int, seconds: float) -> float:
    """Emit events evenly over a time; returns the CPU seconds of all of them together, in this process."""
    spent, began = 0.0, time.monotonic()
    with EventLog(events, STAGE) as log:
        log.emit("start", steps=10 * count, start_step=0, world_size=8)
        for number in range(1, count + 1):
            before = time.thread_time()
            log.emit(
                "train", step=10 * number, loss=3.2, loss_by_position=[3.9, 3.4, 3.0, 2.5], lr=1e-3, grad_norm=0.8, images_per_s=61.3,
                tokens_per_s=3923.2, mfu=0.31, step_s=0.78, data_wait_s=0.004, bad_samples=0, storage_retries=0, skipped_batches=0,
                memory_mb=1500.0, disk_free_gb=80.0,
            )  # fmt: skip
            spent += time.thread_time() - before
            time.sleep(max(0.0, began + number * seconds / count - time.monotonic()))
        time.sleep(max(0.0, began + seconds - time.monotonic()))
    return spent


def watch(folder: str) -> None:
    """Watch a stage until standard input ends, then print what that took."""
    from oar_scale.config.schema import Recipe
    from oar_scale.observe.console import Console
    from oar_scale.observe.watch import watching

    recipe = Recipe.model_validate({"name": "bench", "observe": {"wandb": "offline", "metrics_port": 0}})
    ended = threading.Event()
    before = time.process_time()
    with open(os.devnull, "w") as nowhere, watching(f"{folder}/events", STAGE, recipe, folder, console=Console(nowhere), steps=10**6):
        [served] = json.loads(Path(folder, "metrics.json").read_text())

        def scrape() -> None:
            while not ended.wait(1.0):
                urllib.request.urlopen(f"http://{served['targets'][0]}/metrics").read()

        scraper = threading.Thread(target=scrape)
        scraper.start()
        sys.stdin.read()
        ended.set()
        scraper.join()
    own, children = time.process_time() - before, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({"driver": own, "wandb": children.ru_utime + children.ru_stime}))


def measure(count: int, seconds: float) -> dict[str, float]:
    """CPU seconds of emitting, of the driver, and of the W&B process with wandb's own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--watch", folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
            spent = emit(f"{folder}/events", count, seconds)
            output, _ = driver.communicate()
    seconds_by_process: dict[str, float] = json.loads(output)
    return {**seconds_by_process, "emit": spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--watch", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        return watch(arguments.watch)
    busy, idle = measure(arguments.events, arguments.seconds), measure(1, arguments.seconds)
    result: dict[str, Any] = {
        "machine": machine("cpu", 1),
        "events": arguments.events,
        "seconds": arguments.seconds,
        "emit_us_per_event": round(1e6 * busy["emit"] / arguments.events, 1),
        "driver_us_per_event": round(1e6 * (busy["driver"] - idle["driver"]) / arguments.events, 1),
        "driver_idle_ms_per_s": round(1e3 * idle["driver"] / arguments.seconds, 2),
        "wandb_us_per_event": round(1e6 * (busy["wandb"] - idle["wandb"]) / arguments.events, 1),
        "wandb_idle_s": round(idle["wandb"], 2),
    }
    print(json.dumps(result, indent=2))
    return None


if __name__ == "__main__":
    program(main)
