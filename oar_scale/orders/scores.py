"""How sure is the model of a cell? The scores an order can be extracted by, all "higher is placed earlier".

    gt_logprob    log p(the image's own code)                    of the code that lies there: needs the image
    max_prob      max_v log p(v)                                 of the best guess
    neg_entropy   sum_v p(v) log p(v)                            of the whole distribution, nats
    margin        p(best) - p(second best)
    sampled       log p(v), v drawn from p                       of a guess, drawn anew at every step
    info_gain     entropy that a cell's code takes from others   of hypotheses: ``look_ahead.py``

Logits of all candidates never exist together: :func:`score_rows` takes some rows through some codes of the output head at a
time, and a score adds up what it needs of each block of logits.

    own, best, second     the largest logits so far                      top + log sum_v exp(logit_v - top)      so far

A score is one class and one entry of :data:`SCORES`; CONTRIBUTING.md has the rest that a new one needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.config.schema import Score
from oar_scale.model.blocks import in_few_shapes

BLOCK = {"cpu": (512, 2048), "cuda": (2**13, 2**14)}
"""Rows and codes whose logits exist at once: on a CPU what fits its cache, on a GPU half a gigabyte."""


class SumExp:
    """log(exp(a) + exp(b) + ...) of each row, a block at a time; -inf of nothing."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.top_R = torch.full((rows,), torch.finfo(torch.float32).min, device=device)
        self.sum_R = torch.zeros(rows, device=device)

    def add_(self, logits_RC: Tensor) -> Tensor:
        """Add a block of logits; overwrites it with exp(logit - top), and returns the factor that earlier sums are to be multiplied by."""
        # Sums are kept relative to the largest logit so far, so that no exponential overflows; a new largest one fades the old sum.
        top_R = torch.maximum(self.top_R, logits_RC.amax(1))
        fading_R = (self.top_R - top_R).exp()
        self.sum_R = self.sum_R * fading_R + logits_RC.sub_(top_R[:, None]).exp_().sum(1)
        self.top_R = top_R
        return fading_R

    def log(self) -> Tensor:
        """The log of the sum of all exponentials so far, [R]."""
        return self.top_R + self.sum_R.log()


class BlockScore:
    """The score of some rows, whose logits it is shown block by block."""

    whole = False
    """It must see all codes in one block."""

    def __init__(self, targets_R: Tensor, uniform_R: Tensor | None) -> None:
        """
        Args:
            targets_R: the code that lies in each cell.
            uniform_R: a number in (0, 1) for each row, for scores that draw.
        """
        self.targets_R, self.uniform_R = targets_R, uniform_R
        self.others = SumExp(len(targets_R), targets_R.device)

    def add_(self, logits_RC: Tensor, first: int) -> None:
        """Take the logits of the codes from ``first`` on; may overwrite them."""
        raise NotImplementedError

    def score(self) -> Tensor:
        """The score [R], float32, once all blocks were added."""
        raise NotImplementedError


class GtLogprob(BlockScore):
    """Computed as -log(1 + sum over the *other* codes of exp(logit - own logit)): the most confident cells, where p is within
    rounding of 1 and log_softmax returns 0 for all of them, stay distinct."""

    def __init__(self, targets_R: Tensor, uniform_R: Tensor | None) -> None:
        super().__init__(targets_R, uniform_R)
        self.own_R = self.others.sum_R

    def add_(self, logits_RC: Tensor, first: int) -> None:
        """Take the own code's logit and sum the others'."""
        # The own code's logit is taken out of its block, and the others are summed without it.
        at_R = self.targets_R - first
        here_R = (at_R >= 0) & (at_R < logits_RC.shape[1])
        at_R1 = at_R.clamp(0, logits_RC.shape[1] - 1)[:, None]
        logit_R = logits_RC.gather(1, at_R1)[:, 0]
        self.own_R = torch.where(here_R, logit_R, self.own_R)
        logits_RC.scatter_(1, at_R1, logit_R.masked_fill(here_R, -torch.inf)[:, None])
        self.others.add_(logits_RC)

    def score(self) -> Tensor:
        """``log p = -log(1 + sum of the others / own)``."""
        return -F.softplus(self.others.log() - self.own_R)


class MaxProb(BlockScore):
    """As :class:`GtLogprob`, but for the most likely code."""

    def __init__(self, targets_R: Tensor, uniform_R: Tensor | None) -> None:
        super().__init__(targets_R, uniform_R)
        self.best_R = torch.full_like(self.others.sum_R, -torch.inf)

    def add_(self, logits_RC: Tensor, first: int) -> None:
        """Keep the largest logit and sum the others'."""
        best_R1, at_R1 = logits_RC.max(1, keepdim=True)
        logits_RC.scatter_(1, at_R1, torch.minimum(best_R1, self.best_R[:, None]))  # the better one of two stays out of the sum
        self.best_R = torch.maximum(self.best_R, best_R1[:, 0])
        self.others.add_(logits_RC)

    def score(self) -> Tensor:
        """``log p`` of the most likely code."""
        return -F.softplus(self.others.log() - self.best_R)


