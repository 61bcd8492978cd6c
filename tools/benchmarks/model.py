"""How fast the model trains, and in how much memory, beside RandAR's own code with the same weights, codes and orders.

    python tools/benchmarks/model.py --randar CHECKOUT           a training step, ours and theirs
    python tools/benchmarks/model.py --beside decoupled          a training step, ours in layouts instructed and decoupled
    python tools/benchmarks/model.py --head                      the loss of the output head, three methods
    python tools/benchmarks/model.py --parts                     the parts of a block that keep less, and their plain composition
    python tools/benchmarks/model.py --orders                    one random order an image

CHECKOUT is a copy of https://github.com/ziqipang/RandAR, anywhere; without ``--randar`` ours is measured alone. Every side
runs in fresh processes, in alternation; peak memory is each process's own, less what it took for imports and data. A training
step is zero_grad, forward, backward, clipping and AdamW, each side as its authors write it. Before it is timed, each side
prints the loss and the gradient's norm of the same images in the same orders without dropout: they must agree.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import CLASSES, LAYOUTS, Meter, alternate, benchmark_spec, in_fresh_process, machine, median_ratio, table

from oar_scale.runtime.program import program

if TYPE_CHECKING:
    from torch import Tensor

RANDAR, SHIPPED = "RandAR", "RandAR as shipped (full recomputation)"
OURS = {
    "ours": ("none", False),
    "ours, compiled": ("none", True),
    "ours, selective recomputation": ("selective", False),
    "ours, full recomputation": ("full", False),
}
"""Activation checkpointing and compilation of our sides."""
BESIDE = "ours, layout "
"""What a side in another layout is called, the layout's name behind it."""
LR, DECAY, BETAS, CLIP, DROPOUT = 4e-4, 0.05, (0.9, 0.95), 1.0, 0.1  # RandAR's recipe
CHECKED = 8
"""Images at most of which results are compared between the sides; training in float32: more might not fit a GPU."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--randar", help="a checkout of RandAR")
    mode = parser.add_mutually_exclusive_group()
    for name in ("head", "parts", "orders"):
        mode.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--size", help="a size of recipes/base; default: dim 384, 6 layers, 6 heads")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process, after a first one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also ours with compiled blocks")
    parser.add_argument("--beside", choices=LAYOUTS[1:], help="also ours in this layout, of the same width and depth")
    parser.add_argument("--recompute", action="store_true", help="also RandAR's and ours with activation checkpointing")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def side(argv: Sequence[str]) -> dict[str, Any]:
    """What ``--side`` prints: one side measured in this process."""
    return measured(_parser().parse_args(argv))


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.head or arguments.parts or arguments.orders:
        import parts  # here, because it imports torch

        parts.main(arguments)
    elif arguments.side:
        print(json.dumps(measured(arguments)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Measure all sides, print the table; exits with 1 if the sides do not compute the same."""
    sides = [RANDAR] if arguments.randar else []
    sides += [SHIPPED] if arguments.randar and arguments.recompute else []
    sides += ["ours"] + (["ours, compiled"] if arguments.compile else [])
    sides += ["ours, selective recomputation", "ours, full recomputation"] if arguments.recompute else []
    sides += [f"{BESIDE}{arguments.beside}"] if arguments.beside else []
    with tempfile.TemporaryDirectory() as folder:
        common = [*sys.argv[1:], "--folder", folder]

        def run(side: str) -> dict[str, Any]:
            return in_fresh_process(__file__, [*common, "--side", side], arguments.threads)

        setup = run("prepare")
        results = alternate(sides, arguments.rounds, run)
    rate = {side: [arguments.batch / statistics.median(result["seconds"]) for result in runs] for side, runs in results.items()}
    peak = {side: [result["peak"] for result in runs] for side, runs in results.items()}
    cpu = {side: [statistics.median(result["cpu_seconds"]) for result in runs] for side, runs in results.items()}
    first = sides[0]
    rows = [
        [
            side,
            f"{statistics.median(rate[side]):.2f}",
            f"{median_ratio(rate[side], rate[first]):.2f}",
            f"{statistics.median(cpu[side]):.2f}",
            f"{median_ratio(cpu[side], cpu[first]):.2f}",
            f"{statistics.median(peak[side]):,.0f}",
            f"{median_ratio(peak[side], peak[first]):.2f}",
            f"{results[side][0]['loss']:.6f}",
            f"{results[side][0]['norm']:.5f}",
            *([f"{_mfu(statistics.median(rate[side]), setup):.1%}"] if setup["peak_flops"] else []),
        ]
        for side in sides
    ]
    print(setup["machine"], setup["setting"], sep="\n", end="\n\n")
    head = ["side", "images/s", "ratio", "CPU s a step", "ratio", "peak MiB", "ratio", "loss", "gradient norm"]
    print(table([*head, *(["MFU"] if setup["peak_flops"] else [])], rows))
    for side in sides[1:]:
        if side.startswith(BESIDE):  # another model
            continue
        for name in ("loss", "norm"):
            mine, other = results[side][0][name], results[first][0][name]
            if abs(mine - other) > 1e-4 * max(1.0, abs(other)):
                raise SystemExit(f"{side} and {first} do not compute the same {name}: {mine} and {other}")


