"""What a job says when it gives up, for a driver that could not."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.launch import ray_entry, report_failure
from oar_scale.observe.events import EventLog, read_events
from oar_scale.observe.failure import LATER, RETRIED
from oar_scale.storage import write_json


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A run whose data are prepared; each alert is a line of ``told``."""
    command = [sys.executable, "-c", f"import sys; open({str(tmp_path / 'told')!r}, 'a').write(sys.stdin.read() + chr(10))"]
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: emoji\nrun_dir: {tmp_path}\nobserve: {{notify: {{command: {json.dumps(command)}}}}}\n")
    write_json(str(tmp_path / "stages" / "data.json"), {"stage": "data", "seconds": 1.0})
    return load_recipe(str(path))


def told(folder: Path) -> list[str]:
    path = folder / "told"
    return [json.loads(line)["text"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(("stages", "stage"), [((), "tokenizer"), (("data", "tokens"), "tokens"), (("report",), "report")])
def test_the_first_stage_of_a_job_that_is_not_done_has_failed(stages: tuple[str, ...], stage: str, recipe: Recipe, tmp_path: Path) -> None:
    report_failure.report(recipe, "failed: the node was lost, 4 times in a row", time.time(), stages)
    [event] = read_events(str(tmp_path / "events"), stage)
    assert (event["kind"], event["final"]) == ("failed", True)
    assert told(tmp_path) == ["the stage has ended: failed: the node was lost, 4 times in a row"]


@pytest.mark.parametrize(("final", "age_s", "reports"), [(True, 0, False), (False, 0, True), (True, 3600, True)])
def test_what_the_driver_has_said_is_not_said_again(final: bool, age_s: float, reports: bool, recipe: Recipe, tmp_path: Path) -> None:
    """But that it would be started again is no last word, nor is that of an earlier attempt."""
    with EventLog(str(tmp_path / "events"), "tokenizer") as log:
        log.emit("failed", cause="UserError: a", final=final, host="n", pid=1)
    report_failure.report(recipe, "failed: code 2", since=time.time() - 1 + age_s)
    assert len(told(tmp_path)) == reports


def test_what_goes_wrong_with_it_changes_nothing(recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "events").write_text("no folder")
    report_failure.report(recipe, "failed", since=0.0)
    assert "the failure could not be reported" in caplog.text


def test_a_ray_job_that_gives_up_reports_it(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands know that they are started again, and what comes after them."""
    seen = []

    def call(command: list[str], env: dict[str, str]) -> int:
        seen.append((env[RETRIED], env[LATER]))
        return len(seen) - 1

    monkeypatch.setattr(ray_entry.subprocess, "call", call)
    monkeypatch.setattr(
        ray_entry.subprocess, "run", lambda command, **options: report_failure.report(recipe, command[4], float(command[5]), command[6:])
    )
    arguments = ["--max-failures", "0", "--backoff-s", "0", "--recipe", str(tmp_path / "recipe.yaml"), "tokenizer", "tokens"]
    assert ray_entry.main(arguments) == 1
    assert seen == [("1", "tokens"), ("1", "")]
    assert told(tmp_path) == ["the stage has ended: the job has given up: oar tokens ended with code 1"]
