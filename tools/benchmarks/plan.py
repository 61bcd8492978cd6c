"""The memory `oar plan` predicts for a training worker, beside what training workers hold; and the speed of a CPU's thread.

    python tools/benchmarks/plan.py                      memory of three sizes, with and without activation checkpointing
    python tools/benchmarks/plan.py --zero 0 1 2 3       under each ZeRO stage
    python tools/benchmarks/plan.py --rate               useful operations a second of one thread

Two workers are the training's own engine (DeepSpeed over gloo) and its own steps; measured is the highest resident memory of the larger one
during two steps, less what was resident before the engine was made. glibc keeps freed blocks of up to 32 MB for itself; where
it returns them, the resident memory is what tensors take: the column `tensors` of the plan.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import MIB, machine, table

from oar_scale.runtime.program import program

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LABELS = ["tokenizer.text={type: labels, classes: 1000}"]
B = str(RECIPES / "imagenet-b.yaml")
SIZES: dict[str, dict[str, Any]] = {
    "4.5 M (emoji)": {"recipe": str(RECIPES / "quickstart-from-scratch.yaml"), "overrides": LABELS, "images": 48},
    "24 M": {"recipe": B, "overrides": ["model.dim=384", "model.layers=6", "model.heads=6"], "images": 8},
    "111 M (b)": {"recipe": B, "overrides": [], "images": 4},
}
MODES = ("none", "selective", "full")
WORKERS = 2
KEPT = 65536
"""Bytes of the largest block that glibc keeps for itself when it is set to return memory."""
M_MMAP_THRESHOLD = -3


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted and measured memory of a training step.")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--give-back", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--zero", nargs="+", type=int, choices=range(4), default=[2], metavar="STAGE")
    parser.add_argument("--rate", action="store_true", help="time forward and backward pass of the emoji size instead")
    parser.add_argument("--seconds", action="store_true", help="time `oar plan` of some recipes instead, also with traced activations")
    arguments = parser.parse_args()
    if arguments.child:
        worker([json.loads(arguments.child[0])], arguments.child[1], give_back=arguments.give_back)
        return
    if arguments.rate:
        rate()
        return
    if arguments.seconds:
        command_seconds()
        return
    rows = []
    for size in arguments.sizes:
        for mode in arguments.modes:
            for stage in arguments.zero:
                wanted = case(size, checkpointing=mode, zero_stage=stage)
                kept, taken = measured(wanted, give_back=False), measured(wanted, give_back=True)
                predictions = [predicted(wanted, traced=traced) for traced in (False, True)]
                cells = [f"{value / MIB:,.0f} ({value / taken - 1:+.1%})" for value in predictions]
                rows.append([size, SIZES[size]["images"], stage, mode, f"{taken / MIB:,.0f}", *cells, f"{kept / MIB:,.0f}"])
    print(machine("cpu", 1))
    print(table(["size", "images", "ZeRO", "checkpointing", "measured MiB", "formula MiB", "traced MiB", "measured, glibc as it is"], rows))


def command_seconds() -> None:
    """Print the seconds of `oar plan`, from the command to its end, imports included: the best of three."""
    rows = []
    for recipe in ("emoji", "imagenet-xl", "text-13b"):
        cells = []
        for options in ([], ["--activations"]):
            command = [sys.executable, "-m", "oar_scale.cli", "plan", str(RECIPES / f"{recipe}.yaml"), *options]
            taken = []
            for _ in range(3):
                began = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                taken.append(time.perf_counter() - began)
            cells.append(f"{min(taken):.2f}")
        rows.append([recipe, *cells])
    print(machine("cpu", 1))
    print(table(["recipe", "formula s", "traced s"], rows))


def case(size: str, *, checkpointing: str, images: int | None = None, zero_stage: int = 2) -> dict[str, Any]:
    """A recipe and what is changed in it: so many images for each of two workers that have no GPU, in one micro-batch."""
    images = images or SIZES[size]["images"]
    parallel = {
        "gpus_per_worker": 0,
        "workers": WORKERS,
        "micro_batch": images,
        "precision": "fp32",
        "zero_stage": zero_stage,
        "activation_checkpointing": checkpointing,
        "compile": "false",
    }
    changed = [f"parallel.{key}={value}" for key, value in parallel.items()]
    changed += [f"{stage}.global_batch={WORKERS * images}" for stage in ("pretrain", "finetune")]
    return {"recipe": SIZES[size]["recipe"], "overrides": [*SIZES[size]["overrides"], *changed, f"data.canonical_streams={WORKERS}"]}


def predicted(case: dict[str, Any], *, traced: bool) -> int:
    """Bytes of a worker's tensors, as `oar plan` prints them."""
    from oar_scale.planning.plan import PlanOptions, make_plan

    return make_plan(case["recipe"], case["overrides"], PlanOptions(activations=traced)).fit.memory.tensors


