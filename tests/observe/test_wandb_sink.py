"""The W&B view of the event files: works offline, sends nothing twice, and cannot fail a run."""

import json
import logging
import sys
from pathlib import Path

import pytest

from oar_scale.observe.events import EventLog
from oar_scale.observe.wandb_sink import project


def write(folder: Path, *steps: int) -> None:
    with EventLog(str(folder), "pretrain") as log:
        log.emit("start", steps=10, start_step=steps[0] - 1)
        for step in steps:
            log.emit("train", step=step, loss=1.0 / step)


def test_offline_run_is_written_without_network_and_continued(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    events = tmp_path / "events"
    write(events, 1, 2, 3)
    project(str(events), "quickstart", "pretrain", "offline", "oar_scale")
    first = json.loads((events / "pretrain.wandb.json").read_text())
    assert first["last_step"] == 3
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{first['run_id']}"))
    write(events, 4, 5)
    project(str(events), "quickstart", "pretrain", "offline", "oar_scale")
    assert json.loads((events / "pretrain.wandb.json").read_text()) == {"run_id": first["run_id"], "last_step": 5}


def test_a_failure_is_a_warning_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        project(str(tmp_path), "quickstart", "pretrain", "offline", "oar_scale")
    assert "import of wandb halted" in caplog.text
    assert not (tmp_path / "pretrain.wandb.json").exists()


def test_off_does_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    project(str(tmp_path), "quickstart", "pretrain", "off", "oar_scale")
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain-000.jsonl"]
