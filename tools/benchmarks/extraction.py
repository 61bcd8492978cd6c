"""Order extraction against the methods it replaces, against the machine's matrix products, and its memory against plain sampling.

    python tools/benchmarks/extraction.py                                   dim 384, 6 layers, 256 cells, 16,384 codes, batch 8
    python tools/benchmarks/extraction.py --dtype bf16 --threads 1
    python tools/benchmarks/extraction.py --batches 8,64 --skip memory      the share of the floor by batch
    python tools/benchmarks/extraction.py --beside decoupled --only-ours --size b --skip memory      another layout at equal width and depth
    python tools/benchmarks/extraction.py --device cuda --dtype bf16 --size l --batches 64,256

A whole extraction is too long to be repeated with all methods, so some steps of it are: at ``--at`` numbers of placed cells, spread evenly,
every method does that one step, alternating, ``--rounds`` times; a whole image is the sum over all steps, interpolated between these.

    ours                       one pass over all candidates of the batch, one cache
    copied cache               the same rows with every candidate an element of the batch, which gets a copy of its image's cache, as in the
                               appendix of the OAR paper; one layer's copies at a time, and everything else as ours
    forward, last logits       a fresh forward pass for each candidate, which is its last row; the head takes that row alone
    forward, all logits        the same by ``AnyOrderModel.forward``, which gives the logits of all cells placed

The last two time one forward pass a step, of the whole batch, and count it once for each candidate. The floor is the FLOPs of an exact
extraction (``model.flops.extraction_flops``) over the rate of a large matrix product, measured in the same rounds. On a CPU with one thread
times are CPU seconds, which other programs hardly change; otherwise they are what a clock shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from measure import LAYOUTS, Meter, alternate, benchmark_spec, in_fresh_process, machine, median_ratio, table

from oar_scale.errors import UserError
from oar_scale.runtime.program import program

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from oar_scale.model import AnyOrderModel, ModelSpec

OURS, COPIED, LAST, ALL = "ours", "copied cache", "forward, last logits", "forward, all logits"
PRODUCT = "matrix product"
SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices that are multiplied."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="a size of recipes/base; default: dim 384, 6 layers, 6 heads")
    parser.add_argument("--layout", default="instructed", choices=LAYOUTS)
    parser.add_argument("--beside", choices=LAYOUTS, help="also a model in this layout, of the same width and depth")
    parser.add_argument("--batches", default="8", help="images at once, several with commas between")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--at", type=int, default=9, help="steps that are timed, from the first to the last")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-ours", action="store_true", help="leave out the slow methods")
    parser.add_argument("--skip", default="", choices=["", "memory", "steps"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    return parser


def side(argv: Sequence[str]) -> dict[str, Any]:
    """What ``--side`` prints: one side measured in this process."""
    arguments = _parser().parse_args(argv)
    return SIDES[arguments.side](arguments)


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.side:
        print(json.dumps(side(sys.argv[1:])))
        return
    if arguments.layout == "decoupled" and not arguments.only_ours and arguments.skip != "steps":
        raise SystemExit("decoupled questions write no keys and values of which there could be copies: add --only-ours")
    if arguments.beside == arguments.layout:
        raise SystemExit(f"--beside {arguments.beside} is the layout that is measured anyway: name another one")
    if arguments.at < 2:
        raise UserError(f"--at {arguments.at}: an image's seconds are interpolated between the first and the last step. Give 2 or more.")
    if arguments.rounds < 1:  # here, before any of the two parts is measured
        raise UserError(f"--rounds {arguments.rounds}: nothing would be measured. Give 1 or more.")
    print(machine(arguments.device, arguments.threads))
    load = os.getloadavg()[0]
    for batch in arguments.batches.split(","):
        arguments.batch = int(batch)
        print(f"\n{_setting(arguments)}\n")
        if arguments.skip != "steps":
            print(_steps_report(arguments, _child(arguments, "steps")))
        if arguments.skip != "memory":
            print(_memory_report(arguments, alternate(["extraction", "sampling"], arguments.rounds, lambda side: _child(arguments, side))))
    print(f"\nload of the machine: {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")


def _child(arguments: argparse.Namespace, side: str) -> dict[str, Any]:
    return in_fresh_process(__file__, [*sys.argv[1:], "--side", side, "--batch", str(arguments.batch)], arguments.threads)


def _setting(arguments: argparse.Namespace) -> str:
    spec = benchmark_spec(arguments.size, arguments.layout)
    return (
        f"{spec.layout}, dim {spec.dim}, {spec.layers} layers, {spec.heads} heads, {spec.vocab_size:,} codes, {spec.cells} cells, "
        f"batch {arguments.batch}, {arguments.dtype}, {arguments.threads} threads"
    )


def _steps_report(arguments: argparse.Namespace, result: dict[str, Any]) -> str:
    whole = {name: [_whole(steps, result) for steps in rounds] for name, rounds in result["seconds"].items()}
    rate = [statistics.median(seconds) for seconds in result["product"]]
    rows = []
    for name, seconds in whole.items():
        least = [result["flops"][name] * arguments.batch / (result["product_flops"] / product) for product in rate]
        rows.append(
            [
                name,
                f"{arguments.batch / statistics.median(seconds):.4g}",
                f"{median_ratio(seconds, whole[OURS]):.1f}",
                f"{median_ratio(least, seconds):.1%}",
            ]
        )
    clock = "CPU seconds" if result["clock"] == "process_time" else "wall clock"
    giga = result["product_flops"] / statistics.median(rate) / 1e9
    caption = (
        f"Steps {result['at']} of {result['cells']}, {len(rate)} rounds, {clock}; {PRODUCT}: {giga:,.0f} GFLOP/s; "
        f"{' and '.join(f'{flops / 1e9:,.0f}' for flops in dict.fromkeys(result['flops'].values()))} GFLOP an image\n\n"
    )
    return caption + table(["way", "images/s", "times ours", "share of the floor"], rows) + "\n"


def _whole(steps: list[float], result: dict[str, Any]) -> float:
    """Seconds of all steps, from those of some."""
    import numpy as np

    return float(np.interp(np.arange(result["cells"]), result["at"], steps).sum())


def _memory_report(arguments: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for name, runs in results.items():
        peak, beside = ([run[key] for run in runs] for key in ("peak", "beside_weights"))
        other = results["sampling"]
        rows.append(
            [
                name,
                f"{arguments.batch / statistics.median(run['seconds'] for run in runs):.3g}",
                f"{statistics.median(peak):,.0f}",
                f"{median_ratio(peak, [run['peak'] for run in other]):.2f}",
                f"{statistics.median(beside):,.0f}",
                f"{median_ratio(beside, [run['beside_weights'] for run in other]):.2f}",
            ]
        )
    head = ["whole images", "images/s, wall clock", "peak MiB, with weights", "ratio", "without", "ratio"]
    return table(head, rows)


# -- in a process of its own ----------------------------------------------------------------------------------------------


def _model(arguments: argparse.Namespace, spec: ModelSpec) -> tuple[AnyOrderModel, Tensor, Tensor]:
    """A model with random weights, random codes, and the rows of their labels."""
    import torch

    from oar_scale.model import AnyOrderModel

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    with torch.device(arguments.device):
        model = AnyOrderModel(spec).eval()
        torch.nn.init.normal_(model.output.weight, 0.0, 0.02)  # it starts at zero, where every score is the same
        codes_BN = torch.randint(model.spec.vocab_size, (arguments.batch, model.spec.cells))
        model = model.to(dtype)
        with torch.no_grad():
            condition_BTD = model.condition(torch.randint(1000, (arguments.batch, 1)))
    return model, codes_BN, condition_BTD


def whole_images(arguments: argparse.Namespace) -> dict[str, Any]:
    """One batch extracted, or drawn along a given order: seconds, and peak memory in MiB above that of the imports; what the floor takes.

    On a GPU one image is extracted first: a kernel's first call loads it.
    """
    import torch

    from oar_scale.generation.sampling import generate
    from oar_scale.generation.settings import SampleSettings
    from oar_scale.model import AnyOrderModel
    from oar_scale.model.flops import extraction_flops
    from oar_scale.orders.extraction import extract_orders
    from oar_scale.orders.settings import ExtractionSettings

    AnyOrderModel, _ = AnyOrderModel, torch.zeros(1, device=arguments.device)  # imports are nobody's memory
    meter = Meter(arguments.device)
    model, codes_BN, condition_BTD = _model(arguments, benchmark_spec(arguments.size, arguments.layout))
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    if arguments.side == "extraction":
        if meter.cuda:
            extract_orders(model, codes_BN[:1], condition_BTD[:1], ExtractionSettings())
        meter.time(lambda: extract_orders(model, codes_BN, condition_BTD, ExtractionSettings()))
    else:
        order_BN = torch.rand(codes_BN.shape).argsort(1).to(codes_BN.device)
        settings = SampleSettings(guidance=1.0, temperature=1.0, top_k=0, order_temperature=0.0)
        meter.time(lambda: generate(model, condition_BTD, settings, 0, order_BN=order_BN))
    found = {"seconds": meter.seconds[0], "peak": meter.peak(), "beside_weights": meter.peak() - weights, "images": arguments.batch}
    product = _product(arguments.device, condition_BTD.dtype)
    rate = Meter(arguments.device)
    for _ in range(3):
        rate.time(product)
    return {**found, "flops": extraction_flops(model.spec), "product_rate": 2 * SIDE[arguments.device] ** 3 / min(rate.seconds)}


def _product(device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A large matrix product, into memory that is there."""
    import torch

    square = torch.randn(SIDE[device], SIDE[device], device=device).to(dtype)
    out = torch.empty_like(square)
    return lambda: torch.mm(square, square, out=out)


