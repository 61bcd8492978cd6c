"""What the report says of a run's stages."""

from __future__ import annotations

from pathlib import Path

from small_run import small_recipe

from oar_scale.observe.console import Console
from oar_scale.report.run_metadata import run_metadata, stage_rows
from oar_scale.run.context import Run


def test_a_trainings_seconds_and_attempts_are_of_the_same_commands(tmp_path: Path) -> None:
    """Its marker has the time of the last command, its results that of all; other stages have the marker's."""
    run = Run(small_recipe(str(tmp_path)), Console())
    trained = {"steps": 10, "attempts": 3, "seconds": 7200.0}
    extracted = {"images": 72, "seconds": 4.0, "images_per_s": 18.0, "actors": 1}
    markers = {
        "pretrain": {"seconds": 60.0, "started": 1.7e9, "results": trained},
        "finetune": {"seconds": 30.0, "started": 1.7e9, "results": {"steps": 10}},  # as of an older version
        "extract": {"seconds": 5.0, "started": 1.7e9, "results": extracted},
    }
    rows = {row.name: row for row in stage_rows(run, markers)}
    assert {name: row.seconds for name, row in rows.items()} == {"pretrain": 7200.0, "finetune": 30.0, "extract": 5.0}
    assert "3 attempts" in rows["pretrain"].detail
    assert run_metadata(run, markers).duration_s == 7235.0
