"""Tables and sentences of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import random_codes, random_text, small_model

from oar_scale.data.hashing import image_numbers
from oar_scale.evaluation import eval_tasks
from oar_scale.evaluation import result_tables as summary
from oar_scale.evaluation.distances import kid_difference
from oar_scale.evaluation.eval_tasks import BruteForce, BruteForceTask, EvalTarget, Likelihoods, LikelihoodTask
from oar_scale.model import AnyOrderModel, save_model
from oar_scale.orders.extraction import Orders, extract_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.results.estimates import estimate


def test_tasks_that_end_in_any_order_give_the_images_in_theirs() -> None:
    """Pieces that end in any order give the images in theirs."""
    result = [Likelihoods("ordered", first, {"random": np.array([first, first + 1.0])}) for first in (2, 0, 4)]
    assert summary.per_image(result)["ordered"]["random"].tolist() == [0, 1, 2, 3, 4, 5]


def test_images_of_one_family_count_as_one_to_a_standard_error() -> None:
    """Three copies of each image tell as much as one of each; a family of its own for each image changes nothing."""
    rng = np.random.default_rng(0)
    values, families = rng.normal(size=20), np.repeat(np.arange(20), 3)
    copies = estimate(np.repeat(values, 3), families)
    assert (copies.mean, copies.standard_error) == pytest.approx((values.mean(), values.std(ddof=1) / 20**0.5))
    assert estimate(np.repeat(values, 3)).standard_error < 0.6 * copies.standard_error
    assert estimate(values, np.arange(20)) == estimate(values) == estimate(values, np.zeros(20))

    orders = ("random", "own max_prob", "own gt_logprob")
    nll: summary.PerImage = {
        model: {order: torch.from_numpy(np.repeat(rng.normal(size=20), 3)) for order in orders} for model in ("ordered", "control")
    }
    table = summary.likelihood_table(nll, families)
    assert (table.images, table.families) == (60, 20)
    assert table.entries[0].nll == estimate(nll["ordered"]["random"].numpy(), families)
    difference = nll["ordered"]["random"] - nll["control"]["random"]
    assert [each.difference for each in table.differences if each.order == "random"] == [estimate(difference.numpy(), families)]

    x, y, z = (np.repeat(rng.normal(size=(20, 4)) + shift, 3, axis=0).astype(np.float32) for shift in (0.5, 0.0, 0.0))
    plain, clustered = kid_difference(x, y, z), kid_difference(x, y, z, families)
    assert clustered.mean == plain.mean and clustered.standard_error > 1.5 * plain.standard_error

    some = families < 10
    compared = summary.ComparedFeatures(z, families, {"ordered": x, "control": y}, {}).of(some)
    models = {**nll, "base": nll["control"], "any_order": nll["ordered"]}
    group = summary.image_group(
        "novel", {m: {o: nll_S[some] for o, nll_S in row.items()} for m, row in models.items()}, families[some], compared, 0
    )
    assert (group.nll.images, group.nll.families, group.calibration) == (30, 10, ())
    assert group.pretrain is not None and group.pretrain.difference == estimate(difference.numpy()[some], families[some])
    assert [each.kid for each in group.distance_differences] == [kid_difference(x[some], y[some], z[some], families[some])]


def test_raster_order_has_distance_0_and_the_cells_as_steps() -> None:
    """Raster order is at distance 0 and its steps are the cells."""
    raster = np.arange(16, dtype=np.uint16)[None]
    assert summary.raster_distance(raster) == 0
    assert summary.raster_distance(raster[:, ::-1]) == 1
    assert summary.mean_steps(raster).ravel().tolist() == list(range(16))


@pytest.mark.parametrize(("equal", "message"), [(2, "all 2 orders are equal"), (1, "1 of 2 orders are equal")])
def test_the_comparison_with_brute_force_is_told_as_it_came_out(equal: int, message: str) -> None:
    assert message in summary.brute_force_text(BruteForce(2, equal, 1e-6, 0.0))


@pytest.mark.parametrize("how", [{"score": "sampled"}, {"first_cell": "random"}, {"order_temperature": 0.5}])
def test_orders_that_noise_decides_are_checked_with_the_noise_of_the_pool(how: dict[str, Any], tmp_path: Path) -> None:
    model = small_model()
    save_model(f"{tmp_path}/model.safetensors", model)
    codes, text, numbers = random_codes(model, 3), random_text(model, 3), image_numbers(["a", "b", "c"])
    settings = ExtractionSettings(**how)
    with torch.no_grad():
        stored = extract_orders(model, codes, model.condition(text), settings, numbers).order_BN.numpy().astype(np.uint16)
    target = EvalTarget("any_order", f"{tmp_path}/model.safetensors", text.numpy())
    assert BruteForceTask(target, codes.numpy(), stored, settings, numbers).run().stored_distance == 0


@pytest.mark.parametrize("score", ["sampled", "info_gain"])
def test_a_run_with_several_orders_an_image_is_evaluated(score: Any, tmp_path: Path) -> None:
    """A model's own order is one, whatever number the extraction finds."""
    model = small_model()
    save_model(f"{tmp_path}/model.safetensors", model)
    codes_SN, target = random_codes(model, 2).numpy(), EvalTarget("ordered", f"{tmp_path}/model.safetensors", random_text(model, 2).numpy())
    orders, own = np.arange(9)[None].repeat(2, 0), ExtractionSettings(score=score, orders_per_image=2)
    found = LikelihoodTask(target, codes_SN, {"raster": orders}, own=own, precision="fp32").run()
    assert {"own max_prob", "own gt_logprob"} <= found.nll.keys()
    BruteForceTask(target, codes_SN, orders.astype(np.uint16), own, np.arange(2)).run()


def test_the_gap_to_brute_force_is_at_the_first_other_choice(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extraction that takes the cells of the first image backwards is found out at its first step."""
    model = small_model()
    save_model(f"{tmp_path}/model.safetensors", model)
    codes, text = random_codes(model, 2), random_text(model, 2)

    def backwards(model: AnyOrderModel, *args: object) -> Orders:
        right = extract_orders(model, *args)  # type: ignore[arg-type]
        order, score = right.order_BN.clone(), right.score_BN.clone()
        order[0], score[0] = order[0].flip(0), score[0] - torch.arange(1, 10)
        return Orders(order, score)

    with torch.no_grad():
        exact = extract_orders(model, codes, model.condition(text), ExtractionSettings()).order_BN.numpy().astype(np.uint16)
    stored = np.stack([exact[0], exact[1, ::-1]])
    target = EvalTarget("any_order", f"{tmp_path}/model.safetensors", text.numpy())
    task = BruteForceTask(target, codes.numpy(), stored, ExtractionSettings(), np.arange(2))
    assert task.run() == BruteForce(2, 2, 0.0, 0.5)  # the second stored order is the exact one backwards
    monkeypatch.setattr(eval_tasks, "extract_orders", backwards)
    result = task.run()
    assert (result.images, result.equal) == (2, 1)
    assert result.gap == pytest.approx(1.0, abs=1e-4)
