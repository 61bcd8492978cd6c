"""How well does a model predict images it has not seen, in one order or another?

    nll(image, order) = mean over steps i of  -log p(code at order[i] | caption, codes at order[0..i-1])      nats per code

An any-order model has one likelihood for each order: the mean over random orders measures how well it was pretrained. Its own
orders by ``max_prob`` are those it would generate in: each cell is chosen from the codes placed before it, so the likelihood
along them is that of the generator, at temperature and guidance 1. Orders by ``gt_logprob`` are chosen by the codes to be
predicted. To be asked for a cell next then tells of its code: the likelihood along them is too high by what the order gives
away, and is no measure of a model.

All values are per image, so that differences between models, orders or captions are paired: what makes an image hard is
common to both sides and cancels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.data.hashing import permutations
from oar_scale.generation.seen_codes import pixels_of, seen_codes
from oar_scale.model import AnyOrderModel
from oar_scale.results.estimates import Estimate, estimate
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.vq import pixels_to_unit


@torch.no_grad()
def nll_table(model: AnyOrderModel, codes_SN: Tensor, cond_inputs_S: Tensor, orders: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Mean NLL of each image under several orders.

    Args:
        codes_SN: codes in raster order, on any device.
        cond_inputs_S: what ``model.condition`` takes, a row for each image.
        orders: for each name a permutation of the cells for each image, [S, N].
        batch: images taken through the model at once.

    Returns:
        For each name float64 [S], nats per code, on the CPU.

    Raises:
        ValueError: the model is in training mode, or an order's shape is not that of the codes.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes its answers: call model.eval() first")
    for name, order_SN in orders.items():
        if order_SN.shape != codes_SN.shape:
            raise ValueError(f"order {name!r} is {list(order_SN.shape)}, the codes are {list(codes_SN.shape)}")
    device = model.tok_embeddings.weight.device
    table = {name: torch.empty(len(codes_SN), dtype=torch.float64) for name in orders}
    for start in range(0, len(codes_SN), batch):
        part = slice(start, start + batch)
        codes_BN, condition_BTD = codes_SN[part].to(device), model.condition(cond_inputs_S[part].to(device))
        for name, order_SN in orders.items():
            table[name][part] = model.nll(codes_BN, order_SN[part].to(device), condition_BTD).double().mean(1).cpu()
    return table


@torch.no_grad()
def prediction_table(model: AnyOrderModel, codes_SN: Tensor, cond_inputs_S: Tensor, order_SN: Tensor, batch: int) -> dict[str, Tensor]:
    """The likelihood along an order, how sure the model is there, and how often rightly so; for the price of the likelihood alone.

    Args:
        codes_SN, cond_inputs_S, batch: as :func:`nll_table`.
        order_SN: a permutation of the cells for each image.

    Returns:
        float64 [S] on the CPU, means over an image's cells: ``nll`` of its codes in nats, as by :func:`nll_table`; ``entropy`` of the
        predictions in nats; ``top probability`` of the most likely code; ``top accuracy``, the share of cells where that is the image's.
    """
    device = model.tok_embeddings.weight.device
    table = {name: torch.zeros(len(codes_SN), dtype=torch.float64) for name in ("nll", "entropy", "top probability", "top accuracy")}
    for start in range(0, len(codes_SN), batch):
        part = slice(start, start + batch)
        codes_BN, order_BN = codes_SN[part].to(device), order_SN[part].to(device)
        rows_BND = model.rows(codes_BN, order_BN, model.condition(cond_inputs_S[part].to(device)))
        for step in range(codes_BN.shape[1]):  # one cell of each image at a time: the logits of all cells need not exist together
            log_p_BV = model.output(rows_BND[:, step]).float().log_softmax(-1)
            top_B, code_B = log_p_BV.max(-1)
            own_B1 = codes_BN.gather(1, order_BN[:, step, None])
            of_step = {
                "nll": -log_p_BV.gather(1, own_B1)[:, 0],
                "entropy": -(log_p_BV.exp() * log_p_BV).sum(-1),
                "top probability": top_B.exp(),
                "top accuracy": code_B == own_B1[:, 0],
            }
            for name, value_B in of_step.items():
                table[name][part] += value_B.double().cpu() / codes_BN.shape[1]
    return table


@torch.no_grad()
def hidden_nll(model: AnyOrderModel, codes_BN: Tensor, known_BN: Tensor, hidden_N: Tensor, condition_BTD: Tensor) -> Tensor:
    """Mean NLL of the codes in a hole, in raster order after the known ones; cells that are neither come last.

    Returns:
        float64 [B], nats per code, on the CPU.
    """
    rank_BN = torch.where(known_BN, 0, torch.where(hidden_N, 1, 2))
    order_BN = rank_BN.argsort(dim=1, stable=True)
    hidden_BN = hidden_N[order_BN]
    return ((model.nll(codes_BN, order_BN, condition_BTD).double() * hidden_BN).sum(1) / hidden_BN.sum(1)).cpu()


@torch.no_grad()
def honest_nll(
    model: AnyOrderModel,
    vq: ImageTokenizer,
    pictures: NDArray[np.uint8],
    codes_SN: NDArray[np.int64],
    hole_N: NDArray[np.bool_],
    condition_BTD: Tensor,
) -> Tensor:
    """Mean NLL of the codes in a hole, given those around it, which are encoded without what it hides.

    Args:
        pictures: uint8 [S, H, W, 3], intact.
        codes_SN: theirs.
        hole_N: the cells that are hidden.

    Returns:
        float64 [S], nats per code, on the CPU.
    """
    device = condition_BTD.device
    hole, codes_BN = torch.from_numpy(hole_N).to(device), torch.from_numpy(codes_SN).to(device)
    hidden_SS = pixels_of(hole, vq.spec.image_size)
    seen = [seen_codes(vq, pixels_to_unit(torch.from_numpy(each)[None])[0].to(device), hidden_SS) for each in pictures]
    known_BN = torch.stack([each.known_N for each in seen])
    honest_BN = torch.where(known_BN, torch.stack([each.codes_N for each in seen]), codes_BN)
    return hidden_nll(model, honest_BN, known_BN, hole, condition_BTD)


def random_orders(images: int, cells: int, seed: int) -> Tensor:
    """One random permutation [S, N] for each image: a function of (seed, image) alone, the same for every model."""
    return torch.from_numpy(permutations("evaluation order", cells, seed, np.arange(images)))


def raster_orders(images: int, cells: int) -> Tensor:
    """Rows from top to bottom, each from left to right, [S, N]."""
    return torch.arange(cells).expand(images, -1)


def shuffled_captions(cond_inputs_S: Tensor, seed: int) -> Tensor:
    """Give every image the caption of another one: text ids [S, T] that differ from the image's own in every row.

    The different captions are put in a random cycle, and each image gets the one that follows its own. So no image keeps
    its caption, even where several share one, and neighbours in the data, which tend to be alike, are not swapped.

    Raises:
        ValueError: all captions are the same.
    """
    captions_UT, caption_S = np.unique(cond_inputs_S.cpu().numpy(), axis=0, return_inverse=True)
    count = len(captions_UT)
    if count < 2:
        raise ValueError("captions can only be shuffled where there are at least two different ones")
    cycle_U = permutations("shuffled captions", count, seed)
    next_U = np.empty_like(cycle_U)
    next_U[cycle_U] = np.roll(cycle_U, -1)
    return torch.from_numpy(captions_UT[next_U[caption_S.ravel()]]).to(cond_inputs_S.device)


def nll_estimate(nll_S: Tensor, families_S: NDArray[np.int64] | None = None) -> Estimate:
    """Mean over images and its standard error; ``families_S`` as for :func:`~oar_scale.results.estimates.estimate`."""
    return estimate(nll_S.double().numpy(), families_S)


def paired_difference(first_S: Tensor, second_S: Tensor, families_S: NDArray[np.int64] | None = None) -> Estimate:
    """Mean of ``first - second`` over the same images, and its standard error; ``families_S`` as for :func:`nll_estimate`.

    Raises:
        ValueError: the two do not have one value for each of the same images.
    """
    if first_S.shape != second_S.shape:
        raise ValueError(f"a paired difference needs the same images on both sides, got {list(first_S.shape)} and {list(second_S.shape)}")
    return nll_estimate(first_S.double() - second_S.double(), families_S)
