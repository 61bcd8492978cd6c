"""How sure is the model of a cell? The scores an order can be extracted by, all "higher is placed earlier".

    gt_logprob    log p(the image's own code)                    of the code that lies there: needs the image
    max_prob      max_v log p(v)                                 of the best guess
    neg_entropy   sum_v p(v) log p(v)                            of the whole distribution, nats
    margin        p(best) - p(second best)

A score is one function of the logits and one entry of :data:`SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits_BRV, targets_BR) -> score_BR, all floating point in float32."""


def gt_logprob(logits_BRV: Tensor, targets_BR: Tensor) -> Tensor:
    """Log-probability of the targets in nats.

    Computed as -log(1 + sum over the *other* codes of exp(logit - target's logit)): the most confident cells, where
    p is within rounding of 1 and log_softmax returns 0 for all of them, stay apart.
    """
    own_BR1 = targets_BR.unsqueeze(-1)
    others_BR = logits_BRV.scatter(-1, own_BR1, -torch.inf).logsumexp(-1)
    return -torch.nn.functional.softplus(others_BR - logits_BRV.gather(-1, own_BR1).squeeze(-1))


def max_prob(logits_BRV: Tensor, targets_BR: Tensor) -> Tensor:
    """Log-probability of the most likely code in nats."""
    return gt_logprob(logits_BRV, logits_BRV.argmax(-1))


def neg_entropy(logits_BRV: Tensor, targets_BR: Tensor) -> Tensor:
    """Negative entropy in nats."""
    log_p_BRV = logits_BRV.log_softmax(-1)
    return (log_p_BRV.exp() * log_p_BRV).sum(-1)


def margin(logits_BRV: Tensor, targets_BR: Tensor) -> Tensor:
    """Probability of the most likely code less that of the second."""
    best_BR2 = (logits_BRV.topk(2, dim=-1).values - logits_BRV.logsumexp(-1, keepdim=True)).exp()
    return best_BR2[..., 0] - best_BR2[..., 1]


SCORES: dict[str, ScoreFunction] = {"gt_logprob": gt_logprob, "max_prob": max_prob, "neg_entropy": neg_entropy, "margin": margin}
