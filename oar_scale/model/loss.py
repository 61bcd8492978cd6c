"""Cross-entropy of the output head without its logits: rows go through in chunks, in the forward pass, gradients included.

    logits = rows W^T          [c, V] for c rows at a time, float32 only here
    nll    = logsumexp(logits) - logits[target]
    d_rows = (softmax - onehot) W              d_W += (softmax - onehot)^T rows

The mean of a loss has the same gradient whatever comes above but for one factor, so it can be taken while a chunk's logits are
there; [R, V] never exists. ``torch.nn.functional.linear_cross_entropy`` does the same; it rounds a bfloat16 loss to bfloat16,
does not return the loss of each row, and took more time and memory on a CPU (docs/results/model-cpu.md,
``python tools/benchmarks/model.py --head``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oar_scale.model.autograd import FunctionContext

CHUNK_NUMBERS = {"cpu": 2**22, "cuda": 2**27}
"""Logits held at once: 16 MB of a CPU (smaller chunks make slower products, larger ones leave its cache), 0.5 GB of a GPU."""


class _MeanNLL(torch.autograd.Function):
    """Mean loss [] of R rows, and the loss of each [R] (float32, no gradient)."""

    @staticmethod
    def forward(ctx: FunctionContext, rows_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        d_rows_RD, d_weight_VD = torch.empty_like(rows_RD), torch.zeros_like(weight_VD, dtype=torch.float32)
        nll_R = rows_RD.new_empty(len(rows_RD), dtype=torch.float32)
        # One block of memory for the logits of all chunks: fresh memory for each costs a pass over it on a CPU.
        slices = chunks(len(rows_RD), len(weight_VD), rows_RD.device)
        buffer_cV = rows_RD.new_empty(slices[0].stop, len(weight_VD))
        for part in slices:
            x_cD, targets_c1 = rows_RD[part], targets_R[part, None]
            logits_cV = torch.mm(x_cD, weight_VD.t(), out=buffer_cV[: len(x_cD)]).float()
            target_c1, top_c1 = logits_cV.gather(1, targets_c1), logits_cV.amax(1, keepdim=True)
            p_cV = logits_cV.sub_(top_c1).exp_()  # in place, as is all that follows: logits_cV is gone from here on
            sum_c1 = p_cV.sum(1, keepdim=True)
            nll_R[part] = (sum_c1.log() + top_c1 - target_c1)[:, 0]
            # softmax - onehot, the gradient of the summed loss by the logits
            p_cV.div_(sum_c1).scatter_add_(1, targets_c1, p_cV.new_full(targets_c1.shape, -1.0))
            error_cV = p_cV.to(rows_RD.dtype)
            torch.mm(error_cV, weight_VD, out=d_rows_RD[part])
            # The weight's gradient is summed in float32 over the chunks, whatever the dtype of the products.
            if error_cV.dtype == torch.float32:
                d_weight_VD.addmm_(error_cV.t(), x_cD)
            else:
                d_weight_VD += error_cV.t() @ x_cD
        ctx.save_for_backward(d_rows_RD, d_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nll_R)
        return nll_R.mean(), nll_R

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionContext, *d_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        d_rows_RD, d_weight_VD = ctx.saved_tensors
        # Scaled in place, which is why there can be one backward pass only.
        factor = d_outputs[0] / len(d_rows_RD)
        return d_rows_RD.mul_(factor), d_weight_VD.mul_(factor), None


def mean_nll(rows_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood [] of the targets under ``softmax(rows W^T)``, and of each row [R] without gradient.

    Both float32, in nats. One backward pass only.
    """
    if torch.is_grad_enabled() and (rows_RD.requires_grad or weight_VD.requires_grad):
        losses: tuple[Tensor, Tensor] = _MeanNLL.apply(rows_RD, weight_VD, targets_R)
        return losses
    nll_R = rows_RD.new_empty(len(rows_RD), dtype=torch.float32)
    for part in chunks(len(rows_RD), len(weight_VD), rows_RD.device):
        logits_cV = (rows_RD[part] @ weight_VD.t()).float()
        nll_R[part] = logits_cV.logsumexp(1) - logits_cV.gather(1, targets_R[part, None])[:, 0]
    return nll_R.mean(), nll_R


def chunks(rows: int, vocab: int, device: torch.device) -> list[slice]:
    """Parts of R rows whose logits may exist at once."""
    size = max(1, CHUNK_NUMBERS.get(device.type, CHUNK_NUMBERS["cpu"]) // vocab)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
