"""How the tests are shared out among the workers of pytest-xdist (markers.py)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from markers import pytest_xdist_make_scheduler


@pytest.mark.parametrize("root", [".", "repository", "elsewhere"])
def test_modules_that_share_a_ray_go_to_one_worker(root: str, tmp_path: Path) -> None:
    """Whether pytest's root is the repository, a folder above it, or one beside it (``--rootdir``): test ids are relative to it."""
    tests = tmp_path / "repository" / "tests"
    tests.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name, fixture in (("one", "shared_ray"), ("two", "shared_ray"), ("alone", "tmp_path")):
        (tests / f"test_{name}.py").write_text(f"def test({fixture}):\n    pass\n")
    below = {".": "repository/tests", "repository": "tests", "elsewhere": "../repository/tests"}[root]
    config: Any = SimpleNamespace(rootpath=tmp_path / root, option=SimpleNamespace(), getvalue=lambda name: ["popen"])
    scheduling = pytest_xdist_make_scheduler(config, None)
    scopes = [scheduling._split_scope(f"{below}/test_{name}.py::test") for name in ("one", "two", "alone")]
    assert scopes == ["shared_ray", "shared_ray", f"{below}/test_alone.py"]
