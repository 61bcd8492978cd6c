"""One study for most tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_study import ServedStudy, served_study, small_study


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    small_study(tmp_path, pairs=12, per_rater=8, checks=2)
    return tmp_path / "study"


@pytest.fixture
def server(study_folder: Path) -> Iterator[ServedStudy]:
    with served_study(study_folder) as running:
        yield running