def some_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of some steps of every way, round by round, and of matrix products between them."""
    import torch

    from oar_scale.model.flops import extraction_flops

    spec = benchmark_spec(arguments.size, arguments.layout)
    model, codes_BN, condition_BTD = _model(arguments, spec)
    other = benchmark_spec(arguments.size, arguments.beside) if arguments.beside else spec
    second, beside = (_model(arguments, other) if arguments.beside else None), f"{OURS}, layout {arguments.beside}"
    device = codes_BN.device
    order_BN = torch.rand(codes_BN.shape).argsort(1).to(device)
    at = sorted({round(step * (spec.cells - 1) / (arguments.at - 1)) for step in range(arguments.at)})
    names = [OURS] if arguments.only_ours else [OURS, COPIED, LAST, ALL]
    names += [beside] if second else []
    on_cpu = arguments.device == "cpu" and arguments.threads == 1
    clock = time.process_time if on_cpu else time.perf_counter

    def timed(work: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    multiply = _product(arguments.device, condition_BTD.dtype)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    product: list[list[float]] = []
    with torch.no_grad():
        for number in range(arguments.rounds + 1):  # the first one warms up
            by_name: dict[str, list[float]] = {name: [] for name in names}
            product.append([])
            for placed in at:
                product[-1].append(min(timed(multiply) for _ in range(2)))
                step = _Step(model, codes_BN, condition_BTD, order_BN, placed)
                if second:
                    step.methods[beside], step.times[beside] = _Step(*second, order_BN, placed).methods[OURS], 1
                for name in names if number % 2 == 0 else reversed(names):
                    by_name[name].append(timed(step.methods[name]) * step.times[name])
            for name in names:
                seconds[name].append(by_name[name])
            print(f"round {number} of {arguments.rounds}", file=sys.stderr, flush=True)
    return {
        "seconds": {name: rounds[1:] for name, rounds in seconds.items()},
        "product": product[1:],
        "product_flops": 2 * SIDE[arguments.device] ** 3,
        "flops": {name: extraction_flops(other if name == beside else spec) for name in names},
        "at": at,
        "cells": spec.cells,
        "clock": "process_time" if on_cpu else "perf_counter",
    }


class _Step:
    """The step after ``placed`` cells, done in each way; ``times``: how often a way would do what is timed."""

    def __init__(self, model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, order_BN: Tensor, placed: int) -> None:
        self.model, self.condition_BTD, self.codes_BN, self.order_BN, self.placed = model, condition_BTD, codes_BN, order_BN, placed
        from oar_scale.model import Decoder

        self.decoder = Decoder(model)
        self.empty_BR = order_BN[:, placed:].sort(1).values
        self.codes_BR = codes_BN.gather(1, self.empty_BR)
        self.ours, self.copied = self._prefix(), self._prefix()
        self.methods = {OURS: self._ours, COPIED: self._copied, LAST: self._last_logits, ALL: self._all_logits}
        candidates = order_BN.shape[1] - placed
        self.times = {OURS: 1, COPIED: 1, LAST: candidates, ALL: candidates}

    def _prefix(self) -> Any:
        cells_BK = self.order_BN[:, : self.placed]
        return self.decoder.prefill(self.decoder.begin(self.condition_BTD), cells_BK, self.codes_BN.gather(1, cells_BK))

    def _ours(self) -> Tensor:
        candidates = self.decoder.candidate_rows(self.ours, self.empty_BR)
        winner_B = self._scores(candidates.rows_BRD).argmax(1)
        self.decoder.commit(self.ours, candidates, winner_B, self.codes_BR.gather(1, winner_B[:, None])[:, 0])
        return winner_B

    def _copied(self) -> Tensor:
        import torch
        import torch.nn.functional as F

        from oar_scale.model.blocks import KVSlice
        from oar_scale.model.row_layout import Placed, Rows

        model, prefix, (batch, count) = self.model, self.copied, self.empty_BR.shape
        layout = model.layout
        waiting, candidates = layout.candidates(prefix.last, self.empty_BR, prefix.tables)
        if waiting is not None:
            self.decoder._append(prefix, Rows(*waiting))
        x = candidates.x_BLD.reshape(batch * count, 1, -1)
        rotation = layout.rotated(candidates.cells_BL.reshape(batch * count, 1))
        rows, winners = prefix.rows, []
        for index, layer in enumerate(model.layers):
            shape = (batch * count, prefix.cache.shape[3], rows + 1, prefix.cache.shape[5])
            keys, values = (x.new_empty(shape) for _ in range(2))
            for copy, own in zip((keys, values), prefix.cache[index, :, :, :, :rows], strict=True):
                copy.unflatten(0, (batch, count))[:, :, :, :rows] = own[:, None]
            q, _ = layer.project_into(KVSlice(keys[:, :, rows:], values[:, :, rows:]), x, rotation)
            x = layer.finish(x, F.scaled_dot_product_attention(q, keys, values, enable_gqa=q.shape[1] != keys.shape[1]))
            winners.append((keys[:, :, rows], values[:, :, rows]))
        winner_B = self._scores(model.norm(x).view(batch, count, -1)).argmax(1)
        if layout.keeps_questions:
            at_B = torch.arange(batch, device=winner_B.device) * count + winner_B
            for index, (key, value) in enumerate(winners):
                prefix.cache[index, 0, :, :, rows], prefix.cache[index, 1, :, :, rows] = key[at_B], value[at_B]
            prefix.rows += 1
        code_B1 = self.codes_BR.gather(1, winner_B[:, None])
        prefix.last = Placed(self.empty_BR.gather(1, winner_B[:, None]), model.code_rows(code_B1).to(prefix.cache.dtype))
        return winner_B

    def _last_logits(self) -> None:
        rows_BLD = self.model.rows(self.codes_BN, self.order_BN[:, : self.placed + 1], self.condition_BTD)
        self._scores(rows_BLD[:, -1:])

    def _all_logits(self) -> None:
        logits_BLV = self.model(self.codes_BN, self.order_BN[:, : self.placed + 1], self.condition_BTD)
        logits_BLV[:, -1].float().log_softmax(-1)

    def _scores(self, rows_BRD: Tensor) -> Tensor:
        from oar_scale.orders.scores import score_rows

        targets_BR = self.codes_BR[:, : rows_BRD.shape[1]]
        return score_rows(self.model.output.weight, rows_BRD.flatten(0, 1), "gt_logprob", targets_BR.flatten()).view_as(targets_BR)


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "steps": some_steps,
    "extraction": whole_images,
    "sampling": whole_images,
}

if __name__ == "__main__":
    program(main)
