"""A finished training that gets more steps is continued, and nothing is removed for it; settings that hinder nothing hinder nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from oar_scale import pipeline
from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.observe.console import Console
from oar_scale.pipeline import run_pipeline
from oar_scale.registry import Stage
from oar_scale.run.context import Run
from oar_scale.storage import open_storage, read_json, write_json

STAGES = [
    Stage("data", "", "", sections=("data",), folders=("images",)),
    Stage("pretrain", "", "", ("data",), ("pretrain", "seed"), ("checkpoints/pretrain",), training="pretrain", model="any_order"),
    Stage("extract", "", "", ("pretrain",), ("extract",), ("orders",)),
    Stage("evaluate", "", "", ("extract",), local=True),
]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that ran. Each leaves a file of its own with its settings' steps; a training its model as well."""
    names: list[str] = []

    def work(run: Run, stage: Stage) -> dict[str, Any]:
        names.append(stage.name)
        content = str(run.recipe.pretrain.steps).encode()
        models = [run.model_uri(stage.model)] if stage.model else []
        for uri in [*(run.at(folder, f"{content.decode()}.txt") for folder in stage.folders), *models]:
            open_storage(uri).write(uri, content)
        return {}

    monkeypatch.setattr(Recipe, "stages", lambda recipe: list(STAGES))
    monkeypatch.setattr(pipeline, "entry_point", lambda stage: lambda run, *_: work(run, stage))
    return names


def with_settings(folder: Path, **sections: dict[str, Any]) -> tuple[Run, io.StringIO]:
    said = io.StringIO()
    return Run(Recipe.model_validate({"name": "stub", "run_dir": str(folder), **sections}), Console(said)), said


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_more_steps_continue_a_finished_training(tmp_path: Path, ran: list[str]) -> None:
    run_pipeline(with_settings(tmp_path, pretrain={"steps": 100})[0])
    before = files(tmp_path)
    longer, said = with_settings(tmp_path, pretrain={"steps": 150, "lr": 0.0005, "schedule": "constant"})
    with pytest.raises(UserError, match=r"stage extract .* is stale: stage pretrain.*\n.*oar run RECIPE --from extract"):
        run_pipeline(longer)
    assert ran[4:] == ["pretrain"]
    assert "pretrain.lr 0.001 -> 0.0005" in said.getvalue() and "pretrain.steps 100 -> 150" in said.getvalue()
    assert "stale, and stay as they are until you do them again: extract, evaluate" in said.getvalue()
    after = files(tmp_path)
    assert after["models/any_order.safetensors"] == b"150" and after["models/any_order.step-100.safetensors"] == b"100"
    assert all(after[name] == content for name, content in before.items() if name.split("/")[0] in ("images", "orders", "checkpoints"))
    run_pipeline(longer, start="extract", yes=True)
    run_pipeline(longer)
    assert ran[5:] == ["extract", "evaluate"]


def test_a_failed_continuation_leaves_a_finished_run(tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe as it was still finds everything done."""
    shorter, _ = with_settings(tmp_path, pretrain={"steps": 100})
    run_pipeline(shorter)

    def fail(run: Run, *_: str) -> dict[str, Any]:
        raise UserError("no GPU")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no GPU"):
        patch.setattr(pipeline, "entry_point", lambda stage: fail)
        run_pipeline(with_settings(tmp_path, pretrain={"steps": 150})[0])
    run_pipeline(shorter)
    assert len(ran) == 4


def test_another_rate_alone_is_refused_with_a_way_out(tmp_path: Path, ran: list[str]) -> None:
    run_pipeline(with_settings(tmp_path, pretrain={"steps": 100})[0])
    for changes in ({"lr": 0.5}, {"steps": 90}, {"betas": (0.9, 0.99), "steps": 150}):
        with pytest.raises(UserError, match="was done with other settings") as refused:
            run_pipeline(with_settings(tmp_path, pretrain={"steps": 100, **changes})[0])
        assert ("continue it with them by more steps (-o pretrain.steps=...)" in str(refused.value)) == (changes == {"lr": 0.5})
    assert len(ran) == 4
    with pytest.raises(UserError, match=r"extract .* is stale"):
        run_pipeline(with_settings(tmp_path, pretrain={"steps": 101, "lr": 0.5})[0])
    assert ran[4:] == ["pretrain"]


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"max_bad_fraction": 0.05}},
        {"data": {"canonical_streams": 12, "shuffle_window_shards": 4}},
        {"pretrain": {"max_non_finite": 40, "spike_guard": "rollback", "spike_sigmas": 9.0}},
    ],
)
def test_limits_and_streams_unfinish_no_stage(tmp_path: Path, ran: list[str], changes: dict[str, Any]) -> None:
    """Whether they are changed, kept while another stage is done, or set back."""
    first, _ = with_settings(tmp_path)
    run_pipeline(first)
    other, _ = with_settings(tmp_path, **changes)
    run_pipeline(other)
    run_pipeline(other, start="extract", yes=True)
    run_pipeline(other)
    run_pipeline(first)
    assert ran == ["data", "pretrain", "extract", "evaluate", "extract", "evaluate"]


def test_a_stage_by_other_hands_than_the_recorded_is_refused(tmp_path: Path, ran: list[str]) -> None:
    """Somebody has removed a marker and done the stage with other settings: what rests on it is not taken for finished."""
    run, _ = with_settings(tmp_path)
    run_pipeline(run)
    marker = read_json(run.marker("pretrain"))
    write_json(run.marker("pretrain"), {**marker, "fingerprint": "0" * 16})
    other, _ = with_settings(tmp_path, data={"max_bad_fraction": 0.05})
    with pytest.raises(UserError, match=r"stage pretrain .* was done with other settings: those of a stage it needs"):
        run_pipeline(other)
