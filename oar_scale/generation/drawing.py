"""Drawing codes, and the cells they are for: guided rows in, codes out, by the Gumbel-max trick.

    code = argmax over v of  logit_v / temperature + g_v          over the codes that top_k, top_p and min_p leave

The noise g comes from a hash of seed, image, cell and code (``orders.selection.CounterRNG``): a cell that is asked about twice with
the same logits gives the same code, whatever was asked in between, in any batch and on any device.

Which cell is next says a score (``SampleSettings.score``, ``orders.scores``). All of them but ``sampled`` look at a cell's distribution
before a code is drawn. ``sampled`` draws a code for every empty cell and places the one that is most likely, as MaskGIT does: cells that
drew a rare code wait. When more is known they are asked again, with the noise that they had.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from oar_scale.generation.settings import SampleSettings
from oar_scale.model.transformer import CodeHead
from oar_scale.orders.scores import BLOCK, score_logits, score_rows
from oar_scale.orders.selection import CounterRNG, guide, pick_several


def guided_rows(rows_GMD: Tensor, scale: float | Tensor) -> Tensor:
    """The rows of a batch under guidance, as :func:`oar_scale.orders.selection.guide` mixes them: [B, M, D].

    Args:
        rows_GMD: after each image's rows come those of the same image without its caption: G = 2B.
        scale: one for all rows, or one for each [B, M].
    """
    conditional_BMD, null_BMD = rows_GMD.unflatten(0, (-1, 2)).unbind(1)
    return guide(conditional_BMD, null_BMD, scale)


class Drawn(NamedTuple):
    """M cells of each image, first placed first."""

    candidate_BM: Tensor
    """The places of their rows among those that were asked about."""
    cells_BM: Tensor
    codes_BM: Tensor
    score_BM: Tensor
    """As ``Generated.score_BN``, whatever the cells were chosen by."""


def draw_next(head: CodeHead, rows_BMD: Tensor, cells_BM: Tensor, settings: SampleSettings, rng: CounterRNG) -> Drawn:
    """Codes for M cells, from guided rows about them."""
    logits_BMV = head(rows_BMD).float()
    score_R = score_logits("max_prob", logits_BMV.flatten(0, 1), cells_BM.flatten())
    at_BM = torch.arange(cells_BM.shape[1], device=cells_BM.device).expand_as(cells_BM)
    return Drawn(at_BM, cells_BM, draw_codes(logits_BMV, cells_BM, settings, rng), score_R.view_as(cells_BM))


def draw_most_confident(
    head: CodeHead,
    rows_BRD: Tensor,
    cells_BR: Tensor,
    size: int,
    settings: SampleSettings,
    rng: CounterRNG,
    step: int | Tensor,
    empty_BR: Tensor | None = None,
    blind_B1: Tensor | None = None,
) -> Drawn:
    """The ``size`` of R cells with the best scores, and codes for them, from guided rows about the cells.

    Scores within 1e-6 of the best count as equal to it (``pick_best``). Of equal cells the first in raster order is taken; of an image that
    begins blindly the one that ranks highest by seed and image (``CounterRNG.ties``), as in extraction.

    Args:
        cells_BR: the empty cells in raster order.
        step: the number of cells that are there, one for all images or [B, 1]: its noise is added to the cells' scores.
        empty_BR: which of the cells are empty, where an image has fewer than R of them; None: all.
        blind_B1: which images begin blindly: they are empty, and the model cannot tell the cells of an empty image apart
            (``ModelSpec.blind_start``); None: no image.
    """
    codes_BR: Tensor | None = None
    if settings.score == "sampled":
        codes_BR, score_BR = draw_scored(head, rows_BRD, cells_BR, settings, rng)
    else:
        score_BR = score_rows(head.weight, rows_BRD.flatten(0, 1), settings.score, cells_BR.flatten()).view_as(cells_BR)
    wanted_BR = score_BR
    if settings.order_temperature:
        wanted_BR = score_BR + settings.order_temperature * rng.gumbel(step).gather(1, cells_BR)
    if empty_BR is not None:
        wanted_BR = wanted_BR.masked_fill(~empty_BR, -torch.inf)
    rank_BR = torch.arange(cells_BR.shape[1], device=cells_BR.device).flip(0).expand_as(cells_BR)
    if blind_B1 is not None:
        rank_BR = rng.ties().gather(1, cells_BR).where(blind_B1, rank_BR)
    chosen_BM = pick_several(wanted_BR, rank_BR, size)
    # Scores need no logits of all cells at once; those of the chosen ones alone are computed to draw their codes.
    chosen_BMD = rows_BRD.gather(1, chosen_BM[:, :, None].expand(-1, -1, rows_BRD.shape[2]))
    cells_BM = cells_BR.gather(1, chosen_BM)
    logits_BMV = head(chosen_BMD).float()
    codes_BM = draw_codes(logits_BMV, cells_BM, settings, rng) if codes_BR is None else codes_BR.gather(1, chosen_BM)
    confidence_BM = score_BR.gather(1, chosen_BM)
    if settings.score != "max_prob":
        confidence_BM = score_logits("max_prob", logits_BMV.flatten(0, 1), cells_BM.flatten()).view_as(cells_BM)
    # A cell that is not a number is never the best of the others: who chose among such is not to be trusted, either.
    no_number_B1 = wanted_BR.isnan().any(1, keepdim=True)
    return Drawn(chosen_BM, cells_BM, codes_BM, confidence_BM.masked_fill(no_number_B1, torch.nan))


def draw_scored(head: CodeHead, rows_BRD: Tensor, cells_BR: Tensor, settings: SampleSettings, rng: CounterRNG) -> tuple[Tensor, Tensor]:
    """A code for each of R cells, and its log-probability in the guided distribution (before temperature, top_k, top_p and min_p), nats.

    Returns:
        Codes int64 and log-probabilities float32, [B, R] both. Logits exist for some cells of all images at a time.
    """
    rows, codes = BLOCK.get(rows_BRD.device.type, BLOCK["cpu"])
    # An eighth of what scores alone have at once: a code's noise takes several times the memory of its logit while it is made.
    cells = max(1, rows * codes // (8 * len(head.weight) * max(1, len(rows_BRD))))
    codes_Br, scores_Br = list[Tensor](), list[Tensor]()
    for rows_BrD, cells_Br in zip(rows_BRD.split(cells, 1), cells_BR.split(cells, 1), strict=True):
        logits_BrV = head(rows_BrD).float()
        drawn_Br = draw_codes(logits_BrV, cells_Br, settings, rng)
        codes_Br.append(drawn_Br)
        scores_Br.append(score_logits("gt_logprob", logits_BrV.flatten(0, 1), drawn_Br.flatten()).view_as(drawn_Br))
    return torch.cat(codes_Br, 1), torch.cat(scores_Br, 1)


def draw_codes(logits_BMV: Tensor, cells_BM: Tensor, settings: SampleSettings, rng: CounterRNG) -> Tensor:
    """A code for each of M cells of each image, int64 [B, M], from guided logits."""
    if settings.top_k == 1:
        return logits_BMV.argmax(-1)
    return (allowed_logits(logits_BMV, settings) + rng.code_gumbel(cells_BM, logits_BMV.shape[-1])).argmax(-1)


def allowed_logits(logits: Tensor, settings: SampleSettings) -> Tensor:
    """Logits [..., V] divided by the temperature, -inf for the codes that top_k, top_p and min_p (in this order) leave out.

    Codes as likely as the last one that is kept are kept, too. Nothing is sorted unless top_k or top_p asks for it.
    """
    logits = logits / settings.temperature if settings.temperature != 1 else logits
    if 0 < settings.top_k < logits.shape[-1]:
        logits = _at_least(logits, logits.topk(settings.top_k, dim=-1).values[..., -1:])
    if settings.top_p < 1:
        sorted_logits = logits.sort(dim=-1, descending=True).values
        probability = sorted_logits.softmax(-1)
        needed = probability.cumsum(-1) - probability < settings.top_p  # those before do not reach top_p yet
        logits = _at_least(logits, sorted_logits.masked_fill(~needed, torch.inf).amin(-1, keepdim=True))
    if settings.min_p > 0:
        logits = _at_least(logits, logits.amax(-1, keepdim=True) + math.log(settings.min_p))
    return logits


def _at_least(logits: Tensor, least: Tensor) -> Tensor:
    return logits.masked_fill(logits < least, -torch.inf)
