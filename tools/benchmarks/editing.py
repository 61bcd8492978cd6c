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
from typing import NamedTuple

import numpy as np
import torch
from measure import machine, table
from torch import Tensor

import oar_scale
from oar_scale.config.loading import load_recipe
from oar_scale.data.prepare import images_of_split
from oar_scale.evaluation.likelihood import hidden_nll, random_orders
from oar_scale.generation.editing import box_mask, centre_mask, redraw
from oar_scale.generation.pretrained import Pretrained
from oar_scale.generation.seen_codes import FILLS, Fill, pixels_of, seen_codes
from oar_scale.generation.settings import SampleSettings
from oar_scale.results.estimates import estimate
from oar_scale.runtime.program import program
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.prompts import conditioning_inputs
from oar_scale.tokenizers.vq import pixels_to_unit

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    drawer = oar_scale.load(str(RECIPES / "weights" / "emoji"))
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
    recipe = load_recipe(str(RECIPES / "quickstart.yaml"), [f"data.source.path={RECIPES / 'data' / 'emoji.parquet'}"])
    drawings = images_of_split(recipe.data, "heldout")
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


class Way(NamedTuple):
    """By which rules cells count as known; ``leaky``: all outside the hole are, with the codes of the intact drawing."""

    name: str
    fills: tuple[Fill, ...] = ()
    ring: int = 0


LEAKY = Way("leaky")
ALL_FILLS = tuple(fills for count in range(1, len(FILLS) + 1) for fills in combinations(FILLS, count))
WAYS = [LEAKY, *(Way(" + ".join(fills), fills) for fills in ALL_FILLS), *(Way(f"{fill}, ring 1", (fill,), 1) for fill in ("mean", "blur"))]


def print_edits(drawer: Pretrained, images_B3HW: Tensor, captions: list[str], holes: dict[str, Tensor]) -> None:
    """Likelihood of what was in the hole, and how far drawings of it are from that, for each way to know cells."""
    vq, rows = drawer.vq, []
    assert vq is not None and drawer.text is not None
    codes_BN = vq.encode(images_B3HW)
    with torch.no_grad():
        condition_BTD = drawer.model.condition(conditioning_inputs(drawer.text, drawer.text.encode(captions)))
    settings, order_BN = SampleSettings.from_recipe(drawer.defaults), random_orders(len(codes_BN), codes_BN.shape[1], seed=0)
    for name, hole_N in holes.items():
        measured: list[list[Tensor]] = []
        for way in WAYS:
            given_BN, known_BN = given_codes(vq, images_B3HW, codes_BN, hole_N, way)
            drawn_BN = redraw(drawer.model, given_BN, ~known_BN, condition_BTD, settings, 0, order_BN).codes_BN
            with torch.no_grad():
                pixels_B3HW = vq.decode(drawn_BN).clamp(-1, 1)
            error_B = (pixels_B3HW - images_B3HW)[:, :, pixels_of(hole_N, vq.spec.image_size)].square().mean((1, 2)) / 4
            measured.append([hidden_nll(drawer.model, given_BN, known_BN, hole_N, condition_BTD), error_B])
            texts = [[shown(each_B), shown(each_B - leaky_B)] for each_B, leaky_B in zip(measured[-1], measured[0], strict=True)]
            rows.append([name, way.name, f"{known_BN[:, ~hole_N].float().mean():.0%}", *texts[0], *texts[1]])
            print(" | ".join(rows[-1]), flush=True)
    head = ["hole", "known by", "cells known outside", "NLL of hidden codes, nats", "- leaky", "squared error of hidden pixels", "- leaky"]
    print(table(head, rows))


def given_codes(vq: ImageTokenizer, images_B3HW: Tensor, codes_BN: Tensor, hole_N: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """Codes [B, N], those of the intact drawing where they are not known, and which are known."""
    if way == LEAKY:
        return codes_BN, (~hole_N).expand_as(codes_BN)
    seen = [seen_codes(vq, image, pixels_of(hole_N, vq.spec.image_size), way.fills, way.ring) for image in images_B3HW]
    known_BN = torch.stack([each.known_N for each in seen])
    return torch.where(known_BN, torch.stack([each.codes_N for each in seen]), codes_BN), known_BN


def shown(values_B: Tensor) -> str:
    figure = estimate(values_B.double().numpy())
    return f"{figure.mean:.3f} ± {figure.standard_error:.3f}"


if __name__ == "__main__":
    program(main)
