"""What is lost by finding orders more cheaply? Every method on the same images, against the exact one.

    rows        candidate rows that were computed for an image: what a method costs, whatever machine runs it
    tau         Kendall's tau to the exact order: 1 the same, 0 unrelated, -1 backwards
    regret      (sum of the scores along the exact order  -  the same along this one) / N,  a score always given what came before

With ``gt_logprob`` regret is the difference of the likelihoods of an image in the two orders, in nats per code. Exact means greedy, not
best: an order may have more than the exact one's sum, and a negative regret. What a method has to show is that regret is small beside
that of random orders.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.data.hashing import device_permutations
from oar_scale.model import AnyOrderModel
from oar_scale.orders.analysis import kendall_distance
from oar_scale.orders.extraction import Orders, extract_orders, scores_along
from oar_scale.orders.head import OrderHead, predict_ahead, predict_orders
from oar_scale.orders.selection import Images
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.results.estimates import Estimate, estimate

EXACT, RANDOM = "exact", "random"

Method = Callable[[AnyOrderModel, Tensor, Tensor, ExtractionSettings, Images], Orders]
"""(model, codes_BN, condition_BTD, settings, images_B) -> orders, with what they cost in ``Orders.rows``."""

ROUNDS = 3


@dataclass(frozen=True)
class MethodResult:
    """One method of finding orders."""

    name: str
    rows: int
    """Per image."""
    images_per_s: float
    """Median of the rounds, on the machine that measured it."""
    speed: float
    """Of the exact method's rate: median over the rounds, which share what else the machine did."""
    tau: Estimate
    regret: Estimate
    """Units of the score per code."""
    order_SN: NDArray[np.int64]
    """Of all images."""
    judged: int
    """Images that tau and regret are means of."""
    families: int
    """Of these, so many groups are independent of each other."""


def extraction_methods(settings: ExtractionSettings, grid: int, head: OrderHead | None = None) -> dict[str, Method]:
    """The methods to compare, the exact one first and random orders last.

    Args:
        settings: score, guidance, first cell, temperature and seed of all of them.
        head: an order head of the model, where there is one.
    """
    exact = replace(settings, orders_per_image=1, commit_per_step=1, cosine_steps=None, info_gain_candidates=None)
    steps = max(1, round(grid * grid * 88 / 256))  # RandAR's 88 steps for 16 x 16 cells
    methods: dict[str, Method] = {EXACT: _extraction(exact)}
    for count in (2, 4, 8):
        methods[f"{count} a step"] = _extraction(replace(exact, commit_per_step=count))
    methods[f"cosine, {steps} steps"] = _extraction(replace(exact, cosine_steps=steps))
    if settings.info_gain_candidates is not None:
        looked_at = replace(exact, info_gain_candidates=settings.info_gain_candidates)
        methods[f"{settings.info_gain_candidates} looked at"] = _extraction(looked_at)
    return methods | ({} if head is None else head_methods(head)) | {RANDOM: _random}


def head_methods(head: OrderHead) -> dict[str, Method]:
    """The two networks of an order head."""
    return {
        "order head ahead" + (f", {head.spec.first} placed" if head.spec.first else ""): _by_head(predict_ahead, head),
        "order head in hindsight": _by_head(predict_orders, head),
    }


def compare(
    model: AnyOrderModel,
    judge: AnyOrderModel,
    codes_SN: Tensor,
    cond_inputs_S: Tensor,
    settings: ExtractionSettings,
    methods: Mapping[str, Method],
    batch: int,
    images_S: Images,
    families_S: NDArray[np.int64],
    *,
    judged: Mapping[str, NDArray[np.bool_]] | None = None,
    rounds: int = ROUNDS,
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, MethodResult]:
    """Measure every method on S images, the methods alternating, so that other load of the machine affects all of them.

    Args:
        model: finds the orders, in the precision they are to be found in.
        judge: the same model in float32, which scores the orders.
        cond_inputs_S: what ``model.condition`` takes, a row for each image.
        methods: the first one is exact.
        batch: images at a time.
        families_S: the same number for images of one family, which count as one to the standard errors.
        judged: methods that are judged by some of the images only [S], those they did not learn from; the others are by all.
        rounds: how often every method is timed.
        on_done: called after each method of each round.
    """
    cuts = [slice(start, start + batch) for start in range(0, len(codes_SN), batch)]
    orders_of: dict[str, list[Orders]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with torch.no_grad():
        conditions = {finder: [finder.condition(cond_inputs_S[cut]) for cut in cuts] for finder in (model, judge)}
    for _ in range(rounds):
        for name, method in methods.items():
            started = time.perf_counter()
            orders_of[name] = [
                method(model, codes_SN[cut], rows, settings, images_S[cut]) for cut, rows in zip(cuts, conditions[model], strict=True)
            ]
            orders_of[name][-1].order_BN.cpu()  # waits for the device
            seconds[name].append(time.perf_counter() - started)
            on_done()
    worth_S = {
        name: torch.cat(
            [
                scores_along(judge, codes_SN[cut], rows, settings, orders.order_BN, images_S[cut]).double().mean(1)
                for cut, rows, orders in zip(cuts, conditions[judge], tables, strict=True)
            ]
        )
        for name, tables in orders_of.items()
    }
    order_SN = {name: torch.cat([part.order_BN for part in orders]).cpu().numpy() for name, orders in orders_of.items()}
    first, every_S = next(iter(methods)), np.ones(len(codes_SN), dtype=np.bool_)
    by = {name: (judged or {}).get(name, every_S) for name in methods}
    return {
        name: MethodResult(
            name,
            round(sum(part.rows * len(part.order_BN) for part in orders) / len(codes_SN)),
            len(codes_SN) / statistics.median(seconds[name]),
            statistics.median(exact / own for exact, own in zip(seconds[first], seconds[name], strict=True)),
            estimate(1 - 2 * kendall_distance(order_SN[name], order_SN[first])[by[name]], families_S[by[name]]),
            estimate((worth_S[first] - worth_S[name]).cpu().numpy()[by[name]], families_S[by[name]]),
            order_SN[name],
            int(by[name].sum()),
            len(np.unique(families_S[by[name]])),
        )
        for name, orders in orders_of.items()
    }


def _extraction(how: ExtractionSettings) -> Method:
    return lambda model, codes_BN, condition_BTD, settings, images_B: extract_orders(model, codes_BN, condition_BTD, how, images_B)


def _by_head(predict: Callable[[AnyOrderModel, Tensor, Tensor, OrderHead], Orders], head: OrderHead) -> Method:
    return lambda model, codes_BN, condition_BTD, settings, images_B: predict(model, codes_BN, condition_BTD, head)


def _random(model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, settings: ExtractionSettings, images_B: Images) -> Orders:
    numbers_B = torch.from_numpy(np.asarray(images_B, dtype=np.int64)).to(codes_BN.device)
    order_BN = device_permutations("random order", codes_BN.shape[1], settings.tie_seed, numbers_B)
    return Orders(order_BN, torch.zeros(codes_BN.shape, device=codes_BN.device))
