"""What drawing, evaluating and tokenizing cost, against counts by hand and those of the code that does it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import random_codes, random_orders, small_spec
from torch.utils.flop_counter import FlopCounterMode

from oar_scale.cli import sample as sample_command
from oar_scale.evaluation import eval_tasks
from oar_scale.model import AnyOrderModel, save_model
from oar_scale.model.flops import brute_force_flops, extraction_flops, forward_flops
from oar_scale.model.spec import ClassSpec
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.planning import evaluation_plan
from oar_scale.planning.evaluation_plan import DrawingCost, drawing_cost, plan_evaluation, plan_samples
from oar_scale.planning.extraction_plan import checked_order_flops
from oar_scale.planning.tokens_plan import plan_tokens
from oar_scale.stages import evaluate
from oar_scale.tokenizers.flops import decoder_flops, encoder_flops
from tests.planning.cases import case

H100 = {"gpu": "h100", "assume": ["time.extraction_mfu=0.3", "time.bandwidth_share=0.5", "time.float32_mfu=0.4"]}
LAYERS, DIM, CODES, CELLS = 24, 1024, 16384, 256
DECODING_S = 253.321281536e9 / (67e12 * 0.4)
"""Of LlamaGen's VQ-16, whose operations torch counts (tests/tokenizers/test_tokenizer_flops.py)."""


def drawn(*overrides: str, batch: int = 32) -> DrawingCost:
    return drawing_cost(case("imagenet", *overrides, **H100), batch)


def test_drawing_by_confidence_is_limited_by_computing() -> None:
    """Of size L: both branches of an extraction, the heads of both passes, and the decoder."""
    one, guided = drawn("sample.guidance=1.0"), drawn("sample.guidance=2.0")
    spec, head = case("imagenet").spec, 2 * DIM * CODES
    assert decoder_flops(case("imagenet").recipe.tokenizer.image, 16) == 253_321_281_536
    assert one.flops == extraction_flops(spec) + CELLS * head + 253_321_281_536
    assert guided.flops == extraction_flops(spec, guided=True) + CELLS * head + 253_321_281_536
    for cost in (one, guided):
        computing = (cost.flops - 253_321_281_536) / (989e12 * 0.3)
        assert cost.seconds == pytest.approx(computing + DECODING_S, rel=0.01) and cost.reading_share < 0.03


def test_a_schedule_that_starts_elsewhere_is_planned_as_guidance() -> None:
    """Its first cells are guided although its last one is not; one that begins and ends at 1 is no guidance."""
    by_schedule = ("sample.guidance=1", "sample.guidance_schedule=linear")
    assert drawn(*by_schedule, "sample.guidance_start=3") == drawn("sample.guidance=2")
    assert drawn(*by_schedule) == drawn("sample.guidance=1") != drawn("sample.guidance=2")


@pytest.mark.parametrize("batch", [1, 32])
def test_drawing_along_a_given_order_is_limited_by_memory(batch: int) -> None:
    """Each step reads the weights, and keys and values of condition, questions and codes: 1 + 2 t rows at step t, 256^2 in all."""
    cost = drawn("sample.order=raster", "sample.guidance=2.0", batch=batch)
    blocks = LAYERS * (4 * DIM * DIM + 3 * DIM * 2816 + 2 * DIM)
    weights = (CELLS + 1) * 2 * (blocks + DIM * CODES)
    cache = 2 * batch * (CELLS**2 + 1) * LAYERS * 2 * DIM * 2
    assert cost.seconds == pytest.approx((weights + cache) / (3.35e12 * 0.5) / batch + DECODING_S, rel=0.001)
    assert cost.reading_share == pytest.approx(1 - DECODING_S / cost.seconds, rel=0.01)


def test_as_many_steps_as_randar_takes_cost_less_than_half() -> None:
    """88 steps ask about 14,335 cells where one cell a step asks about 32,896."""
    one_by_one, in_88 = drawn(), drawn("sample.steps=88")
    assert in_88.flops / one_by_one.flops == pytest.approx(14_335 / 32_896, rel=0.05)


def test_a_cheaper_layout_draws_faster() -> None:
    assert 0.4 < drawn("model.layout=decoupled").flops / drawn().flops < 0.5


def test_samples_of_a_model_are_fifty_thousand_drawings() -> None:
    planned, large = plan_samples(case("imagenet", **H100)), case("imagenet", "pipeline.seeds=2", "pipeline.arms={x: {order: raster}}")
    assert planned.gpu_hours == pytest.approx(50_000 * drawn().seconds / 3600) and planned.money == pytest.approx(3 * planned.gpu_hours)
    assert planned.models == 3 and plan_samples(large).models == 1 + 2 * 3
    assert plan_samples(case("imagenet", "pipeline.control=false")).models == 2


