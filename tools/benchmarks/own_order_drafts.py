"""What drafts of the model's own order would save: passes and questions of an image, of a scheme that is not built.

    python tools/benchmarks/own_order_drafts.py             the shipped emoji model

Drawn one by one, a pass asks about all R empty cells, places the most confident one and draws its code. The scheme:

    drafts     the k most confident of the other cells, with the codes that their noise gives, as far as anybody knows
    a pass     asks about all empty cells behind 0, 1, .. k of the drafts
    behind j   the next draft is the next cell if it is within ``bound`` nats of the most confident cell there, else that one is;
               its code is drawn. The pass settles it, and goes on if it is the draft with the draft's code

Each code is drawn from the model's distribution given what is placed, for any bound: which cell comes next depends on placed cells, their
codes and their noise alone. The order is the one of one by one for bound 0, and else one whose confidence falls short by at most
``bound`` at each cell. What such passes would settle is found out one by one: behind what is placed there is the same prefix either way.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from generation import CAPTIONS, EMOJI
from measure import machine, table
from torch import Tensor

import oar_scale
from oar_scale.generation.drawing import draw_codes, guided_rows
from oar_scale.generation.pretrained import Pretrained
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import Decoder
from oar_scale.orders.selection import CounterRNG
from oar_scale.runtime.program import program

NO_BOUND = float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMOJI), type=Path)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--drafts", default="1,2,4,8")
    parser.add_argument("--bounds", default="0,0.1,0.3,inf")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = oar_scale.load(str(arguments.model))
    settings = SampleSettings(guidance=arguments.guidance, temperature=1.0, top_k=0, order_temperature=0.0)
    print(machine("cpu", 1), f"{len(CAPTIONS)} captions, guidance {arguments.guidance:g}", sep="\n", end="\n\n")
    rows = []
    for width in map(int, arguments.drafts.split(",")):
        for bound in map(float, arguments.bounds.split(",")):
            rows.append([str(width), "none" if bound == NO_BOUND else f"{bound:g}", *simulated(model, settings, width, bound)])
            print(*rows[-1], file=sys.stderr, flush=True)
    print(table(["draft", "bound, nats", "passes an image", "of one by one", "questions, of one by one", "regret a cell, nats"], rows))


class Drafts:
    """What is drafted for an image, and what it has cost so far."""

    def __init__(self, width: int, bound: float) -> None:
        self.width, self.bound = width, bound
        self.ahead: list[tuple[int, int]] = []
        self.passes, self.questions, self.regret = 0, 0, 0.0
        self.intact = False

    def next(self, cells_R: Tensor, confidence_R: Tensor, codes_R: Tensor) -> int:
        """The place of the next cell among the empty ones, whose confidence and codes are those given what is placed."""
        if not self.intact:
            self.passes += 1
            self.questions += sum(len(cells_R) - behind for behind in range(len(self.ahead) + 1))
        best = chosen = int(confidence_R.argmax())
        self.intact = False
        if self.ahead:
            cell, code = self.ahead.pop(0)
            draft = int((cells_R == cell).nonzero())
            if confidence_R[draft] >= confidence_R[best] - self.bound:
                chosen, self.intact = draft, int(codes_R[draft]) == code
        self.regret += float(confidence_R[best] - confidence_R[chosen])
        if not self.intact:  # the pass ends here, and its last answers say what is drafted next
            others = [place for place in confidence_R.argsort(descending=True).tolist() if place != chosen]
            self.ahead = [(int(cells_R[place]), int(codes_R[place])) for place in others[: self.width]]
        return chosen


@torch.no_grad()
def simulated(pretrained: Pretrained, settings: SampleSettings, width: int, bound: float) -> list[str]:
    """A row of the table."""
    model, condition_BTD = pretrained.model, pretrained._condition(CAPTIONS)
    batch, cells, branches = len(condition_BTD), model.spec.cells, 2 if settings.guided else 1
    rng = CounterRNG.of(0, np.arange(batch), 0, cells, condition_BTD.device)
    if settings.guided:
        condition_BTD = torch.stack([condition_BTD, model.null_condition(batch)], dim=1).flatten(0, 1)
    decoder = Decoder(model)
    prefix, images = decoder.begin(condition_BTD), [Drafts(width, bound) for _ in range(batch)]
    empty_BN = torch.ones(batch, cells, dtype=torch.bool)
    for count in range(cells):
        cells_BR = empty_BN.nonzero()[:, 1].view(batch, cells - count)
        candidates = decoder.candidate_rows(prefix, cells_BR.repeat_interleave(branches, 0))
        rows_BRD = guided_rows(candidates.rows_BRD, settings.scale(count, cells)) if settings.guided else candidates.rows_BRD
        logits_BRV = model.output(rows_BRD).float()
        confidence_BR, codes_BR = logits_BRV.log_softmax(-1).amax(-1), draw_codes(logits_BRV, cells_BR, settings, rng)
        chosen_B = torch.tensor([image.next(*each) for image, *each in zip(images, cells_BR, confidence_BR, codes_BR, strict=True)])
        codes_B = codes_BR.gather(1, chosen_B[:, None])[:, 0]
        prefix = decoder.commit(prefix, candidates, chosen_B.repeat_interleave(branches), codes_B.repeat_interleave(branches))
        empty_BN.scatter_(1, cells_BR.gather(1, chosen_B[:, None]), False)
    passes, questions, regret = np.array([[each.passes, each.questions, each.regret] for each in images]).mean(0)
    return [f"{passes:.1f}", f"{passes / cells:.2f}", f"{questions / (cells * (cells + 1) / 2):.2f}", f"{regret / cells:.3f}"]


if __name__ == "__main__":
    program(main)
