"""Equal to the peers' own code: logits, loss, gradients and orders of RandAR and LlamaGen, with their weights imported."""

from __future__ import annotations

import pytest
import torch
from parity import peer_case

from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel
from oar_scale.model.peer_weights import Family, import_peer
from oar_scale.orders.extraction import brute_force_orders, extract_orders
from oar_scale.orders.settings import ExtractionSettings

CASES: list[tuple[str, Family]] = [("randar_c2i", "randar"), ("llamagen_c2i", "llamagen-c2i"), ("llamagen_t2i", "llamagen-t2i")]


def imported(name: str, family: Family) -> tuple[AnyOrderModel, dict[str, torch.Tensor]]:
    case = peer_case(name)
    model = import_peer(
        case.tensors,
        family,
        name,
        grid=round(case.config["block_size"] ** 0.5),
        heads=case.config["n_head"],
        text_rows=case.config.get("cls_token_num", 1),
    )
    arrays = case.arrays
    arrays.setdefault("order", torch.arange(case.config["block_size"]).expand_as(arrays["idx"]))
    return model, arrays


@torch.no_grad()
@pytest.mark.parametrize(("name", "family"), CASES)
def test_logits_equal_the_peers(name: str, family: Family) -> None:
    model, arrays = imported(name, family)
    logits = model(arrays["idx"], arrays["order"], model.condition(arrays["cond"]))
    torch.testing.assert_close(logits, arrays["logits"], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "family"), CASES)
def test_in_bfloat16_log_probabilities_stay_near_the_peers(name: str, family: Family) -> None:
    # Logits of these random weights reach 8, and bfloat16 has 8 bits: two layers of its rounding move a log-probability
    # by 0.03 nats on average here, and by 0.3 at most; a wrong rotation or mask moves them by 1 and more.
    model, arrays = imported(name, family)
    half = model.to(torch.bfloat16)
    logits = half(arrays["idx"], arrays["order"], half.condition(arrays["cond"])).float()
    difference = (logits.log_softmax(-1) - arrays["logits"].log_softmax(-1)).abs()
    assert difference.mean() < 0.06
    assert difference.max() < 0.5


def test_loss_and_gradient_norms_equal_randars() -> None:
    model, arrays = imported("randar_c2i", "randar")
    loss, nll = model.loss(arrays["idx"], arrays["order"], model.condition(arrays["cond"]))
    torch.testing.assert_close(loss, arrays["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll.mean(), arrays["loss"], rtol=1e-5, atol=1e-5)
    loss.backward()
    recorded = peer_case("randar_c2i").metadata["grad_norms"]
    theirs = {"cls_embedding": "conditioner", "pos_instruct_embeddings": "layout.pos_instruct_embeddings"}
    for name, norm in recorded.items():
        first, dot, rest = name.partition(".")
        gradient = model.get_parameter(theirs.get(first, first) + dot + rest).grad
        assert gradient is not None
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4), name
    assert len(recorded) == len(list(model.parameters()))


@pytest.mark.parametrize("score", ["gt_logprob", "max_prob"])
def test_extracted_orders_equal_brute_force_with_randars_code(score: str) -> None:
    model, arrays = imported("randar_c2i", "randar")
    with torch.no_grad():
        condition = model.condition(arrays["cond"])
    settings = ExtractionSettings(score=score)  # type: ignore[arg-type]
    for result in (
        extract_orders(model, arrays["idx"], condition, settings),
        brute_force_orders(model, arrays["idx"], condition, settings),
    ):
        assert torch.equal(result.order_BN.long(), arrays[f"exact_order_{score}"])
        torch.testing.assert_close(result.score_BN, arrays[f"exact_score_{score}"], rtol=0, atol=1e-4)


GENERATED = [name for name in peer_case("randar_c2i").arrays if name.startswith("gen_")]


@pytest.mark.parametrize("name", GENERATED)
def test_greedy_generation_equals_randars(name: str) -> None:
    """Every recorded number of parallel steps and guidance schedule; ``gen_steps5_cfg1.0-4.0`` says 5 steps, scales 1 to 4."""
    model, arrays = imported("randar_c2i", "randar")
    steps, scales = name.removeprefix("gen_steps").split("_cfg")
    start, _, end = scales.partition("-")
    settings = SampleSettings(
        guidance=float(end),
        guidance_schedule="linear",
        guidance_start=float(start),
        temperature=1.0,
        top_k=1,
        order_temperature=0.0,
        steps=None if steps == "-1" else int(steps),
    )
    with torch.no_grad():
        drawn = generate(model, model.condition(arrays["cond"]), settings, 0, order_BN=arrays["order"])
    assert torch.equal(drawn.codes_BN, arrays[name])
