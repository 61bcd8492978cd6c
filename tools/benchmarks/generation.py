"""How fast images are drawn: beside RandAR's own ``generate`` with the same weights, and with drafts beside one cell a pass.

    python tools/benchmarks/generation.py --randar CHECKOUT         dim 384, 6 layers, 256 cells, 16,384 codes, batch 4, guidance
    python tools/benchmarks/generation.py --device cuda --dtype bf16 --size l --batch 64 --steps 88
    python tools/benchmarks/generation.py --drafts                  a trained model (--model), one cell a pass and drafted

CHECKOUT is a copy of https://github.com/ziqipang/RandAR, anywhere; without ``--randar`` ours is measured alone. Every side runs in fresh
processes, in alternation, on the same random weights, labels and orders: one batch to warm up, then one that is timed. Sampling is
that of the defaults, temperature 1 over all codes. Each side also draws a few cells greedily, which must agree.
Where a pass places one cell, ours is measured with drafts, too, which give the same images; with random weights nearly all drafts are
right, since noise decides.

With ``--drafts`` passes are counted, and images are compared: those of the same seed must be the same. Times alternate in one process.
With one thread times are CPU seconds, which other programs hardly change; otherwise they are what a clock shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import CLASSES, Meter, alternate, in_fresh_process, machine, median_ratio, table
from model import CHECKED, model_spec

from oar_scale.runtime.program import program

if TYPE_CHECKING:
    from torch import Tensor

GUIDANCE, DRAFT = 4.0, 8
RANDAR, OURS, DRAFTED = "RandAR", "ours", f"ours, draft: {DRAFT}"
GREEDY_STEPS = 12
"""In which the sides are compared: 256 cells. With random weights, two codes may be as likely as one another within rounding."""
EMOJI = Path(__file__).resolve().parents[2] / "recipes" / "weights" / "emoji"
CAPTIONS = (
    "a red apple", "a smiling cat", "grinning face", "evergreen tree", "house with garden", "flag", "woman dancing", "police car",
    "thumbs up", "soccer ball", "birthday cake", "rocket", "clock", "red heart", "umbrella with rain drops", "books",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--randar", help="a checkout of RandAR")
    parser.add_argument("--drafts", action="store_true")
    parser.add_argument("--size", help="a size of recipes/base; default: dim 384, 6 layers, 6 heads")
    parser.add_argument("--model", default=str(EMOJI), help="whose images are drafted; default: the shipped emoji model")
    parser.add_argument("--steps", default="88,256", help="passes for an image, several with commas between")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def side(argv: Sequence[str]) -> dict[str, Any]:
    """What ``--side`` prints: one side measured in this process."""
    return measured(_parser().parse_args(argv))


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.drafts:
        drafts(arguments)
    elif arguments.side:
        print(json.dumps(measured(arguments)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Measure both sides and print the table."""
    sides = [RANDAR, OURS, DRAFTED] if arguments.randar else [OURS]
    with tempfile.TemporaryDirectory() as folder:
        common = [*sys.argv[1:], "--folder", folder]

        def run(side: str) -> dict[str, Any]:
            return in_fresh_process(__file__, [*common, "--side", side], arguments.threads)

        setting = run("prepare")["setting"]
        results = alternate(sides, arguments.rounds, run)
    rows = []
    for steps in arguments.steps.split(","):
        for side in (side for side in sides if steps in results[side][0]):
            wall, cpu = ([run[steps][clock] for run in results[side]] for clock in ("seconds", "cpu_seconds"))
            first = [run[steps]["seconds"] for run in results[sides[0]]]
            first_cpu = [run[steps]["cpu_seconds"] for run in results[sides[0]]]
            rows.append(
                [
                    steps,
                    side,
                    f"{arguments.batch / statistics.median(wall):.3f}",
                    f"{median_ratio(first, wall):.2f}",
                    f"{statistics.median(cpu):.1f}",
                    f"{median_ratio(first_cpu, cpu):.2f}",
                ]
            )
    print(machine(arguments.device, arguments.threads), setting, sep="\n", end="\n\n")
    print(table(["steps", "side", "images/s", "ratio", "CPU s a batch", "ratio"], rows))
    if arguments.randar:
        mine, theirs = (results[side][0]["greedy"] for side in (OURS, RANDAR))
        same = statistics.mean(a == b for a, b in zip(mine, theirs, strict=True))
        print(f"\ngreedy codes in {GREEDY_STEPS} steps: {same:.1%} equal")


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """One side in this process: seconds of a batch at each number of steps, and some greedy codes."""
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.side == "prepare":
        return prepare(arguments)
    inputs = torch.load(arguments.folder / "inputs.pt")
    labels_B, order_BN = (inputs[name].to(arguments.device) for name in ("labels", "order"))
    side = Theirs(arguments) if arguments.side == RANDAR else Ours(arguments)
    with torch.no_grad():
        result: dict[str, Any] = {
            "images": arguments.batch,
            "greedy": side.draw(labels_B[:CHECKED], order_BN[:CHECKED], GREEDY_STEPS, top_k=1).flatten().tolist(),
        }
        for steps in arguments.steps.split(","):
            if arguments.side == DRAFTED and int(steps) < order_BN.shape[1]:
                continue  # several cells a pass are placed without drafts
            meter = Meter(arguments.device)
            side.draw(labels_B, order_BN, min(int(steps), 32))
            meter.time(lambda steps=steps: side.draw(labels_B, order_BN, int(steps)))  # type: ignore[misc]
            result[steps] = {"seconds": meter.seconds[0], "cpu_seconds": meter.cpu_seconds[0]}
    return result


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write weights (under RandAR's names), labels and orders; returns the setting for the table's caption."""
    import torch

    from oar_scale.model import AnyOrderModel
    from oar_scale.model.peer_weights import export_peer

    torch.manual_seed(0)
    spec = model_spec(arguments)
    model = AnyOrderModel(spec)
    torch.nn.init.normal_(model.output.weight, 0.0, 0.02)  # it starts at zero, where all codes are the same
    inputs = {"order": torch.rand(arguments.batch, spec.cells).argsort(1), "labels": torch.randint(CLASSES, (arguments.batch,))}
    torch.save(inputs, arguments.folder / "inputs.pt")
    torch.save(export_peer(model, "randar"), arguments.folder / "weights.pt")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    setting = (
        f"dim {spec.dim}, {spec.layers} layers, {spec.heads} heads, {spec.vocab_size:,} codes, {spec.cells} cells, "
        f"batch {arguments.batch}, guidance {GUIDANCE:g}, {arguments.dtype}; {parameters:.1f} M parameters"
    )
    return {"setting": setting}


class Ours:
    """``generate`` along a given order."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        from oar_scale.model.peer_weights import import_peer

        weights, dtype = torch.load(arguments.folder / "weights.pt"), torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
        model = import_peer(weights, "randar", "the benchmark's weights", heads=model_spec(arguments).heads)
        self.model = model.eval().to(arguments.device, dtype)
        self.draft = DRAFT if arguments.side == DRAFTED else 0

    def draw(self, labels_B: Tensor, order_BN: Tensor, steps: int, top_k: int = 0) -> Tensor:
        from oar_scale.generation.sampling import generate
        from oar_scale.generation.settings import SampleSettings

        one_by_one = steps == order_BN.shape[1]
        passes = {"steps": None, "draft": self.draft} if one_by_one else {"steps": steps, "draft": 0}
        settings = SampleSettings(guidance=GUIDANCE, temperature=1.0, top_k=top_k, order_temperature=0.0, **passes)
        return generate(self.model, self.model.condition(labels_B), settings, 0, order_BN).codes_BN


class Theirs:
    """``RandARTransformer.generate``, as RandAR's own script calls it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        sys.path.insert(0, arguments.randar)
        from RandAR.model.randar_gpt import RandARTransformer

        spec, dtype = model_spec(arguments), torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
        sizes = {"dim": spec.dim, "n_layer": spec.layers, "n_head": spec.heads, "vocab_size": spec.vocab_size, "block_size": spec.cells}
        model = RandARTransformer(num_classes=CLASSES, **sizes)
        model.load_state_dict(torch.load(arguments.folder / "weights.pt"))
        self.model = model.eval().to(arguments.device, dtype)

    def draw(self, labels_B: Tensor, order_BN: Tensor, steps: int, top_k: int = 0) -> Tensor:
        codes_BN: Tensor = self.model.generate(labels_B, order_BN, cfg_scales=(GUIDANCE, GUIDANCE), num_inference_steps=steps, top_k=top_k)
        self.model.remove_caches()
        return codes_BN


def drafts(arguments: argparse.Namespace) -> None:
    """Passes and seconds of a trained model, one cell a pass and drafted."""
    import torch

    import oar_scale

    torch.set_num_threads(arguments.threads)
    model = oar_scale.load(arguments.model).to(arguments.device)
    spec = model.model.spec
    setting = f"layout {spec.layout}, {len(CAPTIONS)} captions, {spec.cells} cells, {spec.vocab_size:,} codes"
    print(machine(arguments.device, arguments.threads), setting, sep="\n", end="\n\n")
    rows = []
    for order in ("random", "halton", "raster"):
        for guidance in (1.0, 2.0):
            ways = {draft: Meter(arguments.device) for draft in (0, 4, 8, 16)}
            drawn = {}
            for _ in range(arguments.rounds):
                for draft, meter in ways.items():

                    def draw(draft: int = draft, order: str = order, guidance: float = guidance) -> None:
                        drawn[draft] = model.draw(CAPTIONS, order=order, guidance=guidance, draft=draft)  # noqa: B023

                    meter.time(draw)
            for draft, meter in ways.items():
                passes = float(drawn[draft].passes_B.double().mean())
                same = int((drawn[draft].codes_BN == drawn[0].codes_BN).all(1).sum())
                ratio = median_ratio(*(each.cpu_seconds if arguments.threads == 1 else each.seconds for each in (ways[0], meter)))
                rows.append(
                    [
                        order,
                        f"{guidance:g}",
                        draft or "-",
                        f"{passes:.1f}",
                        f"{passes / spec.cells:.2f}",
                        f"{same} of {len(CAPTIONS)}",
                        f"{ratio:.2f}",
                    ]
                )
    head = ["order", "guidance", "draft", "passes an image", "of one cell a pass", "same images", "times as fast"]
    print(table(head, rows))


if __name__ == "__main__":
    program(main)
