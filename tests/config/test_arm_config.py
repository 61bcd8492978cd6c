"""Which stages, models and files the arms and seeds of a recipe have, and which arms are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from oar_scale.config.arms import FROM_EXTRACTION
from oar_scale.config.loading import dump_recipe, load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.launch.job_specs import plan_jobs
from oar_scale.orders.order_files import run_files
from oar_scale.orders.policies import known, policy
from oar_scale.registry import EXTRACTION, STAGES, kind_of, stage_of_name
from oar_scale.run.stage_markers import stage_fingerprint, stage_settings

ARMS: dict[str, Any] = {
    "gt": {"extract": {"score": "gt_logprob"}},
    "gt_half": {"extract": {"score": "gt_logprob"}, "random_share": 0.5},
    "same": {"extract": {"score": "max_prob"}, "random_share": 0.0},
    "raster": {"order": "raster"},
    "mean_gt": {"order": "mean", "extract": {"score": "gt_logprob"}},
}


def recipe(arms: dict[str, Any] | None = None, seeds: int = 1, **sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "a", "pipeline": {"arms": arms or {}, "seeds": seeds}, **sections})


def test_each_arm_and_seed_is_a_stage_with_a_model_of_its_own() -> None:
    stages = {stage.name: stage for stage in recipe(ARMS, 2).stages()}
    assert [name for name, stage in stages.items() if stage.training == "finetune"] == [
        "finetune", "control", "gt", "gt_half", "same", "raster", "mean_gt",
        "finetune.s1", "control.s1", "gt.s1", "gt_half.s1", "same.s1", "raster.s1", "mean_gt.s1",
    ]  # fmt: skip
    assert stages["gt.s1"].model == "gt.s1" and stages["finetune.s1"].model == "ordered.s1" and stages["control.s1"].model == "control.s1"
    outputs = [output for stage in stages.values() for output in stage.outputs]
    assert len(set(outputs)) == len(outputs)
    assert not any(one != other and other.startswith(f"{one}/") for one in outputs for other in outputs)  # none is set aside with another
    names = list(stages)
    assert all(names.index(need) < names.index(stage.name) for stage in stages.values() for need in stage.needs)


def test_arms_with_equal_settings_share_an_extraction() -> None:
    stages = {stage.name: stage for stage in recipe(ARMS).stages()}
    assert [name for name in stages if name.startswith(EXTRACTION)] == ["extract_gt"]
    assert {name: (stages[name].needs, stages[name].orders) for name in ARMS} == {
        "gt": (("extract_gt",), "arm_orders/gt"),
        "gt_half": (("extract_gt",), "arm_orders/gt"),
        "same": (("extract",), "orders"),  # the recipe's own settings
        "raster": (("pretrain",), "orders"),
        "mean_gt": (("extract_gt",), "arm_orders/gt"),
    }


def test_a_stage_has_the_settings_of_its_arm() -> None:
    whole = recipe(ARMS, 2, extract={"guidance": 1.5, "actors": 3}, finetune={"lr": 0.5})
    gt, seed = whole.of(whole.stage("gt_half")), whole.of(whole.stage("gt_half.s1"))
    assert (gt.extract.score, gt.extract.guidance, gt.extract.actors) == ("gt_logprob", 1.5, 3)
    assert (gt.finetune.random_share, gt.finetune.lr, gt.finetune.any_view_share) == (0.5, 0.5, 0.1)
    assert gt.seed == whole.seed != seed.seed and seed.finetune == gt.finetune and seed.extract == gt.extract
    assert whole.of(whole.stage("finetune")) is whole
    seeds = {whole.of(whole.stage(f"finetune{number}")).seed for number in ("", ".s1")} | {recipe(seeds=2, seed=1).seed}
    assert len(seeds) == 3
    assert stage_settings(whole, whole.stage("gt_half"))["finetune.random_share"] == 0.5
    assert stage_settings(whole, whole.stage("extract_gt"))["extract.score"] == "gt_logprob"


def test_arms_and_seeds_change_no_other_stage() -> None:
    plain, whole = recipe(), recipe(ARMS, 3)
    for stage in plain.stages():
        assert stage_fingerprint(whole, whole.stage(stage.name)) == stage_fingerprint(plain, stage)
    fingerprints = [stage_fingerprint(whole, stage) for stage in whole.stages()]
    assert len(set(fingerprints)) == len(fingerprints)
    changed = recipe({**ARMS, "raster": {"order": "halton"}}, 3)
    other = [stage.name for stage in whole.stages() if stage_fingerprint(changed, stage) != stage_fingerprint(whole, stage)]
    assert other == ["raster", "raster.s1", "raster.s2"]


def test_a_recipe_with_arms_is_read_back_as_it_was_written(tmp_path: Any) -> None:
    written = recipe(ARMS, 2)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(written))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == written


@pytest.mark.parametrize(
    ("arms", "key", "text"),
    [
        ({"Foo": {"order": "raster"}}, "Foo", "a-z, 0-9 and _"),
        ({"a.s1": {"order": "raster"}}, "a.s1", "a-z, 0-9 and _"),
        ({"a" * 41: {"order": "raster"}}, "a" * 41, "at most 40"),
        ({"all": {"order": "raster"}}, "all", "stands for something of every run"),
        ({"control": {"order": "raster"}}, "control", "stands for something of every run"),
        ({"anyorder": {"order": "raster"}}, "anyorder", "stands for something of every run"),
        ({"extract_a": {"order": "raster"}}, "extract_a", "begins with extract_"),
        ({"a": {}}, "a", r"same orders as the ordered model"),
        ({"a": {"extract": {"score": "max_prob"}}}, "a", r"same orders as the ordered model"),
        ({"a": {"extract": {"info_gain_samples": 9}}}, "a", r"same orders as the ordered model"),  # another score has none
        ({"a": {"order": "random"}}, "a", "same orders as the control"),
        ({"a": {"random_share": 1.0}}, "a", "same orders as the control"),
        ({"a": {"order": "raster"}, "b": {"order": "raster"}}, "b", "same orders as arm a"),
        ({"a": {"extract": {"scor": "margin"}}}, "a.extract.scor", "unknown key"),
        ({"a": {"extract": {"score": "best"}}}, "a.extract.score", "must be 'gt_logprob'"),
        ({"a": {"extract": {"views": 2}}}, "a.extract.views", "the same for all arms"),
        ({"a": {"extract": {"actors": 2}}}, "a.extract.actors", "the same for all arms"),
        ({"a": {"extract": {"orders_per_image": 3}}}, "a.extract.orders_per_image", "3 orders of an image would be the same"),
        ({"a": {"order": "raster", "extract": {"score": "margin"}}}, "a.extract", "orders that nothing is trained on"),
        ({"a": {"order": "order-head", "extract": {"score": "margin"}}}, "a.extract", "own extraction only"),
        ({"a": {"order": "raster", "distinct_orders": 3}}, "a.distinct_orders", "which stored orders"),
        ({"a": {"order": "raster", "random_share": 1.0}}, "a", "same orders as the control"),
        ({"a": {"random_share": 0.0}}, "a.random_share", r"below 0\.1.*\n +Set finetune\.any_view_share"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_where_it_is_wrong(arms: dict[str, Any], key: str, text: str, tmp_path: Any) -> None:
    file = tmp_path / "recipe.yaml"
    views = "tokenizer: {views: [center, jitter1]}\n"
    rows = "".join(f"    {name}: {re.sub(chr(39), '', str(arm))}\n" for name, arm in arms.items())
    file.write_text(f"name: a\n{views}pipeline:\n  arms:\n{rows}")
    with pytest.raises(UserError, match=text) as refused:
        load_recipe(str(file))
    assert re.match(rf"{re.escape(str(file))}:\d+  pipeline\.arms\.{re.escape(key)}( |$)", str(refused.value).splitlines()[0])


def test_an_order_of_its_own_needs_fewer_views_to_have_orders() -> None:
    """Where each view has orders, or none is taken without, an arm may have fewer random orders than the recipe."""
    views = {"views": ["center", "center_flip"]}
    recipe({"a": {"random_share": 0.0}}, tokenizer=views, extract={"views": 2})
    recipe({"a": {"random_share": 0.0}}, tokenizer=views, extract={"mirror": True})
    recipe({"a": {"random_share": 0.0}}, tokenizer=views, finetune={"any_view_share": 0.0})


def test_a_raster_model_has_neither_arms_nor_seeds() -> None:
    for pipeline in ({"arms": {"a": {"order": "halton"}}}, {"seeds": 2}):
        with pytest.raises(ValueError, match="raster order only"):
            Recipe.model_validate({"name": "a", "model": {"layout": "raster"}, "pipeline": pipeline})


def test_policies_that_wait_for_no_extraction_need_none(tmp_path: Any) -> None:
    """They give orders in a run without any order table; those that an arm waits with do not."""
    files = run_files(str(tmp_path))
    for name in known():
        try:
            without = policy(name).training(files, 4).tables is None
        except (UserError, FileNotFoundError):
            without = name in ("confidence", "locality")  # which have none at all, with an extraction or without
        assert without == (name not in FROM_EXTRACTION), name


def test_a_name_tells_what_a_stage_is() -> None:
    """Also where the recipe has the arm no more: what it has left can be found."""
    for stage in recipe(ARMS, 3).stages():
        assert kind_of(stage.name) == stage.kind
        found = stage_of_name(stage.name)
        assert found is not None and found.outputs == stage.outputs
        assert found.command("R") == stage.command("R")
    assert all(kind_of(name) == name for name in STAGES)
    assert [stage_of_name(name) for name in ("Foo", "a b", "a.sx", "../a", "")] == [None] * 5


def test_jobs_run_arms_by_their_own_commands() -> None:
    (first, second) = plan_jobs(recipe(ARMS, 2), "extract_gt,gt+gt.s1")
    assert first.name == "extract_gt" and first.needs_ray
    assert first.commands("R", array=True) == [["extract", "R", "--stage", "extract_gt", "--array"]]
    assert second.commands("R") == [["train", "R", "--stage", "gt"], ["train", "R", "--stage", "gt.s1"]]
    with pytest.raises(UserError, match="gt needs extract_gt, which comes after it"):
        plan_jobs(recipe(ARMS), "gt,extract_gt")
