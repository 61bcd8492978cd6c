"""The parts of a training step by themselves; see ``model.py``, which calls this."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from measure import MIB, Meter, alternate, in_fresh_process, machine, median_ratio, table
from torch import Tensor

from oar_scale.data.hashing import device_permutations, permutations
from oar_scale.model import memory_efficient
from oar_scale.model.loss import mean_nll
from oar_scale.model.rope import cell_rotations, rotate, rotate_heads

DIM, HIDDEN, HEADS, VOCAB, GRID = 384, 1024, 6, 16384, 16
CELLS = GRID * GRID
HEAD_METHODS = ("loss.mean_nll", "cross_entropy", "linear_cross_entropy")


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.head and arguments.side:
        print(json.dumps(head(arguments, arguments.side)))
        return
    print(machine(arguments.device, arguments.threads))
    print({"parts": compare_parts, "head": compare_heads, "orders": compare_orders}[_mode(arguments)](arguments))


def _mode(arguments: argparse.Namespace) -> str:
    return next(mode for mode in ("parts", "head", "orders") if getattr(arguments, mode))


# -- the loss of the output head ------------------------------------------------------------------------------------------


def compare_heads(arguments: argparse.Namespace) -> str:
    given = [f"--{name}={getattr(arguments, name)}" for name in ("batch", "device", "dtype", "threads", "steps")]

    def run(method: str) -> dict[str, Any]:
        return in_fresh_process(__file__.replace("parts.py", "model.py"), ["--head", *given, "--side", method], arguments.threads)

    results = alternate(HEAD_METHODS, arguments.rounds, run)
    ms = {method: [1e3 * statistics.median(result["seconds"]) for result in runs] for method, runs in results.items()}
    rows = []
    for method, runs in results.items():
        peak = statistics.median(result["peak"] for result in runs)
        ratio = median_ratio(ms[method], ms[HEAD_METHODS[0]])
        errors = [f"{runs[0][error]:.1e}" for error in ("loss", "d_rows", "d_weight")]
        rows.append([method, f"{statistics.median(ms[method]):,.0f}", f"{ratio:.2f}", f"{peak:,.0f}", *errors])
    title = f"{arguments.batch * CELLS} rows of {DIM}, {VOCAB:,} codes, {arguments.dtype}; forward and backward\n\n"
    return title + table(["method", "ms", "ratio", "peak MiB", "error of loss", "of row gradients", "of weight gradients"], rows)


def head(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """Seconds of each forward and backward pass, peak memory, and errors against float64: nats, and relative to the gradient's norm."""
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    rows = torch.randn(arguments.batch * CELLS, DIM).to(arguments.device, dtype).requires_grad_()
    weight = (0.05 * torch.randn(VOCAB, DIM)).to(arguments.device, dtype).requires_grad_()
    targets = torch.randint(VOCAB, (len(rows),), device=arguments.device)

    def loss(rows: Tensor, weight: Tensor) -> Tensor:
        if method == "loss.mean_nll":
            return mean_nll(rows, weight, targets)[0]
        if method == "cross_entropy":
            return F.cross_entropy((rows @ weight.t()).float(), targets)
        return F.linear_cross_entropy(rows, weight, targets, options=torch.nn.LinearCrossEntropyOptions())  # type: ignore[no-any-return]

    def step() -> None:
        rows.grad = weight.grad = None
        loss(rows, weight).backward()

    meter = Meter(arguments.device)
    step()
    for _ in range(arguments.steps):
        meter.time(step)
    result: dict[str, Any] = {"seconds": meter.seconds, "peak": meter.peak()}
    exact = [rows.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    reference = F.cross_entropy(exact[0] @ exact[1].t(), targets)
    reference.backward()
    result["loss"] = abs(loss(rows, weight).item() - reference.item())
    for name, mine, true in (("d_rows", rows, exact[0]), ("d_weight", weight, exact[1])):
        assert mine.grad is not None and true.grad is not None
        result[name] = ((mine.grad.double() - true.grad).norm() / true.grad.norm()).item()
    return result


# -- parts of a block -----------------------------------------------------------------------------------------------------


def compare_parts(arguments: argparse.Namespace) -> str:
    batch, length = arguments.batch, 2 * CELLS
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape).to(arguments.device, dtype).requires_grad_()

    rotations = cell_rotations(GRID, DIM // HEADS, 1e4)[torch.rand(batch, CELLS).argsort(1).repeat_interleave(2, 1)].to(arguments.device)
    x, y, scale, qkv = rows(batch, length, DIM), rows(batch, length, DIM), rows(DIM), rows(batch, length, 3 * HEADS, DIM // HEADS)
    gate, up, weight = rows(batch, length, HIDDEN), rows(batch, length, HIDDEN), rows(DIM, HIDDEN)

    def rotated() -> tuple[Tensor, ...]:
        qk, v = qkv.split([2 * HEADS, HEADS], dim=2)
        return (*rotate(qk, rotations[:, :, None]).split(HEADS, dim=2), v)

    pairs: dict[str, tuple[list[Tensor], Callable[[], object], Callable[[], object]]] = {
        "rms_norm": ([x, scale], lambda: memory_efficient.rms_norm(x, scale, 1e-5), lambda: F.rms_norm(x, [DIM], scale, 1e-5)),
        "rotate_heads": ([qkv], lambda: rotate_heads(qkv, rotations, HEADS), rotated),
        "gated_linear": (
            [gate, up, weight],
            lambda: memory_efficient.gated_linear(gate, up, weight),
            lambda: F.linear(F.silu(gate) * up, weight),
        ),
        "add_dropped": ([x, y], lambda: memory_efficient.add_dropped(x, y, 0.1), lambda: x + F.dropout(y, 0.1)),
    }
    lines = []
    for name, (inputs, ours, plain) in pairs.items():
        ms = timed((ours, plain), inputs, arguments)
        kept = [saved_mib(function, inputs) for function in (ours, plain)]
        lines.append([name, *(f"{statistics.median(t):.1f}" for t in ms), f"{median_ratio(*ms):.2f}", *(f"{size:.1f}" for size in kept)])
    title = f"{batch} x {length} rows of {DIM}, feed-forward {HIDDEN}, {arguments.dtype}; forward and backward; kept beside the inputs\n\n"
    return title + table(["part", "ms", "ms, composition", "ratio", "kept MiB", "kept MiB, composition"], lines)


def timed(functions: Sequence[Callable[[], object]], inputs: Sequence[Tensor], arguments: argparse.Namespace) -> list[list[float]]:
    """Milliseconds of forward and backward, the functions alternating."""
    meters = [Meter(arguments.device) for _ in functions]
    for number in range(1 + 5 * arguments.steps):
        for meter, function in zip(meters, functions, strict=True):
            meter.time(lambda function=function: backward(function()))  # type: ignore[misc]
            for tensor in inputs:
                tensor.grad = None
            if number == 0:
                meter.seconds.clear()
    return [[1e3 * s for s in meter.seconds] for meter in meters]


def backward(out: object) -> None:
    outputs = [out] if isinstance(out, Tensor) else list(out)  # type: ignore[call-overload]
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])


