"""A W&B run made anew from the event files alone: online, offline, and what it must not hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from oar_scale.observe.events import EventLog
from tests.observe import synthetic_run
from tests.observe.documented import promised_at_wandb
from tests.wandb_file import offline_runs
from tests.wandb_server import WandbServer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "wandb_replay.py"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True)


def test_every_metric_is_there_once_with_the_values_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EventLog(str(tmp_path / "events"), "pretrain") as log:
        synthetic_run.start(log)
        synthetic_run.checkpoint(log, 5)
        synthetic_run.train(log, 10, loss=9.0)  # undone by what follows
    synthetic_run.whole_run(tmp_path)
    server = WandbServer()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        done = run_tool(str(tmp_path), "--project", "review")
        assert done.returncode == 0, done.stderr
    server.close()
    assert len(server.runs) == 6  # each time new ones
    first = list(server.runs.values())[:3]
    assert {run.job_type for run in first} == {"pretrain", "tokenizer", "extract"} and {run.project for run in first} == {"review"}
    assert {name for run in first for row in run.history for name in row if not name.startswith("_")} == promised_at_wandb()
    pretrain = next(run for run in first if run.job_type == "pretrain")
    points = [(row["train/step"], row["train/loss"]) for row in pretrain.history if "train/step" in row]
    assert points == [(step, synthetic_run.loss_at(step)) for step in range(10, 101, 10)]
    assert len([file for file in pretrain.files if file.startswith("media/")]) == 2


def test_one_stage_offline_and_a_stage_that_is_not_there(tmp_path: Path) -> None:
    synthetic_run.whole_run(tmp_path)
    done = run_tool(str(tmp_path), "--stage", "extract", "--offline")
    assert done.returncode == 0 and done.stdout.startswith("extract: 2 rows, offline in ")
    assert [run.job_type for run in offline_runs(tmp_path)] == ["extract"]
    done = run_tool(str(tmp_path), "--stage", "finetune", "--offline")
    assert done.returncode == 2 and "no events of finetune; there are those of extract, pretrain, tokenizer" in done.stderr
