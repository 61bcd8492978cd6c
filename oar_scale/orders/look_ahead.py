"""Score ``info_gain``: how much does a cell's code tell about the other empty cells?

    gain(c) = sum over empty j other than c of   H(x_j | placed)  -  E over v ~ p(x_c | placed) of H(x_j | placed, x_c = v)

H is the entropy of the model's distribution of one cell, in nats. So it is the sum of the mutual informations of c with each other cell,
not that with all of them together, and it never looks at the image's own code.

    candidates                          one pass: H(x_j | placed) of all R empty cells, p(x_c | placed)
    hypotheses  (c, v) x (R - 1) cells  each with a copy of the prefix in which v lies at c: H(x_j | placed, x_c = v)

The expectation is exact over all codes of the vocabulary, or over K codes that are drawn from p: by systematic sampling, at (k + u) / K of
the cumulative distribution for k = 0 .. K - 1 and one uniform number u, which is unbiased and varies less than K independent draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oar_scale.model import Candidates, Decoder, Prefix
from oar_scale.model.decoding import ROWS_AT_ONCE
from oar_scale.model.row_layout import Placed
from oar_scale.orders.scores import score_rows


def least_certain(entropy_BR: Tensor, most: int | None) -> Tensor:
    """The candidates [B, C] that hypotheses are made of: all R, or the ``most`` with the largest entropies.

    A cell's mutual information with another is at most its own entropy, so certain cells have no gain.
    """
    cells = entropy_BR.shape[1]
    if most is None or most >= cells:
        return torch.arange(cells, device=entropy_BR.device).expand_as(entropy_BR)
    return entropy_BR.topk(most, dim=1).indices


@torch.no_grad()
def information_gain(
    decoder: Decoder, prefix: Prefix, candidates: Candidates, entropy_BR: Tensor, asked_BC: Tensor, samples: int, uniform_BR: Tensor
) -> Tensor:
    """The gain of each of R cells, float32 [B, R]; -inf of those that are not among ``asked_BC``.

    Args:
        prefix: without guidance, not on static buffers; it stays as it is.
        candidates: rows about all empty cells, the last that ``prefix`` was asked about.
        entropy_BR: theirs (:func:`entropies`).
        samples: K; 0: the expectation is exact, by a hypothesis for every code.
        uniform_BR: u of each cell.
    """
    images, cells = entropy_BR.shape
    if cells == 1:
        return torch.zeros_like(entropy_BR)
    image_P = torch.arange(images, device=asked_BC.device).repeat_interleave(asked_BC.shape[1])
    at_P, hypotheses = asked_BC.flatten(), samples or decoder.model.spec.vocab_size
    rows = ROWS_AT_ONCE.get(asked_BC.device.type, ROWS_AT_ONCE["cpu"])
    gain_P = list[Tensor]()
    for image_p, at_p in zip(*(each.split(max(1, rows // (cells * hypotheses))) for each in (image_P, at_P)), strict=True):
        codes_pK, weight_pK = _codes(decoder, candidates.rows_BRD[image_p, at_p], samples, uniform_BR[image_p, at_p])
        # The places of the other cells: from the cell's own place on, the next ones.
        other_R = torch.arange(cells - 1, device=at_p.device)
        others_pR = candidates.cells_BR[image_p].gather(1, other_R + (other_R >= at_p[:, None]))
        cell_p = candidates.cells_BR[image_p, at_p]
        each = (image_p, cell_p, others_pR)
        image_H, cell_H, others_HR = (of.repeat_interleave(codes_pK.shape[1], dim=0) for of in each)
        parts = zip(*(of.split(max(1, rows // cells)) for of in (image_H, cell_H, codes_pK.flatten(), others_HR)), strict=True)
        left_pK = torch.cat([_entropy_left(decoder, prefix, *part) for part in parts]).view_as(weight_pK)
        before_p = entropy_BR[image_p].sum(1) - entropy_BR[image_p, at_p]
        gain_P.append(before_p - (weight_pK * left_pK).sum(1))
    return torch.full_like(entropy_BR, -torch.inf).scatter(1, asked_BC, torch.cat(gain_P).view_as(asked_BC).float())


def _codes(decoder: Decoder, rows_pD: Tensor, samples: int, uniform_p: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of some cells and their weights, which sum to 1: [p, K] both."""
    probability_pV = decoder.model.output(rows_pD[:, None])[:, 0].float().softmax(1)
    if samples == 0:
        return torch.arange(probability_pV.shape[1], device=rows_pD.device).expand_as(probability_pV), probability_pV
    cumulated_pV = probability_pV.cumsum(1)
    place_K = torch.arange(samples, device=rows_pD.device)
    wanted_pK = (place_K + uniform_p[:, None]).float() / samples * cumulated_pV[:, -1:]
    codes_pK = torch.searchsorted(cumulated_pV, wanted_pK).clamp_max(probability_pV.shape[1] - 1)
    return codes_pK, torch.full_like(wanted_pK, 1 / samples)


def _entropy_left(decoder: Decoder, prefix: Prefix, image_H: Tensor, cell_H: Tensor, code_H: Tensor, others_HR: Tensor) -> Tensor:
    """The entropies of the other cells, summed, once a code lies at a cell: [H] for H hypotheses."""
    assert isinstance(prefix.rows, int), "hypotheses have prefixes of one length"
    # As many rows as they need: the cell's and its code's, what waits, and the questions.
    needed = min(prefix.rows + decoder.model.layout.stride * (others_HR.shape[1] + 2), prefix.cache.shape[4])
    cache = prefix.cache[:, :, :, :, :needed].index_select(2, image_H)
    last = Placed(prefix.last.cells_BK[image_H], prefix.last.codes_BKD[image_H])
    hypothesis = decoder.prefill(Prefix(cache, prefix.rows, last, prefix.tables), cell_H[:, None], code_H[:, None])
    return entropies(decoder, decoder.candidate_rows(hypothesis, others_HR).rows_BRD).sum(1)


def entropies(decoder: Decoder, rows_BRD: Tensor) -> Tensor:
    """The entropy of the code that each row asks for, float32 nats [B, R]."""
    rows_RD = rows_BRD.flatten(0, 1)
    nothing_R = torch.zeros(len(rows_RD), dtype=torch.long, device=rows_RD.device)
    return -score_rows(decoder.model.output.weight, rows_RD, "neg_entropy", nothing_R).view(rows_BRD.shape[:2])
