"""What do edits know that they should not? Leaky and honest ones of the same held-out drawings, beside each other.

    python tools/benchmarks/editing.py --threads 1     the shipped emoji model, 64 drawings

*Leaky*: the intact drawing is encoded, and the codes of all cells outside the hole are known. *Honest*: the hole is filled first, and known
are the codes that no fill changes (``oar_scale.generation.seen_codes``). Codes *see the hole* that change when the content of the hole is
that of another drawing and nothing else changes.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from measure import machine, table
from torch import Tensor

import oar_scale
from oar_scale.config.schema import DataConfig, OpenMojiSource
from oar_scale.data.hashing import name_hash
from oar_scale.data.sources.openmoji import OpenMojiImages
from oar_scale.evaluation.likelihood import random_orders
from oar_scale.generation.editing import box_mask, centre_mask, redraw
from oar_scale.generation.pretrained import Pretrained
from oar_scale.generation.seen_codes import FILLS, pixels_of, seen_codes
from oar_scale.generation.settings import SampleSettings
from oar_scale.results.estimates import estimate
from oar_scale.tokenizers.prompts import conditioning_inputs
from oar_scale.tokenizers.vq import pixels_to_unit

EMOJI = Path(__file__).resolve().parents[2] / "recipes" / "weights" / "emoji"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    drawer = oar_scale.load(str(EMOJI))
    assert drawer.vq is not None
    images_B3HW, captions = heldout(arguments.images, drawer.vq.spec.image_size)
    grid = drawer.vq.spec.grid
    middle_N = centre_mask(grid, grid // 2)
    holes = {"the middle": middle_N, "all but the middle": ~middle_N, "the right half": box_mask(grid, 0, grid // 2, grid, grid // 2)}
    print(machine("cpu", arguments.threads), end="\n\n")
    print_knowledge(drawer, images_B3HW, holes)
    print_edits(drawer, images_B3HW, captions, holes)


def heldout(count: int, size: int) -> tuple[Tensor, list[str]]:
    """Drawings that the shipped weights have not seen, in [-1, 1], and their captions."""
    share = DataConfig().heldout_fraction
    drawings = [drawing for drawing in OpenMojiImages(OpenMojiSource()).images() if name_hash(drawing.name, "heldout") < share]
    contents = [drawing.read(size) for drawing in drawings[:: max(1, len(drawings) // count)][:count]]
    pixels_BHW3 = torch.from_numpy(np.stack([np.asarray(content.image) for content in contents]))
    return pixels_to_unit(pixels_BHW3), [content.caption for content in contents]


def print_knowledge(drawer: Pretrained, images_B3HW: Tensor, holes: dict[str, Tensor]) -> None:
    """How many codes outside the hole see it, and how many are known by which fills."""
    vq, rows = drawer.vq, []
    assert vq is not None
    codes_BN = vq.encode(images_B3HW)
    for name, hole_N in holes.items():
        hole_SS = pixels_of(hole_N, vq.spec.image_size)
        others_BN = vq.encode(torch.where(hole_SS, images_B3HW.roll(1, 0), images_B3HW))
        see = float((others_BN != codes_BN)[:, ~hole_N].float().mean())
        by_fill = {fill: torch.stack([seen_codes(vq, image, hole_SS, [fill]).codes_N for image in images_B3HW]) for fill in FILLS}
        for chosen in (fills for count in range(1, len(FILLS) + 1) for fills in combinations(FILLS, count)):
            first_BN = by_fill[chosen[0]]
            known_BN = torch.stack([by_fill[fill] == first_BN for fill in chosen]).all(0) & ~hole_N
            share, right = known_BN[:, ~hole_N].float().mean(), (first_BN == codes_BN)[known_BN].float().mean()
            rows.append([name, int((~hole_N).sum()), f"{see:.0%}", " + ".join(chosen), f"{share:.0%}", f"{right:.0%}"])
    head = ["hole", "cells outside", "whose codes see it", "fills", "known", "of these as in the intact drawing"]
    print(table(head, rows), end="\n\n")


def print_edits(drawer: Pretrained, images_B3HW: Tensor, captions: list[str], holes: dict[str, Tensor]) -> None:
    """Likelihood of what was in the hole, and how far drawings of it are from that: leaky, and honest with one fill or all."""
    vq, rows = drawer.vq, []
    assert vq is not None and drawer.text is not None
    codes_BN = vq.encode(images_B3HW)
    with torch.no_grad():
        condition_BTD = drawer.model.condition(conditioning_inputs(drawer.text, drawer.text.encode(captions)))
    settings, chosen = SampleSettings.from_recipe(drawer.defaults), [*((fill,) for fill in FILLS), tuple(FILLS)]
    order_BN = random_orders(len(codes_BN), codes_BN.shape[1], seed=0)
    for name, hole_N in holes.items():
        hole_SS = pixels_of(hole_N, vq.spec.image_size)
        given = [(codes_BN, (~hole_N).expand_as(codes_BN))]
        for fills in chosen:
            seen = [seen_codes(vq, image, hole_SS, fills) for image in images_B3HW]
            known_BN = torch.stack([each.known_N for each in seen])
            given.append((torch.where(known_BN, torch.stack([each.codes_N for each in seen]), codes_BN), known_BN))
        nll, error = [], []
        for given_BN, known_BN in given:
            drawn_BN = redraw(drawer.model, given_BN, ~known_BN, condition_BTD, settings, 0, order_BN).codes_BN
            with torch.no_grad():
                pixels_B3HW = vq.decode(drawn_BN).clamp(-1, 1)
            error.append((pixels_B3HW - images_B3HW)[:, :, hole_SS].square().mean((1, 2)) / 4)
            nll.append(hidden_nll(drawer, given_BN, known_BN, hole_N, condition_BTD))
        for what, values in (("NLL, nats a hidden code", nll), ("squared error, hidden pixels", error)):
            rows.append([name, what, *(shown(each_B) for each_B in values), shown(values[-1] - values[0])])
    head = ["hole", "", "leaky", *(f"honest, {' + '.join(fills)}" for fills in chosen), "all fills - leaky"]
    print(table(head, rows))


@torch.no_grad()
def hidden_nll(drawer: Pretrained, codes_BN: Tensor, known_BN: Tensor, hole_N: Tensor, condition_BTD: Tensor) -> Tensor:
    """Mean NLL [B] of the codes in the hole, in raster order after the known ones; what is neither comes last."""
    rank_BN = torch.where(known_BN, 0, torch.where(hole_N, 1, 2))
    order_BN = rank_BN.argsort(dim=1, stable=True)
    logits_BNV = drawer.model(codes_BN, order_BN, condition_BTD)
    nll_BN = -logits_BNV.log_softmax(-1).gather(2, codes_BN.gather(1, order_BN)[:, :, None])[:, :, 0]
    hidden_BN = hole_N[order_BN]
    return (nll_BN * hidden_BN).sum(1) / hidden_BN.sum(1)


def shown(values_B: Tensor) -> str:
    figure = estimate(values_B.double().numpy())
    return f"{figure.mean:.3f} ± {figure.standard_error:.3f}"


if __name__ == "__main__":
    main()
