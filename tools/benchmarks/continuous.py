"""Images a second of continuous batching, beside ``generate`` on a whole batch and on one image at a time.

    python tools/benchmarks/continuous.py --threads 1

    at once       as many drawings as slots are added together       beside one batch of as many
    staggered     one every so many steps, so that all slots are     beside one image after the other
                  taken by drawings of different lengths

Everything runs in one process, in alternation, and images are compared: those of the same seed must be the same. With one thread times are
CPU seconds, which other programs hardly change; otherwise they are what a clock shows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from generation import CAPTIONS, EMOJI
from measure import Meter, machine, median_ratio, table

from oar_scale.runtime.program import program

if TYPE_CHECKING:
    from torch import Tensor

    from oar_scale.generation.continuous import ContinuousBatch, Drawing
    from oar_scale.generation.pretrained import Pretrained

KINDS: dict[str, list[dict[str, Any]]] = {
    "confidence": [{}],
    "halton": [{"order": "halton"}],
    "halton, without guidance": [{"order": "halton", "guidance": 1.0}],
    "confidence, 16 steps": [{"steps": 16}],
    "mixed": [{}, {"order": "halton"}, {"guidance": 1.0, "top_p": 0.9}, {"order": "random", "guidance": 3.0, "temperature": 0.9}],
}
"""Choices of the drawings, in turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMOJI))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    arguments = parser.parse_args()
    import torch

    import oar_scale
    from oar_scale.generation.continuous import ContinuousBatch

    torch.set_num_threads(arguments.threads)
    model = oar_scale.load(arguments.model).to(arguments.device)
    batch = ContinuousBatch(model.model, arguments.slots)
    slots = f"{arguments.slots} slots of {batch.memory_bytes / arguments.slots / 2**20:.1f} MiB"
    print(machine(arguments.device, arguments.threads), slots, sep="\n", end="\n\n")
    rows = [row for kind in arguments.kinds for row in measured(model, batch, kind, arguments)]
    print(table(["drawings", "arrivals", "generate, images/s", "continuous, images/s", "ratio", "same images"], rows))


def measured(model: Pretrained, batch: ContinuousBatch, kind: str, arguments: argparse.Namespace) -> list[list[str]]:
    """The table's rows of one kind of drawings."""
    some, many = drawings(model, kind, arguments.slots), drawings(model, kind, 3 * arguments.slots)
    between = max(1, model.model.spec.cells // arguments.slots)
    ways: dict[str, tuple[Sequence[Drawing], Callable[[], Tensor], Callable[[], Tensor]]] = {
        "at once": (some, lambda: whole(model, some), lambda: continuous(batch, some, 0)),
        "staggered": (many, lambda: alone(model, many), lambda: continuous(batch, many, between)),
    }
    if len(KINDS[kind]) > 1:  # no batch of ``generate`` has several kinds
        del ways["at once"]
    lines = []
    for arrivals, (drawn, theirs, ours) in ways.items():
        meters, images = (Meter(arguments.device), Meter(arguments.device)), {way: way() for way in (theirs, ours)}
        for _ in range(arguments.rounds):
            for meter, way in zip(meters, (theirs, ours), strict=True):
                meter.time(way)
        seconds = [meter.cpu_seconds if arguments.threads == 1 else meter.seconds for meter in meters]
        speeds = [f"{len(drawn) / statistics.median(each):.2f}" for each in seconds]
        same = int((images[theirs] == images[ours]).all(1).sum())
        lines.append([kind, arrivals, *speeds, f"{median_ratio(*seconds):.2f}", f"{same} of {len(drawn)}"])
    return lines


def drawings(model: Pretrained, kind: str, images: int) -> list[Drawing]:
    """Drawings of captions, with the model's own settings but for those of the kind."""
    from dataclasses import replace

    import torch

    from oar_scale.generation.continuous import Drawing
    from oar_scale.generation.settings import SampleSettings
    from oar_scale.orders.policies import OrderRequest, sampling_order
    from oar_scale.tokenizers.prompts import conditioning_inputs

    assert model.text is not None
    captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(images)]
    device = next(model.model.parameters()).device
    with torch.no_grad():
        inputs = conditioning_inputs(model.text, model.text.encode(captions).to(device), model.model.dtype)
        condition_BTD = model.model.condition(inputs)
    made = []
    for number, condition_TD in enumerate(condition_BTD):
        choices = dict(KINDS[kind][number % len(KINDS[kind])])
        name = choices.pop("order", None)
        settings = replace(SampleSettings.from_recipe(model.defaults), **choices)
        request = OrderRequest(model.model, torch.tensor([number]), 0, model.bundle.orders, model.bundle.model, settings.steps)
        order = sampling_order(name, request)
        own = order[0] if isinstance(order, torch.Tensor) else order
        made.append(Drawing(condition_TD=condition_TD, settings=settings, seed=0, number=number, order=own))
    return made


def whole(model: Pretrained, some: Sequence[Drawing]) -> Tensor:
    """Codes [B, N] of ``generate`` for drawings of one kind, in one batch."""
    import numpy as np
    import torch

    from oar_scale.generation.sampling import generate

    orders = [drawing.order for drawing in some if isinstance(drawing.order, torch.Tensor)]
    numbers = np.array([drawing.number for drawing in some])
    condition_BTD = torch.stack([drawing.condition_TD for drawing in some])
    return generate(model.model, condition_BTD, some[0].settings, 0, torch.stack(orders) if orders else None, images_B=numbers).codes_BN


def alone(model: Pretrained, many: Sequence[Drawing]) -> Tensor:
    """As :func:`whole`, one image after the other."""
    import torch

    return torch.cat([whole(model, [drawing]) for drawing in many])


def continuous(batch: ContinuousBatch, many: Sequence[Drawing], between: int) -> Tensor:
    """As :func:`whole`, with so many steps between two arrivals."""
    import torch

    codes, waiting, places, step = {}, list(enumerate(many)), {}, 0
    while waiting or batch.busy:
        while waiting and batch.free and step >= between * (len(many) - len(waiting)):
            place, drawing = waiting.pop(0)
            places[batch.add(drawing)] = place
        for progress in batch.step():
            if progress.done is not None:
                codes[places[progress.id]] = progress.done.codes_BN
        step += 1
    return torch.cat([codes[place] for place in range(len(many))])


if __name__ == "__main__":
    program(main)
