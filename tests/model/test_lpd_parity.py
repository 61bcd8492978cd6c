"""Equal to LPD's own code: logits, loss, gradients, score tables, orders and drawings, with its weights imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from parity import assert_gradient_norms, assert_score_tables, peer_case
from torch import Tensor

from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, Decoder
from oar_scale.model.lpd_weights import export_lpd
from oar_scale.model.peer_weights import import_peer
from oar_scale.orders.extraction import brute_force_orders, extract_orders, scores_along
from oar_scale.orders.settings import ExtractionSettings

NAME = "lpd_c2i"
SCORES: list[Any] = ["gt_logprob", "max_prob"]
GENERATED = [name for name in peer_case(NAME).arrays if name.startswith("gen_")]
each_grouping = pytest.mark.parametrize("grouped", [False, True], ids=["ones", "groups"])


def imported() -> tuple[AnyOrderModel, dict[str, Tensor], Tensor]:
    """The model, the recorded arrays, and the condition's rows."""
    case = peer_case(NAME)
    model = import_peer(case.tensors, "lpd", NAME, heads=case.config["decoder_num_heads"])
    return model, case.arrays, model.condition(case.arrays["cond"])


def recorded(grouped: bool) -> tuple[Sequence[int] | None, str]:
    """Cells of each step, and the end of the names of what was recorded with them."""
    return (peer_case(NAME).arrays["groups_five"].tolist(), "_grouped") if grouped else (None, "")


@torch.no_grad()
@each_grouping
def test_logits_equal_lpds(grouped: bool) -> None:
    model, arrays, condition = imported()
    groups, end = recorded(grouped)
    logits = model(arrays["idx"], arrays["order"], condition, groups)
    torch.testing.assert_close(logits, arrays[f"logits{end}"], rtol=0, atol=5e-5)


@each_grouping
def test_loss_and_gradient_norms_equal_lpds(grouped: bool) -> None:
    model, arrays, condition = imported()
    groups, end = recorded(grouped)
    loss, nll = model.loss(arrays["idx"], arrays["order"], condition, groups)
    for mean in (loss, nll.mean(), model.nll(arrays["idx"], arrays["order"], condition, groups).mean()):
        torch.testing.assert_close(mean, arrays[f"loss{end}"], rtol=0, atol=1e-5)
    loss.backward()
    assert_gradient_norms(model, imported()[0], export_lpd, peer_case(NAME).metadata[f"grad_norms{end}"])


@torch.no_grad()
@pytest.mark.parametrize("score", SCORES)
def test_all_cells_score_as_by_brute_force_with_lpds_code(score: Any) -> None:
    model, arrays, condition = imported()
    assert_score_tables(model, arrays, condition, score)


@torch.no_grad()
@pytest.mark.parametrize("score", SCORES)
def test_extracted_orders_equal_brute_force_with_lpds_code(score: Any) -> None:
    model, arrays, condition = imported()
    order, settings = arrays[f"exact_order_{score}"], ExtractionSettings(score=score)
    for find in (extract_orders, brute_force_orders):
        found = find(model, arrays["idx"], condition, settings)
        assert torch.equal(found.order_BN, order), find
        torch.testing.assert_close(found.score_BN, arrays[f"exact_score_{score}"], rtol=0, atol=5e-5)
    along = scores_along(model, arrays["idx"], condition, settings, order)
    torch.testing.assert_close(along, arrays[f"exact_score_{score}"], rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATED)
def test_greedy_generation_equals_lpds(name: str) -> None:
    """Every recorded grouping; ``gen_five_cfg4.0-linear`` says the groups ``five``, and a scale that grows towards 4 with each cell."""
    model, arrays, condition = imported()
    tag, kind = name.removeprefix("gen_").split("_cfg")
    scale, shape = kind.split("-")
    drawn = steps_of_lpd(model, condition, arrays["order"], arrays[f"groups_{tag}"].tolist(), float(scale), shape == "linear")
    assert torch.equal(drawn, arrays[name])


def steps_of_lpd(model: AnyOrderModel, condition: Tensor, order: Tensor, groups: list[int], scale: float, linear: bool) -> Tensor:
    """The likeliest codes [B, N] in raster order, placed as LPD's sampler does: a scale for each cell, and at 1 one branch alone."""
    (batch, cells), guided = order.shape, scale != 1
    decoder, codes = Decoder(model), torch.zeros_like(order)
    prefix = decoder.begin(torch.cat([condition, model.null_condition(batch)]) if guided else condition)
    scales = 1 + (scale - 1) * torch.arange(cells) / cells if linear else torch.full((cells,), scale)
    for cells_BM, scale_M in zip(order.split(groups, dim=1), scales.split(groups), strict=True):
        cells_GM = cells_BM.repeat(1 + guided, 1)
        branches = model.output(decoder.parallel_rows(prefix, cells_GM)).float().chunk(1 + guided)
        logits = branches[-1] + scale_M[:, None] * (branches[0] - branches[-1])
        best = (logits if guided else branches[0]).argmax(-1)
        codes.scatter_(1, cells_BM, best)
        prefix = decoder.place_parallel(prefix, cells_GM, best.repeat(1 + guided, 1))
    return codes


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_one_by_one_our_sampler_draws_what_lpds_draws(scale: float) -> None:
    model, arrays, condition = imported()
    settings = SampleSettings(guidance=scale, temperature=1.0, top_k=1, order_temperature=0.0)
    drawn = generate(model, condition, settings, 0, order_BN=arrays["order"])
    assert torch.equal(drawn.codes_BN, arrays["gen_ones_cfg1.0-linear" if scale == 1 else "gen_ones_cfg3.5-constant"])


@torch.no_grad()
def test_group_by_group_the_logits_are_those_of_the_whole_image() -> None:
    """Placed in groups, with known cells one by one before them: all logits equal one pass over the image with these groups."""
    model, arrays, condition = imported()
    order, codes = arrays["order"], arrays["idx"].gather(1, arrays["order"])
    known, groups = 3, [3, 1, 5, 1, 3]
    whole = model(arrays["idx"], order, condition, [1] * known + groups)
    decoder = Decoder(model)
    prefix = decoder.prefill(decoder.begin(condition), order[:, :known], codes[:, :known])
    start = known
    for size in groups:
        step = slice(start, start + size)
        logits = model.output(decoder.parallel_rows(prefix, order[:, step])).float()
        torch.testing.assert_close(logits, whole[:, step], rtol=0, atol=5e-5)
        prefix = decoder.place_parallel(prefix, order[:, step], codes[:, step])
        start += size


@pytest.mark.parametrize("groups", [[], [15], [16, 1], [0, 16], [-1, 17]])
def test_groups_that_are_not_all_cells_are_refused(groups: list[int]) -> None:
    model, arrays, condition = imported()
    with pytest.raises(ValueError, match="sum to 16, the cells of the order"):
        model(arrays["idx"], arrays["order"], condition, groups)
