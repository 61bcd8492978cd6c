"""Equal to ARPG's own code: logits, loss, gradients, score tables, orders and drawings, with its weights imported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import assert_gradient_norms, assert_score_tables, peer_case
from torch import Tensor

from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, Decoder, Prefix
from oar_scale.model.arpg_weights import export_arpg
from oar_scale.model.peer_weights import import_peer
from oar_scale.orders.extraction import brute_force_orders, extract_orders, scores_along
from oar_scale.orders.selection import CounterRNG
from oar_scale.orders.settings import ExtractionSettings

NAME = "arpg_c2i"
SCORES: list[Any] = ["gt_logprob", "max_prob"]
GENERATED = [name for name in peer_case(NAME).arrays if name.startswith("gen_") and name != "gen_order"]


def imported() -> tuple[AnyOrderModel, dict[str, Tensor], Tensor]:
    """The model, the recorded arrays, and the condition's rows."""
    case = peer_case(NAME)
    model = import_peer(case.tensors, "arpg", NAME, grid=round(case.config["block_size"] ** 0.5), heads=case.config["n_head"])
    return model, case.arrays, model.condition(case.arrays["cond"])


@torch.no_grad()
def test_logits_equal_arpgs() -> None:
    model, arrays, condition = imported()
    torch.testing.assert_close(model(arrays["idx"], arrays["order"], condition), arrays["logits"], rtol=0, atol=5e-5)