def saved_mib(function: Callable[[], object], inputs: Sequence[Tensor]) -> float:
    """MiB kept for the backward pass, beside the inputs."""
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in inputs}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    del out
    return sum(kept.values()) / MIB


# -- orders -----------------------------------------------------------------------------------------------------------------


def compare_orders(arguments: argparse.Namespace) -> str:
    device = torch.device(arguments.device)

    def one_by_one(uid_B: Tensor) -> Tensor:
        return torch.stack([torch.randperm(CELLS) for _ in range(len(uid_B))]).to(device)

    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "torch.randperm, image by image (as RandAR)": one_by_one,
        "hashing.permutations, numpy": lambda uid_B: torch.from_numpy(permutations("order", CELLS, 0, uid_B.cpu().numpy())).to(device),
        "hashing.device_permutations": lambda uid_B: device_permutations("order", CELLS, 0, uid_B),
    }
    batches = (8, 64, 512)
    ms: dict[str, list[str]] = {name: [] for name in methods}
    for batch in batches:
        uid_B = torch.arange(batch, device=device)
        meters = {name: Meter(arguments.device) for name in methods}
        for number in range(1 + 20 * arguments.steps):
            for name, method in methods.items():
                meters[name].time(lambda method=method, uid_B=uid_B: method(uid_B))  # type: ignore[misc]
                if number == 0:
                    meters[name].seconds.clear()
        for name, meter in meters.items():
            ms[name].append(f"{1e3 * statistics.median(meter.seconds):.2f}")
    return f"orders of {CELLS} cells, ms a batch\n\n" + table(
        ["method", *(f"{b} images" for b in batches)], [[n, *row] for n, row in ms.items()]
    )