def test_the_evaluation_is_what_its_tasks_are() -> None:
    """Drawings, orders and likelihoods shared out to all GPUs; at least as long as the task that is done by one."""
    planned = plan_evaluation(case("imagenet", "sample.guidance=2.0", images=10**6, **H100))
    spec = case("imagenet").spec
    assert planned is not None and (planned.models, planned.drawn) == (3, 5000)
    drawing, own = 3 * 5000 * drawn("sample.guidance=2.0", batch=64).seconds, 3 * 1000 * 2 * extraction_flops(spec) / (989e12 * 0.3)
    brute = 2 * (extraction_flops(spec) + brute_force_flops(spec)) / (67e12 * 0.4)
    likelihoods = (1 + 3 * 5) * 1000 * forward_flops(spec) / (67e12 * 0.4)
    assert planned.seconds == pytest.approx(60 + (drawing + own + likelihoods + brute) / 8)
    assert planned.gpu_hours == pytest.approx(8 * planned.seconds / 3600)
    few = plan_evaluation(case("imagenet", "evaluate.feature_images=8", "evaluate.nll_images=2", "sample.images=1", **H100))
    assert few is not None and few.seconds == pytest.approx(60 + brute)


def test_tokens_are_all_views_of_training_images_and_the_others_once() -> None:
    planned, recipe = plan_tokens(case("imagenet", images=990_000, **H100)), case("imagenet").recipe
    assert planned is not None and planned.encoded == 2 * 990_000 + 10_000
    assert planned.flops == encoder_flops(recipe.tokenizer.image, 16) == 139_068_440_576
    assert planned.seconds == pytest.approx(60 + planned.encoded * planned.flops / (8 * 67e12 * 0.4))


def test_a_likelihood_task_takes_as_many_passes_as_are_planned(tmp_path: Path) -> None:
    model = AnyOrderModel(small_spec(condition=ClassSpec(classes=5)))
    codes_SN, order_SN, labels_S1 = random_codes(model, 3).numpy(), random_orders(model, 3).numpy(), np.arange(3)[:, None]
    save_model(str(tmp_path / "model.safetensors"), model)
    target = eval_tasks.EvalTarget("ordered", str(tmp_path / "model.safetensors"), labels_S1)
    orders = {"random": order_SN, "raster": np.arange(9)[None].repeat(3, 0)}
    task = eval_tasks.LikelihoodTask(target, codes_SN, orders, labels_S1[::-1].copy(), ExtractionSettings(guidance=2.0), "fp32")
    with FlopCounterMode(display=False) as counter:
        task.run()
    each = evaluation_plan.NLL_PASSES * forward_flops(model.spec) + evaluation_plan.OWN_ORDERS * extraction_flops(model.spec)
    assert counter.get_total_flops() == 3 * each


@pytest.mark.parametrize(
    "how", [{}, {"guidance": 2.0, "commit_per_step": 4, "first_cell": 3}, {"score": "info_gain", "info_gain_samples": 1}]
)
def test_a_check_by_brute_force_takes_as_many_operations_as_are_planned(how: dict[str, Any], tmp_path: Path) -> None:
    model = AnyOrderModel(small_spec(condition=ClassSpec(classes=5)))
    codes_SN, order_SN = random_codes(model, 2).numpy(), random_orders(model, 2).numpy().astype(np.uint16)
    save_model(str(tmp_path / "model.safetensors"), model)
    target = eval_tasks.EvalTarget("any_order", str(tmp_path / "model.safetensors"), np.arange(2)[:, None])
    with FlopCounterMode(display=False) as counter:
        eval_tasks.BruteForceTask(target, codes_SN, order_SN, ExtractionSettings(**how), np.arange(2)).run()
    planned = replace(case("imagenet", *(f"extract.{name}={value}" for name, value in how.items())), spec=model.spec)
    assert counter.get_total_flops() == 2 * checked_order_flops(planned)


def test_the_plan_knows_the_evaluations_numbers() -> None:
    """Those that it cannot import without torch."""
    assert evaluation_plan.TASK_IMAGES == evaluate.TASK_IMAGES and evaluation_plan.BRUTE_FORCE_IMAGES == evaluate.BRUTE_FORCE_IMAGES
    assert len(eval_tasks.OWN_SCORES) == evaluation_plan.OWN_ORDERS
    parser = argparse.ArgumentParser()
    sample_command.add(parser.add_subparsers())
    assert parser.parse_args(["sample", "x"]).batch == evaluation_plan.PICTURES_AT_ONCE
