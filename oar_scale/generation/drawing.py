"""Drawing codes: guided logits in, codes out, by the Gumbel-max trick.

    code = argmax over v of  logit_v / temperature + g_v          over the codes that top_k, top_p and min_p leave

The noise g comes from a hash of seed, image, cell and code (``orders.selection.CounterRNG``): a cell that is asked about twice with
the same logits gives the same code, whatever was asked in between, in any batch and on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oar_scale.generation.settings import SampleSettings
from oar_scale.orders.selection import CounterRNG


def guided_rows(rows_GMD: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance of rows for the output head, which is linear: the same as of its logits.

    Args:
        rows_GMD: after each image's rows come those of the same image without its caption: G = 2B.
        scale: one for all rows, or one for each [B, M].
    """
    conditional_BMD, null_BMD = rows_GMD.unflatten(0, (-1, 2)).unbind(1)
    weight = scale[:, :, None].to(rows_GMD.dtype) if isinstance(scale, Tensor) else scale
    return torch.lerp(null_BMD, conditional_BMD, weight)


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
