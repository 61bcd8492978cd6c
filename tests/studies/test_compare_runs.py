"""``oar compare``: means over seeds, differences to the control of the same seed, and runs that cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from small_models import small_model

from oar_scale.cli import main
from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import Recipe
from oar_scale.data.manifest import Manifest, write_manifest
from oar_scale.data.shards import ShardInfo
from oar_scale.errors import UserError
from oar_scale.model import model_id, save_model
from oar_scale.observe.events import EventLog
from oar_scale.results.flexibility import FORMAT
from oar_scale.run.context import Run
from oar_scale.run.stage_markers import mark_stale, write_finished
from oar_scale.storage import write_json
from oar_scale.studies.compare_runs import arm_rows, mean_of, minus_control, run_compare_runs, told_apart
from oar_scale.studies.trained_arms import TrainedArm, trained_arms

MEASURE = "held-out nll random"
LAST = {
    "finetune": 3.2, "control": 3.3, "raster": 3.5,
    "finetune.s1": 3.1, "control.s1": 3.25, "raster.s1": 3.6,
    "finetune.s2": 3.15, "control.s2": 3.31, "raster.s2": 3.55,
}  # fmt: skip
"""Held-out likelihoods at the end of the trainings."""


def finished_run(folder: Path, last: Mapping[str, float] = LAST, *, start_seed: int = 0, **changes: Any) -> str:
    """The folder of a run whose fine-tunings have ended with such held-out likelihoods, without anything having been trained."""
    settings: dict[str, Any] = {"name": "compared", "pipeline": {"seeds": 3, "arms": {"raster": {"order": "raster"}}}, **changes}
    recipe = Recipe.model_validate({**settings, "run_dir": str(folder)})
    run = Run(recipe)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    write_manifest(run.at("tokens", "train"), Manifest(shards=(ShardInfo(name="00000.tar", bytes=1, samples=1, crc32c=0),), grid=8))
    save_model(run.model_uri("any_order"), small_model(seed=start_seed))
    for stage in recipe.stages():
        if not stage.training or stage.name in last:
            write_finished(run, stage, {"seconds": 1.0, "started": 1.7e9, "results": {"steps": recipe.finetune.steps}})
        if stage.name in last:
            with EventLog(run.events, stage.name) as log:
                log.emit("heldout", step=0, nll_random=4.0)
                log.emit("train", step=50, loss=last[stage.name] + 0.5)
                log.emit("train", step=100, loss=last[stage.name] + 0.1)
                log.emit("heldout", step=100, nll_random=last[stage.name])
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return finished_run(tmp_path_factory.mktemp("compared") / "run")


def test_means_and_differences_are_scipys(folder: str) -> None:
    rows = arm_rows(trained_arms(folder)[0])
    assert [(row.label, len(row.trained)) for row in rows] == [("ordered", 3), ("control", 3), ("raster", 3)]
    values = {
        label: np.array([LAST[name] for name in (stage, f"{stage}.s1", f"{stage}.s2")])
        for label, stage in (("ordered", "finetune"), ("control", "control"), ("raster", "raster"))
    }
    for row in rows:
        mean, own = mean_of(row, MEASURE), values[row.label]
        assert mean is not None and mean.interval is not None and mean.seeds == 3
        low, high = stats.t.interval(0.95, 2, loc=own.mean(), scale=stats.sem(own))
        assert (mean.mean, mean.interval.low, mean.interval.high) == pytest.approx((own.mean(), low, high))
        difference = minus_control(row, rows, MEASURE)
        if row.label == "control":
            assert difference is None
            continue
        tested = stats.ttest_rel(own, values["control"])
        interval = tested.confidence_interval(0.95)
        assert difference is not None and difference.interval is not None
        assert (difference.interval.low, difference.interval.high) == pytest.approx((interval.low, interval.high))
        assert difference.p == pytest.approx(tested.pvalue)
        assert difference.mean == pytest.approx((own - values["control"]).mean())


def test_the_command_prints_tables_and_writes_the_figures(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compared.json"
    assert main(["compare", folder, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "held-out nll random (nats per code, lower is better)" in text and "One seed" not in text
    (line,) = [line for line in text.split("held-out nll random")[1].split("\n\n")[0].splitlines() if line.strip().startswith("raster")]
    assert line.split()[1:3] == ["3", "3.5500"] and line.endswith("3.5000 3.6000 3.5500")
    written = json.loads(out.read_text())
    (raster,) = [arm for arm in written["arms"] if arm["arm"] == "raster"]
    assert raster["orders"] == {"order": "raster", "random_share": 0.1}
    assert [seed["stage"] for seed in raster["seeds"]] == ["raster", "raster.s1", "raster.s2"]
    assert raster["seeds"][1]["curves"]["training loss"] == [[50, 4.1], [100, 3.7]]
    assert raster["seeds"][1]["model"].endswith("models/raster.s1.safetensors")
    assert len({seed["seed"] for seed in raster["seeds"]}) == 3


def test_one_seed_has_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = {name: value for name, value in LAST.items() if "." not in name}
    arms = {"arms": {"raster": {"order": "raster"}}}
    run = finished_run(tmp_path / "run", last, pipeline=arms)
    rows = arm_rows(trained_arms(run)[0])
    mean, difference = mean_of(rows[0], MEASURE), minus_control(rows[0], rows, MEASURE)
    assert mean is not None and mean.interval is None
    assert difference is not None and difference.interval is None and difference.p is None
    assert main(["compare", run]) == 0
    text = capsys.readouterr().out
    assert "none: one seed" in text and "One seed of each arm: there are no intervals" in text


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"start_seed": 1}, "start model"),
        ({"finetune": {"steps": 101}}, "finetune.steps"),
        ({"finetune": {"global_batch": 96}}, "finetune.global_batch"),
        ({"finetune": {"lr": 0.5}}, "finetune.lr"),
        ({"model": {"dropout": 0.0}}, "model.dropout"),
        ({"model": {"caption_dropout": 0.0}}, "model.caption_dropout"),
        ({"parallel": {"precision": "fp32"}}, "parallel.precision"),
        ({"tokenizer": {"views": ["center", "center_flip"]}, "extract": {"views": 2}}, "extract.views"),
        ({"tokenizer": {"views": ["center", "center_flip"]}, "extract": {"mirror": True}}, "extract.mirror"),
    ],
)
def test_runs_that_differ_in_more_than_the_orders_are_refused(folder: str, tmp_path: Path, changes: Any, field: str) -> None:
    other = finished_run(tmp_path / "other", **changes)
    with pytest.raises(UserError, match=rf"other \(stage finetune\): {field} is .*run \(stage finetune\).*\n.*--anyway"):
        run_compare_runs([folder, other])
    lines = run_compare_runs([folder, other], anyway=True)
    (marked,) = [line for line in lines if line.startswith(f"! raster ({other})")]
    assert field in marked
    assert any(line.strip().startswith(f"raster ({other}) !") for line in lines)
    rows = arm_rows([*trained_arms(folder)[0], *trained_arms(other)[0]], anyway=True)
    assert all(minus_control(row, rows, MEASURE) is not None for row in rows if row.trained[0].arm != "control")  # each to its own control


def test_a_control_of_another_run_will_do(folder: str, tmp_path: Path) -> None:
    """A run whose arms have the same start, samples and seeds as those of the first one, which has the control."""
    last = {name.replace("raster", "halton"): value for name, value in LAST.items() if "raster" in name or "finetune" in name}
    arms = {"seeds": 3, "control": False, "arms": {"halton": {"order": "halton"}}}
    other = finished_run(tmp_path / "other", last, pipeline=arms)
    rows = arm_rows([*trained_arms(folder)[0], *trained_arms(other)[0]])
    assert [row.label for row in rows] == [f"ordered ({folder})", "control", "raster", f"ordered ({other})", "halton"]
    difference = minus_control(rows[-1], rows, MEASURE)
    assert difference is not None and difference.seeds == 3
    assert difference.mean == pytest.approx(np.mean([3.5 - 3.3, 3.6 - 3.25, 3.55 - 3.31]))


def test_other_seeds_of_an_arm_in_another_run_join_it(folder: str, tmp_path: Path) -> None:
    """As when a second run with another ``seed`` starts with the same weights."""
    other = finished_run(tmp_path / "other", {"raster": 3.7, "control": 3.2}, seed=5, pipeline={"arms": {"raster": {"order": "raster"}}})
    rows = {row.label: row for row in arm_rows([*trained_arms(folder)[0], *trained_arms(other)[0]])}
    assert [each.figures[MEASURE] for each in rows["raster"].trained] == [3.5, 3.7, 3.6, 3.55]
    difference = minus_control(rows["raster"], list(rows.values()), MEASURE)
    assert difference is not None and difference.seeds == 4
    assert difference.mean == pytest.approx(np.mean([0.2, 0.35, 0.24, 0.5]))


@pytest.mark.parametrize("order", ["mean", "order-head"])
def test_orders_of_another_extraction_are_another_arm(order: str, tmp_path: Path) -> None:
    """Also where they are the mean of the extracted ones, or learned from them; and so are likelihoods along the stored ones."""
    trained = list[TrainedArm]()
    for seed, score in enumerate(("max_prob", "margin")):
        last = {"control": 3.3, "from_orders": 3.0 + seed}
        arms = {"arms": {"from_orders": {"order": order}}}
        run = finished_run(tmp_path / score, last, seed=seed, extract={"score": score}, pipeline=arms)
        with EventLog(f"{run}/events", "control", attempt=2) as log:
            log.emit("heldout", step=100, nll_random=3.3, nll_stored=2.0 + seed)
        trained += trained_arms(run)[0]
    rows = arm_rows(trained)
    assert [(row.label.partition(" ")[0], len(row.trained)) for row in rows] == [("control", 2), ("from_orders", 1), ("from_orders", 1)]
    stored = {name: value for each in rows[0].trained for name, value in each.figures.items() if "nll stored" in name}
    assert stored == {f"held-out nll stored [extract.score {score}]": 2.0 + seed for seed, score in enumerate(("max_prob", "margin"))}


def test_a_likelihood_that_leaks_is_left_out_of_old_evaluations(tmp_path: Path) -> None:
    """Version 0.1.0 measured along one kind of own orders, and named it by no score."""
    run = finished_run(tmp_path / "run")
    for score, leaks in (("gt_logprob", True), ("max_prob", False)):
        entries = [
            {"model": "ordered", "order": order, "nll": {"mean": mean}} for order, mean in (("own confidence", 1.5), ("random", 2.5))
        ]
        distances = [{"name": "ordered", "kid_efflite0": 0.2}]
        write_json(f"{run}/evaluation.json", {"nll": {"entries": entries}, "orders": {"score": score}, "distances": distances})
        (ordered, *_), notes = trained_arms(run)
        evaluated = {name: value for name, value in ordered.figures.items() if name.startswith("evaluated")}
        others = {"evaluated nll random": 2.5, "evaluated kid_efflite0": 0.2}
        assert evaluated == (others if leaks else {"evaluated nll own max_prob": 1.5, **others})
        assert [f"{run}: likelihoods along own gt_logprob orders" in note for note in notes] == [True] * leaks


def test_what_is_not_finished_is_left_out_and_said(tmp_path: Path) -> None:
    last = {name: value for name, value in LAST.items() if name != "raster.s1"}
    run = finished_run(tmp_path / "run", last)
    recipe = Run(Recipe.model_validate({"name": "x", "run_dir": run})).recipe
    mark_stale(Run(recipe), [trained_stage(run, "control.s2")], trained_stage(run, "pretrain"))
    lines = run_compare_runs([run])
    assert f"{run}: not finished: raster.s1" in lines
    assert any("stage control.s2" in line and "stale" in line for line in lines)
    (row,) = [line for line in lines if line.strip().startswith("control")][-1:]
    assert row.split()[1] == "2"


def trained_stage(folder: str, name: str) -> Any:
    from oar_scale.studies.trained_arms import open_run

    return open_run(folder).recipe.stage(name)


def test_held_out_orders_of_another_extraction_are_not_compared(tmp_path: Path) -> None:
    arms = {"arms": {"gt": {"extract": {"score": "gt_logprob"}}, "half": {"random_share": 0.5}}}
    run = finished_run(tmp_path / "run", {"finetune": 3.2, "gt": 3.1, "half": 3.3}, pipeline=arms)
    for stage in ("finetune", "gt", "half"):
        with EventLog(f"{run}/events", stage) as log:
            log.emit("heldout", step=100, nll_random=3.0, nll_stored=2.0)
    figures = {each.arm: each.figures for each in trained_arms(run)[0]}
    assert {arm: "held-out nll stored" in found for arm, found in figures.items()} == {"ordered": True, "gt": False, "half": True}


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        run_compare_runs([str(tmp_path)])
    with pytest.raises(UserError, match="no fine-tuning of this run is finished"):
        run_compare_runs([finished_run(tmp_path / "run", {})])


def flexibility_report(models: list[tuple[str, str]], **changes: Any) -> dict[str, Any]:
    names = ("likelihood/random", "likelihood/mean", "samples/max_prob/heldout")
    measures = [{"name": name, "unit": "nats", "chapter": name.split("/")[0]} for name in names]
    return {
        "format": FORMAT,
        "models": [{"id": identity, "arrays": arrays} for identity, arrays in models],
        "measures": [{**each, "name": each["name"].replace("likelihood", "nll")} for each in measures],
        **{"run": "runs/one", "split": "heldout", "images": 256, "sampling": "guidance 2", "features": "efflite0"},
        **{"sweep": [], "sweep_images": "", **changes},
    }


def with_flexibility(run: str, /, **changes: Any) -> None:
    """Give a run a report on its control and its arm ``raster``, of seed 0."""
    (Path(run) / "flexibility" / "arrays").mkdir(parents=True)
    models = []
    for number, name in enumerate(("ordered", "control", "raster")):
        save_model(f"{run}/models/{name}.safetensors", small_model(seed=number + 3))
        values: Any = {f"nll/{order}": np.array([number, 4.0]) for order in ("random", "mean")}
        values["samples/max_prob/heldout"] = np.array([0.1, 0.2])
        np.savez(f"{run}/flexibility/arrays/{name}.npz", **values)
        models.append((model_id(f"{run}/models/{name}.safetensors"), f"arrays/{name}.npz"))
    write_json(f"{run}/flexibility/flexibility.json", flexibility_report(models, **changes))


@pytest.mark.parametrize(
    ("changes", "names", "apart"),
    [
        ({}, {}, ()),
        ({"split": "test"}, {"flexibility --split": "test"}, ("nll/random", "nll/mean", "samples/max_prob/heldout")),
        ({"images": 976}, {"flexibility --images": "976"}, ("nll/random", "nll/mean", "samples/max_prob/heldout")),
        ({"sampling": "guidance 4"}, {"sampling": "guidance 4"}, ("samples/max_prob/heldout",)),
        ({"features": "timm:x"}, {"flexibility --features": "timm:x"}, ("samples/max_prob/heldout",)),
        ({"run": "runs/other"}, {"orders extracted in": "runs/other"}, ("nll/mean",)),
    ],
)
def test_figures_of_other_images_or_settings_are_never_subtracted(
    tmp_path: Path, changes: dict[str, Any], names: dict[str, str], apart: tuple[str, ...]
) -> None:
    """The second run has no control of its own; that of the first will do for what was measured in the same way, and for nothing else."""
    last = {name: value for name, value in LAST.items() if "." not in name}
    first = finished_run(tmp_path / "first", last, pipeline={"arms": {"raster": {"order": "raster"}}})
    other = finished_run(tmp_path / "other", {"raster": 3.6}, pipeline={"control": False, "arms": {"raster": {"order": "raster"}}})
    with_flexibility(first)
    with_flexibility(other, **changes)
    rows = arm_rows([*trained_arms(first)[0], *trained_arms(other)[0]])
    (row,) = [each for each in rows if each.trained[0].run == other]
    for measure in ("nll/random", "nll/mean", "samples/max_prob/heldout"):
        (found,) = [name for name in row.trained[0].figures if name.startswith(f"flexibility {measure} (nats)")]
        assert all(f"{name} {value}" in found for name, value in names.items()) == (measure in apart) or not names
        assert (minus_control(row, rows, found) is None) == (measure in apart)
        assert (found in rows[0].trained[0].figures) == (measure not in apart)


def test_settings_that_differ_only_at_their_end_are_told_apart(tmp_path: Path) -> None:
    last = {name: value for name, value in LAST.items() if "." not in name}
    runs = [finished_run(tmp_path / guidance, last) for guidance in ("2", "4")]
    for run, guidance in zip(runs, ("2", "4"), strict=True):
        with_flexibility(run, sampling=f"{'confidence order, ' * 10}guidance {guidance}")
    rows = arm_rows([each for run in runs for each in trained_arms(run)[0]])
    names = {
        name for row in rows for each in row.trained for name in each.figures if name.startswith("flexibility samples/max_prob/heldout")
    }
    assert len(names) == 2


@pytest.mark.parametrize(
    ("changes", "apart"),
    [
        ({}, ()),
        ({"sample": {"guidance": 4.0}}, ("kid_efflite0",)),
        ({"sample": {"images": 3}}, ()),
        ({"evaluate": {"feature_images": 100}}, ("kid_efflite0",)),
        ({"evaluate": {"nll_images": 100}}, ("nll own max_prob", "nll random")),
        ({"extract": {"commit_per_step": 4}}, ("nll own max_prob",)),
    ],
)
def test_a_setting_tells_apart_only_the_figures_that_depend_on_it(tmp_path: Path, changes: dict[str, Any], apart: tuple[str, ...]) -> None:
    figures = []
    for name, more in (("first", {}), ("other", changes)):
        run = finished_run(tmp_path / name, {"finetune": 3.2}, **more)
        entries = [{"model": "ordered", "order": order, "nll": {"mean": 2.5}} for order in ("own max_prob", "random")]
        write_json(f"{run}/evaluation.json", {"nll": {"entries": entries}, "distances": [{"name": "ordered", "kid": 0.1}]})
        figures += trained_arms(run)[0]
    first, other = ({name for name in each.figures if name.startswith("evaluated")} for each in told_apart(figures))
    shared = {f"evaluated {name}" for name in ("nll own max_prob", "nll random", "kid_efflite0") if name not in apart}
    assert len(first) == len(other) == 3 and first & other == shared


def test_the_evaluation_and_the_flexibility_report_are_read(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    write_json(
        f"{run}/evaluation.json",
        {
            "nll": {
                "entries": [{"model": "ordered", "order": order, "nll": {"mean": 2.5}} for order in ("own max_prob", "own gt_logprob")]
            },
            "distances": [{"name": "control", "kid_efflite0": 0.2}, {"name": "ordered", "kid": 0.1, "features": "inception"}],
        },
    )
    model = f"{run}/models/raster.s1.safetensors"
    save_model(model, small_model(seed=3))
    for name in ("ordered", "control", "raster", *(f"{arm}.s{seed}" for arm in ("ordered", "control") for seed in (1, 2)), "raster.s2"):
        save_model(f"{run}/models/{name}.safetensors", small_model(seed=4))
    (Path(run) / "flexibility" / "arrays").mkdir(parents=True)
    np.savez(f"{run}/flexibility/arrays/raster-1.npz", **{"nll/random": np.array([3.0, 4.0])})  # type: ignore[arg-type]
    write_json(f"{run}/flexibility/flexibility.json", flexibility_report([(model_id(model), "arrays/raster-1.npz")]))
    figures = {each.stage: each.figures for each in trained_arms(run)[0]}
    assert figures["finetune"]["evaluated nll own max_prob"] == 2.5
    assert not any("gt_logprob" in name for of_stage in figures.values() for name in of_stage)
    assert figures["control"]["evaluated kid_efflite0"] == 0.2
    assert figures["finetune"]["evaluated kid_inception"] == 0.1
    assert "evaluated nll own max_prob" not in figures["finetune.s1"]
    assert figures["raster.s1"]["flexibility nll/random (nats)"] == 3.5
    assert not any("flexibility" in name for name in figures["raster"])
    write_json(f"{run}/flexibility/flexibility.json", {"format": FORMAT, "models": [{"id": model_id(model)}], "measures": []})
    with pytest.raises(UserError, match="no flexibility report of this version"):
        trained_arms(run)
    write_json(f"{run}/flexibility/flexibility.json", flexibility_report([(model_id(model), "arrays/raster-1.npz")], format=1))
    with pytest.raises(
        UserError, match=rf"flexibility: a flexibility report of format 1, this version of oar_scale reads {FORMAT}: .*anew"
    ):
        trained_arms(run)
