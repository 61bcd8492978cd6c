"""The same images in fewer passes: codes of the next cells are guessed and, in the next pass, confirmed or corrected.

Drawn one by one, the code at place i of a given order is a function of the codes before it and of the cell's noise (``drawing``):

    x_i = argmax over v of  log p(v | x_1 .. x_i-1) / temperature + g_i,v

Here all codes of a window are computed at once, each from the *drafts* before it, again and again with the same noise (Jacobi's iteration).
A code whose predecessors were all right is right; so each pass settles every draft up to the first one that it changes, that one included.
The images are those of drawing one by one, code for code, whatever was drafted, and so is their distribution.

Two answers to "which code, if the codes before were these?" agree with a probability between (1 - d) / (1 + d) and 1 - d, where d is the
total variation between the two distributions; 1 - d is what the rule of speculative sampling reaches (accept with min(1, p / q), else
draw from the rest), whose images would depend on what was drafted. Drafts are drawn by the model itself, as candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.generation.drawing import draw_codes, guided_rows
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel
from oar_scale.model.window import WindowDecoder
from oar_scale.orders.scores import score_logits
from oar_scale.orders.selection import CounterRNG


class Placing(NamedTuple):
    """Images along their orders: what is at each place, and the passes it took."""

    sequence_BN: Tensor
    """The cells."""
    codes_BN: Tensor
    score_BN: Tensor
    passes_B: Tensor


@torch.no_grad()
def draw_drafted(
    model: AnyOrderModel, condition_GTD: Tensor, settings: SampleSettings, rng: CounterRNG, placing: Placing, settled_B: Tensor
) -> Placing:
    """Draw all cells behind the first ones of each image.

    Args:
        condition_GTD: under guidance, each image's condition is followed by the null condition.
        placing: with the codes of the first cells.
        settled_B: their number.

    Raises:
        ValueError: as :class:`WindowDecoder`.
    """
    sequence_BN, branches = placing.sequence_BN, 2 if settings.guided else 1
    cells, width = sequence_BN.shape[1], min(settings.draft, sequence_BN.shape[1])
    window = WindowDecoder(model, condition_GTD, sequence_BN.repeat_interleave(branches, 0), width)
    window.prefill(placing.codes_BN[:, : int(settled_B.max())].repeat_interleave(branches, 0))
    scale_P = torch.tensor([settings.scale(min(place, cells), cells) for place in range(cells + 2 * width + 1)], device=settled_B.device)
    # A place more takes the answers that mean nothing.
    codes_BP, score_BP, passes_B = F.pad(placing.codes_BN, (0, 1)), F.pad(placing.score_BN, (0, 1)), placing.passes_B
    drafted_B, turn_M = torch.zeros_like(settled_B), torch.arange(2 * width + 1, device=settled_B.device)
    # Whether all are settled is asked once a pass; within a pass nothing waits for the device.
    while min(settled := settled_B.tolist()) < cells:
        codes_GN, settled_G, drafted_G = (each.repeat_interleave(branches, 0) for each in (codes_BP[:, :cells], settled_B, drafted_B))
        rows_GMD, place_GM = window.ask(codes_GN, settled_G, drafted_G, end=max(settled))
        place_BM = place_GM[::branches]
        rows_BMD = guided_rows(rows_GMD, scale_P[place_BM]) if settings.guided else rows_GMD
        logits_BMV = model.output(rows_BMD).float()
        cells_BM = sequence_BN.gather(1, place_BM.clamp_max(cells - 1))
        drawn_BM = draw_codes(logits_BMV, cells_BM, settings, rng)
        score_R = score_logits("max_prob", logits_BMV.flatten(0, 1), cells_BM.flatten())
        # Settled are the drafts up to the first that is drawn otherwise now, and that place.
        drafts_BM = codes_BP.gather(1, place_BM.clamp_max(cells))
        right_BM = (drawn_BM == drafts_BM) & (turn_M < drafted_B[:, None])
        newly_B = right_BM.cumprod(1).sum(1) + 1
        meant_BM = ((turn_M <= drafted_B[:, None]) | (turn_M > width)) & (place_BM < cells)
        target_BM = place_BM.where(meant_BM, cells)
        codes_BP, score_BP = codes_BP.scatter(1, target_BM, drawn_BM), score_BP.scatter(1, target_BM, score_R.view(target_BM.shape))
        passes_B = passes_B + (settled_B < cells)
        frontier_B = settled_B + drafted_B + width + 1
        settled_B = (settled_B + newly_B).clamp_max(cells)
        drafted_B = (frontier_B - settled_B).clamp(0, width)
    return Placing(sequence_BN, codes_BP[:, :cells], score_BP[:, :cells], passes_B)
