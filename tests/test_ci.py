"""What ``.ci/run`` is told of failed tests: names to run once more, or nothing where not all tests have run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def failed_tests(folder: Path, *options: str) -> str:
    """What this repository's ``conftest.py`` writes when the tests of a folder have run."""
    names = folder / "failed"
    names.write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "OAR_"))}
    environment |= {"OAR_FAILED_TESTS": str(names), "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", str(folder), *options]
    ended = subprocess.run([*command, str(folder)], env=environment, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return names.read_text()


def test_a_module_that_cannot_be_imported_leaves_no_names_to_run_again(tmp_path: Path) -> None:
    """Its tests have not run at all, and those that failed may pass a second time. What could be imported runs, as under xdist."""
    (tmp_path / "test_fails.py").write_text("def test_fails():\n    raise AssertionError\n")
    assert failed_tests(tmp_path) == "test_fails.py::test_fails\n"
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    assert failed_tests(tmp_path, "--continue-on-collection-errors") == ""
