"""Runs of version 0.1.0, which wrote ``models/anyorder.safetensors`` and called that model "any-order" in ``evaluation.json``."""

from __future__ import annotations

import io
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import oar_scale
from oar_scale import pipeline
from oar_scale.cli import main
from oar_scale.commands.checkpoint_export import export_checkpoint
from oar_scale.evaluation.evaluation_record import Evaluation, load_evaluation, save_evaluation
from oar_scale.model import model_id
from oar_scale.observe.console import Console
from oar_scale.pipeline import bind_run_dir, run_stage
from oar_scale.registry import STAGES, Stage
from oar_scale.run.context import Run
from oar_scale.run.stage_markers import stage_fingerprint
from oar_scale.stages.report import run_report
from oar_scale.storage import write_json
from oar_scale.training.job import TrainingJob
from tests.observe.synthetic import report as synthetic_report
from tests.small_run import prepare_small_run, small_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tokenizers, shards and models of an old run."""
    run = prepare_small_run(small_recipe(str(tmp_path_factory.mktemp("old"))))
    for name in ("anyorder", "control", "ordered"):
        shutil.copy(run.model_uri("base"), run.at("models", f"{name}.safetensors"))
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy of that run, whose pretraining is done."""
    shutil.copytree(made.local(), tmp_path / "run")
    run = Run(small_recipe(str(tmp_path / "run")), Console(io.StringIO()))
    bind_run_dir(run)
    for name in ("data", "tokenizer", "tokens", "pretrain"):
        marker = {"stage": name, "fingerprint": stage_fingerprint(run.recipe, STAGES[name]), "settings": {}}
        write_json(run.marker(name), {**marker, "seconds": 1.0, "started": 1.7e9, "results": {}})
    return run


def stages_that_run(run: Run, patch: pytest.MonkeyPatch) -> list[str]:
    """The names of the stages that do something in the pipeline from here on; none of them does it really."""
    names: list[str] = []

    def entry_point(stage: Stage) -> Any:
        return lambda *arguments: names.append(stage.name) or {}

    patch.setattr(pipeline, "entry_point", entry_point)
    patch.setattr(pipeline, "_shared_ray", lambda recipe: nullcontext())
    return names


def test_an_old_run_resumes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pretraining counts as done, and the model that it left is what the next training starts with."""
    job = TrainingJob(run.recipe, "control", run.at(), run.local(), run.model_uri("any_order"), run.model_uri("control"))
    identity = job.identity
    assert job.start_from == run.at("models", "anyorder.safetensors")
    names = stages_that_run(run, monkeypatch)
    for stage in ("pretrain", "extract"):
        run_stage(run, stage)
    assert names == ["extract"]
    os.rename(job.start_from, run.at("models", "any_order.safetensors"))
    again = TrainingJob(run.recipe, "control", run.at(), run.local(), run.model_uri("any_order"), run.model_uri("control"))
    assert again.start_from != job.start_from and again.identity == identity
    assert "group_steps" not in json.dumps(identity["training"])  # a checkpoint of that run does not know it


def test_an_old_model_is_removed_before_a_new_one_is_trained(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stages_that_run(run, monkeypatch)
    pipeline.run_pipeline(run, only="pretrain", yes=True)
    assert not os.path.exists(run.at("models", "anyorder.safetensors"))
    assert run.model_uri("any_order") == run.at("models", "any_order.safetensors")


@pytest.mark.parametrize("name", ["anyorder", "any_order"])
def test_an_old_model_samples_and_is_exported(run: Run, tmp_path: Path, name: str) -> None:
    sheet, folder = tmp_path / "sheet.png", tmp_path / "exported"
    assert main(["sample", run.local("recipe.yaml"), "a cat", "--model", name, "--out", str(sheet)]) == 0
    assert sheet.stat().st_size > 100
    export_checkpoint(run.local(), str(folder), name=name)
    assert model_id(str(folder / "model.safetensors")) == model_id(run.at("models", "anyorder.safetensors"))
    assert oar_scale.load(run.local(), model=name).sample(["a cat"])[0].size == (32, 32)


@pytest.mark.parametrize("name", ["any-order", "anyorder"])
def test_an_old_evaluation_is_shown(run: Run, name: str) -> None:
    shutil.rmtree(run.at("stages"))
    report = synthetic_report()
    assert report.nll and report.pretrain and report.samples and report.orders and report.tokenizer
    evaluation = Evaluation(
        nll=report.nll,
        pretrain=report.pretrain,
        captions=report.captions,
        distances=report.distances,
        samples=report.samples,
        edits=report.edits,
        orders=report.orders,
        tokenizer=report.tokenizer,
    )
    save_evaluation(evaluation, run.local())
    path = Path(run.local("evaluation.json"))
    written = path.read_text().replace('"any_order"', f'"{name}"').replace('"own gt_logprob"', '"own confidence"')
    plain = json.loads(written)
    for later in ("calibration", "distance_differences", "groups"):
        del plain[later]
    for row in plain["distances"]:
        del row["features"]
        row |= {"kid_efflite0": row.pop("kid"), "kid_efflite0_std": row.pop("kid_std"), "fd_efflite0": row.pop("fd")}
    path.write_text(json.dumps({**plain, "nll_new": plain["nll"]}))
    old = load_evaluation(run.local())
    assert old is not None
    assert (old.nll, old.captions, old.samples.columns) == (evaluation.nll, evaluation.captions, evaluation.samples.columns)
    assert old.distances == evaluation.distances
    assert [(group.name, group.nll) for group in old.groups] == [("novel", evaluation.nll)]
    page = Path(run_report(run)["path"]).read_text()
    assert "ordered − any-order" in page and "any_order" not in page