def test_loss_and_gradient_norms_equal_arpgs() -> None:
    model, arrays, condition = imported()
    loss, nll = model.loss(arrays["idx"], arrays["order"], condition)
    torch.testing.assert_close(loss, arrays["loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(nll.mean(), arrays["loss"], rtol=0, atol=1e-5)
    loss.backward()
    assert_gradient_norms(model, imported()[0], export_arpg, peer_case(NAME).metadata["grad_norms"])


@torch.no_grad()
@pytest.mark.parametrize("score", SCORES)
def test_all_cells_score_as_by_brute_force_with_arpgs_code(score: Any) -> None:
    model, arrays, condition = imported()
    assert_score_tables(model, arrays, condition, score)


@torch.no_grad()
@pytest.mark.parametrize("score", SCORES)
def test_extracted_orders_equal_brute_force_with_arpgs_code(score: Any) -> None:
    """From the cell on that was recorded as the first one: it is one of a tie."""
    model, arrays, condition = imported()
    order = arrays[f"exact_order_{score}"]
    for image in range(len(order)):
        settings = ExtractionSettings(score=score, first_cell=int(order[image, 0]))
        for find in (extract_orders, brute_force_orders):
            found = find(model, arrays["idx"][image, None], condition[image, None], settings)
            assert torch.equal(found.order_BN[0], order[image]), find
            torch.testing.assert_close(found.score_BN[0], arrays[f"exact_score_{score}"][image], rtol=0, atol=5e-5)
    along = scores_along(model, arrays["idx"], condition, ExtractionSettings(score=score), order)
    torch.testing.assert_close(along, arrays[f"exact_score_{score}"], rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("score", SCORES)
def test_the_seed_breaks_the_tie_of_the_blind_first_step(score: Any, dtype: torch.dtype) -> None:
    """All cells tie in max_prob, and in gt_logprob all that hold the likeliest code: the winner has the highest rank among them."""
    model, arrays, _ = imported()
    model, codes = model.to(dtype), arrays["idx"]
    condition = model.condition(arrays["cond"])
    own = model(codes, arrays["order"], condition)[:, 0].float().gather(1, codes)  # one distribution for all cells
    tied = own >= own.amax(1, keepdim=True) - 1e-6 if score == "gt_logprob" else torch.ones_like(codes, dtype=torch.bool)
    firsts = []
    for seed in range(6):
        rank = CounterRNG.of(seed, torch.arange(len(codes)).numpy(), 0, model.spec.cells, codes.device).ties()
        expected = rank.masked_fill(~tied, -1).argmax(1)
        for guidance in (1.0, 2.0) if score == "max_prob" else (1.0,):
            settings = ExtractionSettings(score=score, tie_seed=seed, guidance=guidance, commit_per_step=16)  # one step
            found = extract_orders(model, codes, condition, settings).order_BN[:, 0]
            assert torch.equal(found, expected)
        assert torch.equal(
            brute_force_orders(model, codes, condition, ExtractionSettings(score=score, tie_seed=seed, commit_per_step=16)).order_BN[:, 0],
            found,
        )
        firsts.append(tuple(found.tolist()))
    assert len(set(firsts)) > 1 or int(tied.sum(1).max()) == 1


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATED)
def test_greedy_generation_equals_arpgs(name: str) -> None:
    """Every recorded schedule; ``gen_arccos8_cfg4.0-linear`` says 8 steps, and a scale that grows to 4 with the cells *after* a step."""
    model, arrays, condition = imported()
    schedule, kind = name.removeprefix("gen_").split("_cfg")
    scale, shape = kind.split("-")
    drawn = steps_of_arpg(model, condition, arrays["gen_order"], arrays[f"groups_{schedule}"].tolist(), float(scale), shape == "linear")
    assert torch.equal(drawn, arrays[name])


def steps_of_arpg(model: AnyOrderModel, condition: Tensor, order_N: Tensor, groups: list[int], scale: float, linear: bool) -> Tensor:
    """The likeliest codes [B, N] in raster order, placed as ARPG's sampler does: both branches at any scale, one scale for a step."""
    batch = len(condition)
    decoder, codes = Decoder(model), torch.zeros(batch, model.spec.cells, dtype=torch.long)
    prefix: Prefix = decoder.begin(torch.cat([condition, model.null_condition(batch)]))
    placed = 0
    for cells in order_N.split(groups):
        placed += len(cells)
        guidance = 1 + (scale - 1) * placed / len(order_N) if linear else scale
        cells_GM = cells.expand(2 * batch, -1)
        with_condition, without = model.output(decoder.parallel_rows(prefix, cells_GM)).float().chunk(2)
        best = (without + guidance * (with_condition - without)).argmax(-1)
        codes[:, cells] = best
        prefix = decoder.place_parallel(prefix, cells_GM, torch.cat([best, best]))
    return codes


@torch.no_grad()
def test_one_by_one_our_sampler_draws_what_arpgs_draws() -> None:
    model, arrays, condition = imported()
    settings = SampleSettings(guidance=3.5, temperature=1.0, top_k=1, order_temperature=0.0)
    drawn = generate(model, condition, settings, 0, order_BN=arrays["gen_order"].expand(len(condition), -1))
    assert torch.equal(drawn.codes_BN, arrays["gen_arccos16_cfg3.5-constant"])


@torch.no_grad()
def test_codes_of_one_step_see_one_another_in_arpgs_sampler_alone() -> None:
    """With our own models a step's codes enter one after the other, as in training: then the steps do not matter to what comes after."""
    model, arrays, condition = imported()
    causal = import_peer(peer_case(NAME).tensors, "arpg", NAME, grid=4, heads=4)
    causal.spec = model.spec.model_copy(update={"step_attention": "causal"})
    order, codes = arrays["order"], arrays["idx"].gather(1, arrays["order"])
    whole = model(arrays["idx"], order, condition)
    for each, same in ((causal, True), (model, False)):
        decoder = Decoder(each)
        prefix = decoder.begin(condition)
        for start in (0, 4, 9):
            step = slice(start, {0: 4, 4: 9, 9: 15}[start])
            decoder.parallel_rows(prefix, order[:, step])
            prefix = decoder.place_parallel(prefix, order[:, step], codes[:, step])
        last = decoder.candidate_rows(prefix, order[:, 15:]).logits_BRV[:, 0]
        assert torch.allclose(last, whole[:, 15], rtol=0, atol=1e-4) is same
