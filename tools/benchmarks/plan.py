"""What `oar plan` says a training step holds, beside what a process that trains holds; and what a CPU's thread does.

    python tools/benchmarks/plan.py                      memory of three sizes, with and without activation checkpointing
    python tools/benchmarks/plan.py --rate               useful operations a second of one thread
    python tools/benchmarks/plan.py --child JSON         one of the sizes in this process; prints JSON

A step is zero_grad, forward, backward and AdamW in float32; measured is the process's highest resident memory during two steps, less
what was resident before the model was made. glibc keeps freed blocks of up to 32 MB for itself; with MALLOC_MMAP_THRESHOLD_ it gives
them back, and resident is what tensors take. Predicted are parameters, gradients, the optimiser's state, and activations by formula
and traced.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import MIB, in_fresh_process, machine, table

SIZES: dict[str, dict[str, Any]] = {
    "4.5 M (emoji)": {"dim": 256, "layers": 4, "heads": 4, "ffn_hidden": 704, "vocab": 512, "grid": 8, "batch": 48},
    "24 M": {"dim": 384, "layers": 6, "heads": 6, "ffn_hidden": 1024, "vocab": 16384, "grid": 16, "batch": 8},
    "111 M (b)": {"dim": 768, "layers": 12, "heads": 12, "ffn_hidden": 2048, "vocab": 16384, "grid": 16, "batch": 4},
}
MODES = ("none", "selective", "full")
GIVE_BACK = "MALLOC_MMAP_THRESHOLD_"


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted and measured memory of a training step.")
    parser.add_argument("--child", metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rate", action="store_true", help="time forward and backward pass of the emoji size instead")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run(json.loads(arguments.child))))
        return
    if arguments.rate:
        rate()
        return
    rows = []
    for size in arguments.sizes:
        for mode in arguments.modes:
            case = {**SIZES[size], "checkpointing": mode}
            kept, taken = measured(case, give_back=False), measured(case, give_back=True)
            said = [predicted(case, traced=traced) for traced in (False, True)]
            cells = [f"{value / MIB:,.0f} ({value / taken - 1:+.1%})" for value in said]
            rows.append([size, case["batch"], mode, f"{taken / MIB:,.0f}", *cells, f"{kept / MIB:,.0f}"])
    print(machine("cpu", 1))
    print(table(["size", "images", "checkpointing", "measured MiB", "formula MiB", "traced MiB", "measured, glibc as it is"], rows))


def measured(case: dict[str, Any], *, give_back: bool) -> int:
    """The peak of a fresh process, in bytes."""
    if give_back:
        os.environ[GIVE_BACK] = "65536"  # glibc reads it when the process starts
    else:
        os.environ.pop(GIVE_BACK, None)
    return int(in_fresh_process(__file__, ["--child", json.dumps(case)], threads=1)["peak"])


def rate() -> None:
    """CPU seconds of one thread, so that other programs do not count."""
    import torch

    from oar_scale.model.flops import useful_flops
    from oar_scale.model.transformer import AnyOrderModel

    torch.set_num_threads(1)
    spec, images, rows = spec_of(SIZES["4.5 M (emoji)"]), 24, []
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


def spec_of(case: dict[str, Any]) -> Any:
    from oar_scale.model.spec import ClassSpec, ModelSpec

    return ModelSpec(
        dim=case["dim"],
        layers=case["layers"],
        heads=case["heads"],
        ffn_hidden=case["ffn_hidden"],
        vocab_size=case["vocab"],
        grid=case["grid"],
        dropout=0.1,
        condition=ClassSpec(classes=1000),
    )


def predicted(case: dict[str, Any], *, traced: bool) -> int:
    """The peak of a process that trains alone, in bytes."""
    from oar_scale.planning.activations import head, trunk
    from oar_scale.planning.memory import alone
    from oar_scale.planning.shape import parameters

    spec = spec_of(case)
    if traced:
        from oar_scale.planning.trace import trace_trunk

        found = trace_trunk(spec, case["batch"], "fp32", case["checkpointing"])
    else:
        found = trunk(spec, case["batch"], "fp32", case["checkpointing"])
    return alone(parameters(spec).total, found, head(spec, case["batch"], "fp32", gpu=False))


def run(case: dict[str, Any]) -> dict[str, int]:
    """Two steps of the real model in this process."""
    import torch

    from oar_scale.config.schema import ParallelConfig
    from oar_scale.model.acceleration import accelerate
    from oar_scale.model.transformer import AnyOrderModel

    small = {**case, "dim": 64, "layers": 1, "heads": 2, "ffn_hidden": 64, "vocab": 64, "grid": 4, "batch": 1}

    def train(case: dict[str, Any]) -> None:
        spec = spec_of(case)
        model = AnyOrderModel(spec).train()
        accelerate(model, ParallelConfig(activation_checkpointing=case["checkpointing"]))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        codes_BN = torch.randint(spec.vocab_size, (case["batch"], spec.cells))
        order_BN = torch.rand(case["batch"], spec.cells).argsort(1)
        label_B1 = torch.zeros(case["batch"], 1, dtype=torch.long)
        for _ in range(2):
            optimizer.zero_grad()
            loss, _ = model.loss(codes_BN, order_BN, model.condition(label_B1))
            loss.backward()
            optimizer.step()

    train(small)  # what is loaded and set up at first use is no part of it
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    train(case)
    return {"peak": _resident("VmHWM") - before}


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
