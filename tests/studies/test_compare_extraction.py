"""``oar extract --compare``: the figures are those of the definitions, and they reach the console and the file."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from small_models import random_codes, random_text, small_model
from small_run import prepare_small_run, small_recipe
from torch import Tensor

from oar_scale.config.schema import Recipe
from oar_scale.data.manifest import read_manifest
from oar_scale.errors import UserError
from oar_scale.evaluation.distances import Kid
from oar_scale.model import AnyOrderModel, load_model, save_model
from oar_scale.observe.console import Console
from oar_scale.orders.extraction import Orders, extract_orders
from oar_scale.orders.head import HeadSpec, OrderHead
from oar_scale.orders.selection import Images
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.run.artifacts import read_tokens
from oar_scale.run.context import Run
from oar_scale.storage import open_storage
from oar_scale.studies import compare_extraction as stage
from oar_scale.studies.extraction_methods import EXACT, RANDOM, ROUNDS, Method, compare, extraction_methods, head_methods
from oar_scale.studies.short_training import ShortTraining, TrainingOutcome
from oar_scale.training.inputs import job_prompts, job_stream
from oar_scale.training.job import TrainingJob


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose any-order model has opinions."""
    recipe = small_recipe(str(tmp_path_factory.mktemp("small")), evaluate={"nll_images": 8, "feature_images": 8}, extract={"batch": 8})
    run = Run(prepare_small_run(recipe).recipe, Console(io.StringIO()))
    model = load_model(run.model_uri("base"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    save_model(run.model_uri("any_order"), model)
    return run


def backwards(model: AnyOrderModel, codes_BN: Tensor, condition_BTD: Tensor, settings: ExtractionSettings, images_B: Images) -> Orders:
    comparison = extract_orders(model, codes_BN, condition_BTD, settings, images_B)
    return Orders(comparison.order_BN.flip(1), comparison.score_BN.flip(1), rows=7)


def test_one_image_has_no_standard_error(run: Run) -> None:
    with pytest.raises(UserError, match="--images 1: figures have standard errors over images, which need at least 2"):
        stage.run_compare(run, images=1)


@torch.no_grad()
def test_the_figures_are_what_their_names_say() -> None:
    model, settings = small_model(grid=3), ExtractionSettings(score="gt_logprob", tie_seed=2)
    codes, text, images = random_codes(model, 5), random_text(model, 5), np.arange(5) + 40
    methods = extraction_methods(settings, 3) | {"backwards": backwards}
    done: list[None] = []
    compared = compare(model, model, codes, text, settings, methods, 2, images, images, on_done=lambda: done.append(None))
    assert len(done) == ROUNDS * len(methods)
    exact = extract_orders(model, codes, model.condition(text), settings, images)
    assert np.array_equal(compared[EXACT].order_SN, exact.order_BN.numpy())
    assert (compared[EXACT].tau.mean, compared[EXACT].regret.mean, compared[EXACT].rows, compared[EXACT].speed) == (1.0, 0.0, 45, 1.0)
    assert (compared["backwards"].tau.mean, compared["backwards"].rows) == (-1.0, 7)
    likelihood = {
        name: -model.nll(codes, torch.from_numpy(compared[name].order_SN), model.condition(text)).double().mean(1)
        for name in (EXACT, RANDOM)
    }
    assert compared[RANDOM].regret.mean == pytest.approx(float((likelihood[EXACT] - likelihood[RANDOM]).mean()), abs=1e-5)
    assert abs(compared[RANDOM].tau.mean) < 0.5 and compared[RANDOM].rows == 0
    for name, each in compared.items():
        assert each.images_per_s > 0
        assert np.array_equal(np.sort(each.order_SN, axis=1), np.arange(9)[None].repeat(5, 0)), name
        assert name in (EXACT, RANDOM, "backwards") or 0 < each.rows <= 45


@torch.no_grad()
def test_errors_of_methods_are_those_of_means_over_families() -> None:
    model, settings, images = small_model(grid=3), ExtractionSettings(score="gt_logprob"), np.arange(8)
    codes, text, families_S = random_codes(model, 8), random_text(model, 8), np.array([5, 1, 1, 5, 0, 0, 7, 7])
    methods = {name: method for name, method in extraction_methods(settings, 3).items() if name in (EXACT, RANDOM)}
    by_family = compare(model, model, codes, text, settings, methods, 8, images, families_S, rounds=1)
    exact_S, random_S = (
        model.nll(codes, torch.from_numpy(by_family[name].order_SN), model.condition(text)).double().mean(1).numpy() for name in methods
    )
    means_F = [(random_S - exact_S)[families_S == family].mean() for family in (0, 1, 5, 7)]
    assert by_family[RANDOM].regret.standard_error == pytest.approx(stats.sem(means_F), rel=1e-3)
    times = [by_family[name].order_SN.argsort(1) for name in methods]
    tau_S = np.array([stats.kendalltau(*pair).statistic for pair in zip(*times, strict=True)])
    assert by_family[RANDOM].tau.standard_error == pytest.approx(stats.sem([tau_S[families_S == each].mean() for each in (0, 1, 5, 7)]))
    assert (by_family[RANDOM].judged, by_family[RANDOM].families) == (8, 4)


def test_errors_after_trainings_are_those_of_means_over_families() -> None:
    families_S, images = np.array([0, 0, 1, 1, 2, 2]), np.random.default_rng(0).normal(4, 1, (2, 2, 6))
    here, exact = (TrainingOutcome(own_S, random_S, families_S, Kid(0.0, 0.0, 1)) for own_S, random_S in images)
    figures = here.figures(exact)
    for at, name in enumerate(("own_max_prob", "random")):
        means_F, above_F = (each.reshape(3, 2).mean(1) for each in (images[0, at], images[0, at] - images[1, at]))
        assert figures[f"heldout_nll_{name}"] == pytest.approx({"mean": means_F.mean(), "standard_error": stats.sem(means_F)})
        assert figures[f"heldout_nll_{name}_above_exact"] == pytest.approx({"mean": above_F.mean(), "standard_error": stats.sem(above_F)})


@torch.no_grad()
def test_an_order_head_is_judged_by_images_it_has_not_seen() -> None:
    """An order head takes part and is judged by what it has not seen."""
    model, settings = small_model(grid=3), ExtractionSettings()
    head = OrderHead(HeadSpec.of(model.spec, "m", width=8, first=2)).eval()
    codes, text, images = random_codes(model, 6), random_text(model, 6), np.arange(6)
    methods = {EXACT: extraction_methods(settings, 3)[EXACT], **head_methods(head)}
    assert list(methods) == [EXACT, "order head ahead, 2 placed", "order head in hindsight"]
    assert list(extraction_methods(settings, 3, head))[-3:-1] == list(methods)[1:]
    unseen = np.array([True, False, False, True, True, False])
    comparison = compare(
        model, model, codes, text, settings, methods, 4, images, images // 2, judged=dict.fromkeys(head_methods(head), unseen), rounds=1
    )
    alone = compare(model, model, codes[unseen], text[unseen], settings, methods, 4, images[unseen], images[unseen], rounds=1)
    assert {name: each.judged for name, each in comparison.items()} == dict.fromkeys(head_methods(head), 3) | {EXACT: 6}
    assert {name: each.families for name, each in comparison.items()} == dict.fromkeys(head_methods(head), 3) | {EXACT: 3}
    for name in head_methods(head):
        assert comparison[name].rows == 9
        assert comparison[name].tau.mean == pytest.approx(alone[name].tau.mean) and comparison[name].order_SN.shape == (6, 9)
        assert comparison[name].regret.mean == pytest.approx(alone[name].regret.mean, abs=1e-6)


def test_the_methods_keep_the_recipes_other_settings() -> None:
    """A recipe that already takes a short cut is compared with exact orders, not with itself."""
    model = small_model(grid=3)
    codes, rows = random_codes(model, 2), model.null_condition(2)
    settings = ExtractionSettings(score="margin", first_cell=4, commit_per_step=2)
    order = extraction_methods(settings, 3)[EXACT](model, codes, rows, settings, np.arange(2)).order_BN
    assert torch.equal(order, extract_orders(model, codes, rows, ExtractionSettings(score="margin", first_cell=4)).order_BN)


def test_the_comparison_is_printed_and_written(run: Run, tmp_path: Path) -> None:
    report = stage.run_compare(run, images=5, out=str(tmp_path / "compared.json"))
    assert report == json.loads((tmp_path / "compared.json").read_text())
    assert (report["images"], report["score"], report["precision"], report["device"]) == (5, "max_prob", "bf16", "cpu")
    exact, *_, worst = report["ways"]
    assert (exact["way"], exact["rows"], exact["kendall_tau"]["mean"]) == ("exact", 64 * 65 // 2, 1.0)
    assert worst["way"] == "random"
    assert worst["regret"]["mean"] > 0 and worst["judged_by_images"] == 5
    assert worst["judged_by_families"] == len(set(read_tokens(run, "train", 5).family_names))
    stream = run.console._stream  # type: ignore[attr-defined]
    assert isinstance(stream, io.StringIO)
    printed = stream.getvalue()
    for row in report["ways"]:
        assert f"  {row['way']} " in printed


def test_a_short_training_follows_the_tables_whatever_the_recipe_follows(run: Run, tmp_path: Path) -> None:
    """Along one order for all images every method would come out the same."""
    finetune = run.recipe.finetune.model_copy(update={"order": "halton", "orders_of": "other_images", "distinct_orders": 3})
    other = Run(run.recipe.model_copy(update={"finetune": finetune}), run.console)
    shards = read_manifest(run.at("tokens", "train")).shards
    short = ShortTraining(other, run.model_uri("any_order"), shards, [], 2, str(tmp_path)).recipe.finetune
    assert (short.order, short.orders_of, short.distinct_orders) == (None, "own", None)


def test_a_short_training_follows_orders_in_the_one_view_that_has_some(run: Run, tmp_path: Path) -> None:
    """In the run all views have orders, so that any of them may be taken where one is followed."""
    finetune = run.recipe.finetune.model_copy(update={"random_share": 0.1, "any_view_share": 0.5})
    extract = run.recipe.extract.model_copy(update={"views": 2})
    other = Run(Recipe.model_validate(run.recipe.model_copy(update={"finetune": finetune, "extract": extract}).model_dump()), run.console)
    shards = read_manifest(run.at("tokens", "train")).shards
    training = ShortTraining(other, run.model_uri("any_order"), shards, read_tokens(run, "train").keys, 2, str(tmp_path))
    training._write_tables(np.tile(np.arange(64, dtype=np.uint16)[::-1], (len(training.keys), 1)), str(tmp_path / "orders" / "train"))
    job = TrainingJob(training.recipe, "finetune", str(tmp_path), str(tmp_path), run.model_uri("any_order"), "")
    batches = list(job_stream(job, job_prompts(job), 0, 1).batches(0, 20))
    share = torch.cat([batch.fixed_b for batch in batches]).double().mean()
    assert 0.8 < share < 1


@pytest.mark.slow
def test_each_method_is_trained_on_and_the_run_stays_as_it_was(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way is trained on and the run is left as it was."""

    def two(*args: Any) -> dict[str, Method]:
        return {name: method for name, method in extraction_methods(*args).items() if name in (EXACT, RANDOM)}

    monkeypatch.setattr(stage, "extraction_methods", two)
    before = sorted(open_storage(run.at()).list(run.at()))
    report = stage.run_compare(run, images=5, finetune=2)
    assert report["images"] == 16  # a shard
    for row in report["ways"]:
        assert 0 < row["heldout_nll_own_max_prob"]["mean"] < row["heldout_nll_random"]["mean"] + 1
        assert row["kid_efflite0"] == pytest.approx(row["kid_efflite0"])
    exact, random = report["ways"]
    assert exact["heldout_nll_own_max_prob_above_exact"] == {"mean": 0.0, "standard_error": 0.0}
    for name in ("heldout_nll_own_max_prob", "heldout_nll_random"):
        above = random[f"{name}_above_exact"]
        assert above["mean"] == pytest.approx(random[name]["mean"] - exact[name]["mean"]) != 0
        assert 0 < above["standard_error"] < random[name]["standard_error"], "paired"
    assert sorted(open_storage(run.at()).list(run.at())) == before


def test_looking_at_few_cells_is_a_method_of_its_own() -> None:
    """Score info_gain is exact where it looks at all cells, and with every other method, too."""
    few = ExtractionSettings(score="info_gain", info_gain_candidates=5)
    everywhere = replace(few, info_gain_candidates=None)
    assert extraction_methods(few, 3).keys() - extraction_methods(everywhere, 3).keys() == {"5 looked at"}
