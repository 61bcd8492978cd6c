"""The real wandb client offline: its files are read back, and what cannot be sent is a warning."""

import logging
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from oar_scale.config.schema import Recipe
from oar_scale.observe import watch
from oar_scale.observe.events import EventLog
from oar_scale.observe.wandb_process import WandbSpec, is_delivered
from oar_scale.observe.wandb_sink import send_stage
from oar_scale.observe.watch import catch_up, watching
from tests.observe import synthetic_run
from tests.observe.documented import promised_at_wandb
from tests.wandb_file import offline_runs

SECRETS = {"AWS_SECRET_ACCESS_KEY": "aws-secret-of-this-test", "WANDB_API_KEY": "wandb-secret-of-this-test-0123456789abcd"}


def send(events: Path, stage: str = "pretrain", **changed: Any) -> None:
    fields = {"events": str(events), "stage": stage, "recipe_name": "emoji", "root": str(events.parent), "mode": "offline", "project": "p"}
    fields |= {"finish_s": 100.0}  # however slow this machine is
    send_stage(WandbSpec(**(fields | changed)), lambda text: None, wait_s=600.0)


def test_an_offline_run_holds_every_documented_metric_once(tmp_path: Path) -> None:
    events = tmp_path / "events"
    synthetic_run.interrupted(events)
    synthetic_run.driver(events)
    send(events)
    synthetic_run.resumed(events)
    synthetic_run.pools(events)
    for stage in ("pretrain", "tokenizer", "extract"):
        send(events, stage, tags=("emoji",))
    runs = {run.job_type: run for run in offline_runs(tmp_path)}
    assert set(runs) == {"pretrain", "tokenizer", "extract"} and len(offline_runs(tmp_path)) == 3
    names = {name for run in runs.values() for row in run.history for name in row if not name.startswith("_")}
    assert {name.partition(".")[0] for name in names} == promised_at_wandb()
    pretrain = runs["pretrain"]
    assert [row["train/step"] for row in pretrain.history if "train/step" in row] == list(range(10, 101, 10))
    assert [row["_step"] for row in pretrain.history] == list(range(len(pretrain.history)))
    assert (pretrain.project, pretrain.name, pretrain.tags, pretrain.exit_code) == ("p", "emoji-pretrain", ["emoji"], 0)
    assert pretrain.config["start"]["code"] == "v0.5.0-3-gabc1234"
    assert len(pretrain.alerts) == 6
    assert is_delivered(str(events), "pretrain")


def test_numbers_that_are_not_finite_arrive_as_they_were(tmp_path: Path) -> None:
    events = tmp_path / "events"
    with EventLog(str(events), "pretrain") as log:
        synthetic_run.start(log)
        synthetic_run.train(log, 10, loss=float("nan"), grad_norm=float("inf"), loss_by_position=[1.0, float("nan"), 2.0, 3.0], mfu=None)
    send(events)
    [run] = offline_runs(tmp_path)
    row = run.history[-1]
    assert math.isnan(row["train/loss"]) and math.isinf(row["train/grad_norm"]) and math.isnan(row["train/loss_by_position/2"])
    assert "train/mfu" not in row and row["train/step"] == 10


def test_online_without_a_key_is_kept_offline_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    events = tmp_path / "events"
    synthetic_run.interrupted(events)
    send(events, mode="online")
    assert "no WANDB_API_KEY" in caplog.text
    assert len(offline_runs(tmp_path)) == 1


def test_a_broken_client_is_a_warning_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken" / "wandb").mkdir(parents=True)
    (tmp_path / "broken" / "wandb" / "__init__.py").write_text("raise ImportError('wandb was built for another Python')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    events = tmp_path / "events"
    synthetic_run.interrupted(events)
    with caplog.at_level(logging.WARNING):
        send(events)
    assert "wandb was built for another Python" in caplog.text


def test_off_starts_nothing_and_no_events_make_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "send_stage", partial(send_stage, wait_s=600.0))
    off = Recipe.model_validate({"name": "emoji", "run_dir": str(tmp_path)})
    events = tmp_path / "events"
    with watching(str(events), "pretrain", off, str(tmp_path)):
        synthetic_run.interrupted(events)
    catch_up(str(events), off, str(tmp_path), ["pretrain"], print)
    assert not (tmp_path / "wandb").exists()
    kept = off.model_copy(update={"observe": off.observe.model_copy(update={"wandb": "offline"})})
    with watching(str(events), "evaluate", kept, str(tmp_path), wait_s=600.0):
        pass
    assert not offline_runs(tmp_path)
    catch_up(str(events), kept, str(tmp_path), ["pretrain", "finetune"], print)
    assert [run.job_type for run in offline_runs(tmp_path)] == ["pretrain"]


def test_no_secret_of_the_environment_is_in_any_file_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    recipe = Recipe.model_validate(
        {"name": "emoji", "run_dir": str(tmp_path), "observe": {"wandb": "online", "metrics_port": 0, "wandb_artifacts": True}}
    )
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    events = tmp_path / "events"
    with watching(str(events), "pretrain", recipe, str(tmp_path), wait_s=600.0):
        synthetic_run.whole_run(tmp_path)
    assert offline_runs(tmp_path)
    files = [Path(at, name) for at, _, names in os.walk(tmp_path) for name in names]
    assert len(files) > 8
    for path in files:
        data = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in data], path
