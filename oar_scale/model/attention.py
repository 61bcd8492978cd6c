"""Attention, and attention that also returns its log-sum-exp.

A candidate row attends to the shared prefix and to itself. Its own key is not in the prefix, so the two parts are merged
afterwards, exactly, through the log-sum-exp z of the prefix scores:

    a = sigmoid(q.k_self / sqrt(d) - z)          share of the row itself
    out = (1 - a) * attention(q, prefix) + a * v_self

so that no mask over candidates exists and the prefix is never copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_with_lse(q_BHQd: Tensor, k_BGKd: Tensor, v_BGKd: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key, and the log-sum-exp of its scores.

    Fewer key heads G than query heads H (grouped-query attention): the H / G queries of a group become rows of one head,
    which is exact, since there is no mask.

    Returns:
        out [B, H, Q, d] in the input's dtype, lse [B, H, Q] in float32.
    """
    heads, groups = q_BHQd.shape[1], k_BGKd.shape[1]
    if heads != groups:
        out, lse = attention_with_lse(q_BHQd.unflatten(1, (groups, -1)).flatten(2, 3), k_BGKd, v_BGKd)
        shape = (heads // groups, q_BHQd.shape[2])
        return out.unflatten(2, shape).flatten(1, 2), lse.unflatten(2, shape).flatten(1, 2)
    if q_BHQd.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BHQd, k_BGKd, v_BGKd)
        return out, lse.float()
    return _gpu_attention(q_BHQd, k_BGKd, v_BGKd)


WIDEST_FLASH = 256
"""Channels of a head that the GPU's flash attention takes at most."""


def _gpu_attention(q_BHQd: Tensor, k_BHKd: Tensor, v_BHKd: Tensor) -> tuple[Tensor, Tensor]:
    """The GPU's kernels: in half precision flash attention, else the memory-efficient one.

    In half precision both take heads of a multiple of 8 channels; zeros fill up others (LlamaGen-3B: 100).
    """
    width, half = q_BHQd.shape[-1], q_BHQd.dtype != torch.float32
    if half and width % 8:
        q_BHQd, k_BHKd, v_BHKd = (F.pad(tensor, (0, -width % 8)) for tensor in (q_BHQd, k_BHKd, v_BHKd))
    if half and width <= WIDEST_FLASH:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q_BHQd, k_BHKd, v_BHKd, scale=width**-0.5)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q_BHQd, k_BHKd, v_BHKd, None, True, scale=width**-0.5)
    return out[..., :width], lse[:, :, : q_BHQd.shape[2]].float()


def merge_self_(out_BHQd: Tensor, lse_BHQ: Tensor, own_BHQ: Tensor, v_BGQd: Tensor) -> None:
    """Add to each query's attention its own value, in place; see the module's formula.

    Args:
        own_BHQ: scores of the queries' own keys, q.k / sqrt(d), in float32.
    """
    share_BHQ1 = torch.sigmoid(own_BHQ - lse_BHQ).unsqueeze(-1).to(out_BHQd.dtype)
    groups = v_BGQd.shape[1]
    out_BHQd.unflatten(1, (groups, -1)).lerp_(v_BGQd.unsqueeze(2), share_BHQ1.unflatten(1, (groups, -1)))