def _mfu(images_per_s: float, setup: dict[str, Any]) -> float:
    """Model FLOPs utilisation: what training needs (``oar_scale.model.flops.useful_flops``) over what the chip can do."""
    return float(images_per_s * setup["useful_flops"] / setup["peak_flops"])


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """One side in this process: seconds of each step, peak memory in MiB, loss and gradient norm without dropout."""
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.side == "prepare":
        return prepare(arguments)
    inputs = torch.load(arguments.folder / "inputs.pt")
    codes_BN, order_BN, labels_B = (inputs[name].to(arguments.device) for name in ("codes", "order", "labels"))
    if arguments.side.startswith("ours"):
        side: Side = Ours(arguments)
    else:
        sys.path.insert(0, arguments.randar)
        side = Theirs(arguments)
    importlib.import_module("torch._dynamo")  # the first step would: imports are nobody's memory
    meter = Meter(arguments.device)
    side.build(torch.load(arguments.folder / "weights.pt"))
    values = side.loss_and_norm(codes_BN[:CHECKED], labels_B[:CHECKED], order_BN[:CHECKED])
    side.start_training()
    side.step(codes_BN, labels_B)
    for _ in range(arguments.steps):
        meter.time(lambda: side.step(codes_BN, labels_B))
    return {**values, "seconds": meter.seconds, "cpu_seconds": meter.cpu_seconds, "peak": meter.peak(), "images": arguments.batch}


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write weights (under RandAR's names), codes, orders and labels; returns the setup for the table's caption."""
    import torch

    from oar_scale.model import AnyOrderModel
    from oar_scale.model.flops import useful_flops
    from oar_scale.model.peer_weights import export_peer
    from oar_scale.runtime.gpu_peaks import peak_flops

    torch.manual_seed(0)
    spec = model_spec(arguments)
    model = AnyOrderModel(spec)
    torch.nn.init.normal_(model.output.weight, 0.0, 0.02)  # it starts at zero, where every model has the same loss
    batch = (arguments.batch, spec.cells)
    inputs = {
        "codes": torch.randint(spec.vocab_size, batch),
        "order": torch.rand(batch).argsort(1),
        "labels": torch.randint(CLASSES, (arguments.batch,)),
    }
    torch.save(inputs, arguments.folder / "inputs.pt")
    torch.save(export_peer(model, "randar"), arguments.folder / "weights.pt")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else ""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    setting = (
        f"dim {spec.dim}, {spec.layers} layers, {spec.heads} heads, {spec.vocab_size:,} codes, {spec.cells} cells, "
        f"batch {arguments.batch}, {arguments.dtype}, dropout {DROPOUT}; {parameters:.1f} M parameters"
    )
    return {
        "machine": machine(arguments.device, arguments.threads),
        "setting": setting,
        "useful_flops": useful_flops(spec),
        "peak_flops": peak_flops(name, arguments.dtype),
    }


def model_spec(arguments: argparse.Namespace) -> Any:
    """Of ``--size``, with RandAR's habits."""
    spec = benchmark_spec(arguments.size, "instructed")
    return spec.model_copy(update={"dropout": DROPOUT, "condition_rotation": "zero"})


class Side:
    """A model and its training step."""

    model: Any

    def build(self, tensors: dict[str, Tensor]) -> None:
        """Make the model of RandAR's state dict, for evaluation."""
        raise NotImplementedError

    def loss(self, codes_BN: Tensor, labels_B: Tensor, order_BN: Tensor) -> Tensor:
        raise NotImplementedError

    def start_training(self) -> None:
        """Training mode, the recipe's precision, and an optimizer."""
        raise NotImplementedError

    def step(self, codes_BN: Tensor, labels_B: Tensor) -> None:
        """One training step, its random orders included."""
        raise NotImplementedError

    def loss_and_norm(self, codes_BN: Tensor, labels_B: Tensor, order_BN: Tensor) -> dict[str, float]:
        """Loss and gradient norm."""
        import torch

        loss = self.loss(codes_BN, labels_B, order_BN)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad()
        return {"loss": loss.item(), "norm": norm.item()}


class Ours(Side):
    """As ``oar_scale.distributed.worker`` trains: weights in the precision of the recipe, AdamW on a float32 copy of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from oar_scale.data.hashing import device_permutations
        from oar_scale.model import acceleration
        from oar_scale.model import peer_weights as conversion

        self.arguments, self.conversion, self.acceleration, self.permutations = arguments, conversion, acceleration, device_permutations

    def build(self, tensors: dict[str, Tensor]) -> None:
        import torch

        from oar_scale.config.schema import ParallelConfig
        from oar_scale.model import AnyOrderModel

        spec, side = model_spec(self.arguments), self.arguments.side
        if side.startswith(BESIDE):
            other = benchmark_spec(self.arguments.size, side.removeprefix(BESIDE))
            model = AnyOrderModel(other.model_copy(update={"dropout": DROPOUT}))
            torch.nn.init.normal_(model.output.weight, 0.0, 0.02)
        else:
            model = self.conversion.import_peer(tensors, "randar", "the benchmark's weights", heads=spec.heads)
            model.spec = spec
            for block in model.layers:
                block.dropout = DROPOUT
        checkpointing, compiled = OURS.get(side, OURS["ours"])
        self.acceleration.accelerate(model, ParallelConfig(activation_checkpointing=checkpointing, compile=compiled))
        self.model = model.eval().to(self.arguments.device)

    def loss(self, codes_BN: Tensor, labels_B: Tensor, order_BN: Tensor) -> Tensor:
        loss: Tensor = self.model.loss(codes_BN, order_BN, self.model.condition(labels_B))[0]
        return loss

    def start_training(self) -> None:
        import torch

        self.model.train()
        half = self.arguments.dtype == "bf16"
        self.weights = list(self.model.to(torch.bfloat16 if half else torch.float32).parameters())
        self.masters = [w.detach().float().requires_grad_() for w in self.weights] if half else self.weights
        matrices = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Linear)}
        decay = [id(w) in matrices for w in self.weights]
        groups = [
            {"params": [m for m, d in zip(self.masters, decay, strict=True) if d is wanted], "weight_decay": rate}
            for wanted, rate in ((True, DECAY), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
        self.step_number = 0

    def step(self, codes_BN: Tensor, labels_B: Tensor) -> None:
        import torch

        self.step_number += 1
        uid_B = torch.arange(len(codes_BN), device=codes_BN.device)
        order_BN = self.permutations("order", codes_BN.shape[1], self.step_number, uid_B)
        drop_B = torch.rand(len(codes_BN), device=codes_BN.device) < DROPOUT
        self.model.loss(codes_BN, order_BN, self.model.condition(labels_B, drop_B))[0].backward()
        if self.masters is not self.weights:
            for weight, master in zip(self.weights, self.masters, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        if self.masters is not self.weights:
            torch._foreach_copy_([w.detach() for w in self.weights], [m.detach() for m in self.masters])
        self.optimizer.zero_grad()


class Theirs(Side):
    """As RandAR trains: its own orders, loss and optimizer; in bf16 under autocast."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from RandAR.model.randar_gpt import RandARTransformer

        self.arguments, self.transformer = arguments, RandARTransformer

    def build(self, tensors: dict[str, Tensor]) -> None:
        spec = model_spec(self.arguments)
        model = self.transformer(
            dim=spec.dim,
            n_layer=spec.layers,
            n_head=spec.heads,
            num_classes=CLASSES,
            vocab_size=spec.vocab_size,
            block_size=spec.cells,
            token_dropout_p=DROPOUT,
            resid_dropout_p=DROPOUT,
            ffn_dropout_p=DROPOUT,
            grad_checkpointing=self.arguments.side == SHIPPED,
        )
        model.load_state_dict(tensors)
        self.model = model.eval().to(self.arguments.device)

    def loss(self, codes_BN: Tensor, labels_B: Tensor, order_BN: Tensor | None) -> Tensor:
        loss: Tensor = self.model(codes_BN, labels_B, token_order=order_BN, targets=codes_BN)[1]
        return loss

    def start_training(self) -> None:
        self.model.train()
        self.optimizer = self.model.configure_optimizer(LR, DECAY, *BETAS, CLIP)

    def step(self, codes_BN: Tensor, labels_B: Tensor) -> None:
        import torch

        with torch.autocast(self.arguments.device, torch.bfloat16, enabled=self.arguments.dtype == "bf16"):
            loss = self.loss(codes_BN, labels_B, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


if __name__ == "__main__":
    program(main)
