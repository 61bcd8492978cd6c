"""Event files of runs that never were, with every kind of event and every field that the documentation names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image

from oar_scale.observe.events import EventLog

STEPS = 100
RECIPE = {"name": "emoji", "model": {"dim": 256}, "observe": {"stall_s": 600.0}}


def start(log: EventLog, start_step: int = 0, **changed: Any) -> None:
    fields: dict[str, Any] = {
        "steps": STEPS,
        "start_step": start_step,
        "parameters": 5_000_000,
        "world_size": 2,
        "zero_stage": 2,
        "precision": "bf16",
        "global_batch": 48,
        "micro_batch": 12,
        "accumulation": 2,
        "pid": 4711,
        "host": "node-1",
        "flops_per_image": 1.5e9,
        "cells": 64,
        "seed": 17,
        "code": "v0.5.0-3-gabc1234",
        "versions": {"torch": "2.15.0", "deepspeed": "0.19.8", "ray": "2.60.0"},
        "recipe": RECIPE,
        "left_out_batches": 0,
        "notices": ["no MFU: the peak of NVIDIA H300 is not known"],
        "planned_images_per_s": 64.0,
    }
    log.emit("start", **(fields | changed))


def loss_at(step: int) -> float:
    return round(3 + 2 * math.exp(-step / 30), 6)


def train(log: EventLog, step: int, **changed: Any) -> None:
    loss = loss_at(step)
    fields: dict[str, Any] = {
        "loss": loss,
        "loss_by_position": [loss + 0.5, loss + 0.1, loss - 0.2, loss - 0.4],
        "lr": 1e-3,
        "grad_norm": 0.8,
        "images_per_s": 60.0 + step % 3,
        "tokens_per_s": 64 * (60.0 + step % 3),
        "mfu": 0.31,
        "step_s": 0.8,
        "data_wait_s": 0.004,
        "bad_samples": int(step == 40),
        "storage_retries": int(step == 50),
        "skipped_batches": int(step == 60),
        "memory_mb": 1500.0,
        "disk_free_gb": 80.0,
        "slowest_rank": 1,
        "slowest_host": "node-2",
        "slowest_rank_s": 0.33,
        "median_rank_s": 0.3,
    }
    log.emit("train", step=step, **(fields | changed))


def heldout(log: EventLog, step: int) -> None:
    nll = loss_at(step) + 0.1
    log.emit("heldout", step=step, nll_random=nll, nll_raster=nll - 0.05, nll_stored=nll - 0.1, nll_ema=nll - 0.02, seconds=1.5)


def checkpoint(log: EventLog, step: int) -> None:
    uri = f"s3://bucket/run/checkpoints/pretrain/step-{step:08d}"
    log.emit("checkpoint", step=step, seconds=0.4, wait_s=0.0, upload_s=2.5, bytes=60_000_000, uri=uri)


def samples(log: EventLog, step: int, folder: Path) -> None:
    """``folder`` is the run's local one."""
    names = {"image": f"samples/step-{step:08d}.png", "orders": f"samples/step-{step:08d}-orders.png"}
    for shade, name in enumerate(names.values()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (step % 255, 100 * shade, 0)).save(folder / name)
    log.emit("samples", step=step, captions=["a grinning cat", "pizza"], **names)


def faults(log: EventLog, step: int) -> None:
    """One of each kind that calls for somebody."""
    log.emit("non_finite", step=step, loss=float("nan"), grad_norm=float("inf"), uids=[3, 17, 99])
    log.emit("bad_sample", step=step, uid=12, fault="truncated")
    log.emit("spike", step=step, loss=9.0, expected=3.2, action="warn")
    log.emit("checkpoint_failed", step=step, fault="the disk is full")


def driver(events: Path) -> None:
    """What the process says between two attempts that starts the workers, when it has lost some."""
    with EventLog(str(events), "pretrain") as log:
        log.emit("worker_failure", cause="ActorDiedError: rank 1")
    with EventLog(str(events), "pretrain") as log:
        log.emit("failed", cause="RayError: the head node is gone", final=False, host="node-1", pid=4711)
    with EventLog(str(events), "pretrain") as log:
        log.emit("resized", from_workers=2, to_workers=1, reason="room in the cluster")


def interrupted(events: Path) -> None:
    """An attempt that is stopped after step 60, with everything in it; its last checkpoint is of step 50."""
    with EventLog(str(events), "pretrain") as log:
        start(log)
        for step in range(10, 70, 10):
            train(log, step)
            if step == 30:
                heldout(log, step)
                samples(log, step, events.parent)
                faults(log, step)
            if step == 60:
                checkpoint(log, 50)  # committed when training is further
        log.emit("stopping", step=60, reason="SIGTERM")


def resumed(events: Path) -> None:
    """The attempt after it, up to the end."""
    with EventLog(str(events), "pretrain") as log:
        log.emit("rejected_checkpoint", uri="s3://bucket/run/checkpoints/pretrain/step-00000055", fault="bad checksum")
        log.emit("resumed", step=50, uri="s3://bucket/...", converted=True, world_size=2, zero_stage=2, seconds=3.0)
        start(log, 50, world_size=1)
        log.emit("settings_changed", step=50, changes={"pretrain.lr": {"was": 1e-3, "is": 5e-4}})
        for step in range(60, STEPS + 1, 10):
            train(log, step)
        heldout(log, STEPS)
        checkpoint(log, STEPS)
        log.emit("profile", step=STEPS, trace="profile/trace.json", table="profile/table.txt")
        log.emit("end", step=STEPS, seconds=80.0)


def pools(events: Path) -> None:
    """The stages that are no training."""
    with EventLog(str(events), "tokenizer") as log:
        for step in (100, 200):
            log.emit("vq", step=step, loss=0.1, psnr=20.0, codebook_use=0.9)
        log.emit("end", seconds=30.0)
    with EventLog(str(events), "extract") as log:
        for done in (48, 96):
            log.emit("pool", done=done, total=96, images_per_s=40.0, actors=2, retries=0, deaths=0, late=0)


def whole_run(folder: Path) -> Path:
    """All of it; returns the folder of the events."""
    events = folder / "events"
    interrupted(events)
    driver(events)
    resumed(events)
    pools(events)
    return events