def measured(case: dict[str, Any], *, give_back: bool) -> int:
    """The peak of the larger of two fresh processes, in bytes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = {"WORLD_SIZE": str(WORKERS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, **rendezvous, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", json.dumps(case), folder, *["--give-back"] * give_back]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(WORKERS)]
        processes = [subprocess.Popen(command, env={**environment, **rank}, stdout=sys.stderr) for rank in ranks]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"{case['recipe']} failed")
        return peaks(folder)[0]


def peaks(folder: str) -> list[int]:
    """Peak memory of the larger worker in each case, in bytes."""
    of_ranks = [json.loads(path.read_text()) for path in Path(folder).glob("peaks-*")]
    return [max(of_case) for of_case in zip(*of_ranks, strict=True)]


def worker(cases: list[dict[str, Any]], folder: str, *, give_back: bool) -> None:
    """Two steps of the real engine for each case, in this process, which knows its rank; leaves the bytes at the peaks in ``folder``."""
    import torch
    import torch.distributed as dist

    from oar_scale.config.loading import load_recipe
    from oar_scale.config.schema import LabelsConfig, Recipe
    from oar_scale.data.stream import Batch
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker_process import WorkerProcess
    from oar_scale.model import AnyOrderModel, save_model
    from oar_scale.planning.shape import spec_of
    from oar_scale.tokenizers.prompts import load_prompts
    from oar_scale.training.job import TrainingJob

    if give_back:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, KEPT)

    def train(recipe: Recipe, process: WorkerProcess) -> int:
        spec, text = spec_of(recipe), recipe.tokenizer.text
        assert isinstance(text, LabelsConfig)
        job = TrainingJob(recipe, "pretrain", folder, folder, os.path.join(folder, "first"), os.path.join(folder, "result"))
        if process.rank == 0:
            save_model(job.start_from, AnyOrderModel(spec))
        dist.barrier()
        before = _resident("VmRSS")
        engine = DeepSpeedEngine(job, load_prompts(text, folder), process)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        count = recipe.parallel.micro_batch
        several, no = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
        for step in range(2):
            codes_bN = torch.randint(spec.vocab_size, (count, spec.cells))
            batch = Batch(step, torch.arange(count), codes_bN, several[:, None], no, 0, several, no, torch.zeros_like(codes_bN))
            engine.train_step(batch, 1e-4)
        taken = _resident("VmHWM") - before
        engine.destroy()
        return taken

    recipes = [load_recipe(case["recipe"], case["overrides"]) for case in cases]
    small = ["model.dim=64", "model.layers=1", "model.heads=2", "data.image_size=64", "tokenizer.image.codebook_size=64"]
    with WorkerProcess(TrainingJob(recipes[0], "pretrain", folder, folder, "", "")) as process:
        train(load_recipe(cases[0]["recipe"], [*cases[0]["overrides"], *small]), process)  # what is set up at first use
        Path(folder, f"peaks-{process.rank}").write_text(json.dumps([train(recipe, process) for recipe in recipes]))


def rate() -> None:
    """CPU seconds of one thread, so that other programs do not count."""
    import torch

    from oar_scale.config.loading import load_recipe
    from oar_scale.model.flops import useful_flops
    from oar_scale.model.transformer import AnyOrderModel
    from oar_scale.planning.shape import spec_of

    torch.set_num_threads(1)
    spec, images, rows = spec_of(load_recipe(SIZES["4.5 M (emoji)"]["recipe"], LABELS)), 24, []
    codes_BN, label_B1 = torch.randint(spec.vocab_size, (images, spec.cells)), torch.zeros(images, 1, dtype=torch.long)
    order_BN = torch.rand(images, spec.cells).argsort(1)
    for dtype in (torch.float32, torch.bfloat16):
        model, seconds = AnyOrderModel(spec).to(dtype).train(), []
        for _ in range(5):
            begun = time.process_time()
            model.loss(codes_BN, order_BN, model.condition(label_B1))[0].backward()
            seconds.append(time.process_time() - begun)
        took = statistics.median(seconds[1:])
        rows.append([str(dtype).removeprefix("torch."), f"{images / took:.1f}", f"{images * useful_flops(spec) / took / 1e12:.3f}"])
    print(machine("cpu", 1))
    print(table(["precision", "images/s", "useful TFLOP/s"], rows))


def _resident(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


if __name__ == "__main__":
    program(main)
