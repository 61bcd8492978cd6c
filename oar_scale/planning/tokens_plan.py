"""Plan of the stage ``tokens``: every view of every training image, and the other splits once, through the image tokenizer's encoder.

It computes in float32 on as many actors as there are training workers, one GPU each. A text tower whose features are precomputed is left
out, as is reading and decoding of pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.planning.case import Case
from oar_scale.tokenizers.flops import encoder_flops


@dataclass(frozen=True)
class TokensPlan:
    """Codes of all images."""

    encoded: int
    """Images, each view counted."""
    flops: int
    """Operations for one of them."""
    seconds: float
    gpu_hours: float
    money: float


def plan_tokens(case: Case) -> TokensPlan | None:
    """Plan the stage ``tokens``; None where the number of images is unknown."""
    if case.images is None:
        return None
    recipe, train = case.recipe, case.images.count
    encoded = train * len(recipe.tokenizer.views) + round(train * (1 / recipe.data.train_fraction - 1))
    flops = encoder_flops(recipe.tokenizer.image, recipe.grid)
    start_s = case.assumed("actors.start_on_cpu_s" if case.cluster.on_cpu else "actors.start_s")
    seconds = start_s + encoded * flops / (case.workers * case.float32_rate)
    hours = case.workers * seconds / 3600
    return TokensPlan(encoded, flops, seconds, hours, hours * case.cluster.price)