class Margin(MaxProb):
    """Keeps the two largest logits, in addition to what :class:`MaxProb` keeps."""

    def __init__(self, targets_R: Tensor, uniform_R: Tensor | None) -> None:
        super().__init__(targets_R, uniform_R)
        self.second_R = self.best_R

    def add_(self, logits_RC: Tensor, first: int) -> None:
        """Keep the two largest logits and sum all but the largest."""
        # The second best of all codes is among the best two so far and the best two of this block.
        two_RK = logits_RC.topk(min(2, logits_RC.shape[1]), dim=1).values
        two_R2 = torch.cat([self.best_R[:, None], self.second_R[:, None], two_RK], dim=1).topk(2, dim=1).values
        self.second_R = two_R2[:, 1]
        super().add_(logits_RC, first)

    def score(self) -> Tensor:
        """Difference of the two largest probabilities."""
        all_R = torch.logaddexp(self.others.log(), self.best_R)
        return (self.best_R - all_R).exp() - (self.second_R - all_R).exp()


class NegEntropy(BlockScore):
    """``sum p log p = (sum e^l l) / (sum e^l) - log sum e^l`` with logits l relative to the largest so far."""

    def __init__(self, targets_R: Tensor, uniform_R: Tensor | None) -> None:
        super().__init__(targets_R, uniform_R)
        self.weighted_R = self.others.sum_R  # sum of exp(logit - top) * (logit - top)

    def add_(self, logits_RC: Tensor, first: int) -> None:
        """Sum the exponentials, and the logits weighted by them."""
        logits, before_R, sum_R = logits_RC.clone(), self.others.top_R, self.others.sum_R
        fading_R = self.others.add_(logits_RC)
        top_R = self.others.top_R
        # A larger top shifts every earlier logit by (before - top) and fades its weight; nothing is shifted before the first block.
        earlier_R = torch.where(sum_R > 0, (self.weighted_R + sum_R * (before_R - top_R)) * fading_R, 0.0)
        self.weighted_R = earlier_R + logits.sub_(top_R[:, None]).mul_(logits_RC).sum(1)

    def score(self) -> Tensor:
        """Minus the entropy, in nats."""
        return self.weighted_R / self.others.sum_R - self.others.sum_R.log()


class Sampled(GtLogprob):
    """The code is the one where the cumulative distribution passes the row's uniform number."""

    whole = True

    def add_(self, logits_RC: Tensor, first: int) -> None:
        """Draw the code from the whole distribution, then score it as :class:`GtLogprob` does."""
        assert self.uniform_R is not None
        # Scaled by the last cumulated value, which rounding may leave below 1.
        cumulated_RC = logits_RC.softmax(1).cumsum(1)
        wanted_R1 = self.uniform_R.to(cumulated_RC.dtype)[:, None] * cumulated_RC[:, -1:]
        self.targets_R = torch.searchsorted(cumulated_RC, wanted_R1)[:, 0].clamp_max(logits_RC.shape[1] - 1)
        super().add_(logits_RC, first)


SCORES: dict[Score, type[BlockScore]] = {
    "gt_logprob": GtLogprob,
    "max_prob": MaxProb,
    "neg_entropy": NegEntropy,
    "margin": Margin,
    "sampled": Sampled,
}


def score_logits(score: Score, logits_RV: Tensor, targets_R: Tensor, uniform_R: Tensor | None = None) -> Tensor:
    """The score of each row [R], float32, of logits that are there; leaves them as they are."""
    block_score = SCORES[score](targets_R, uniform_R)
    block_score.add_(logits_RV.to(torch.float32, copy=True), 0)
    return block_score.score()


def score_rows(weight_VD: Tensor, rows_RD: Tensor, score: Score, targets_R: Tensor, uniform_R: Tensor | None = None) -> Tensor:
    """The score of each row [R], float32, by the output head's weights; the logits never exist all at once.

    Args:
        rows_RD: normalised rows, as the head takes them.
        targets_R, uniform_R: see :class:`BlockScore`.
    """
    rows, codes = BLOCK.get(rows_RD.device.type, BLOCK["cpu"])
    if SCORES[score].whole:  # all codes at once, and fewer rows, so that as many logits exist as for the other scores
        rows, codes = max(1, rows * codes // len(weight_VD)), len(weight_VD)
    score_R = torch.empty(len(rows_RD), device=rows_RD.device)
    # One block of memory for all products; 64 rows more, by which ``in_few_shapes`` may pad.
    buffer = rows_RD.new_empty((min(rows, len(rows_RD)) + 64) * min(codes, len(weight_VD)))
    for part in (slice(start, start + rows) for start in range(0, len(rows_RD), rows)):
        x_rD, block_score = in_few_shapes(rows_RD[part]), SCORES[score](targets_R[part], None if uniform_R is None else uniform_R[part])
        for first in range(0, len(weight_VD), codes):
            weight_CD = weight_VD[first : first + codes]
            logits_rC = torch.mm(x_rD, weight_CD.t(), out=buffer[: len(x_rD) * len(weight_CD)].view(len(x_rD), -1))
            block_score.add_(logits_rC[: len(block_score.targets_R)].float(), first)
        score_R[part] = block_score.score()
    return score_R
