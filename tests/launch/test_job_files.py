"""The job files, letter by letter: what each kind of step becomes with each profile that is shipped.

REGENERATE_GOLDEN=1 pytest tests/launch/test_job_files.py       writes tests/golden/launch anew; read the diff
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from oar_scale.cli import main
from oar_scale.config.loading import load_recipe
from oar_scale.launch.job_specs import Step
from oar_scale.launch.jobs import dry_run, job_files
from oar_scale.launch.profile import SlurmProfile, load_profile

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
PROFILES = sorted((ROOT / "cluster" / "slurm").glob("*.yaml"))
STEPS = [
    Step(()),
    Step(("data",)),
    Step(("data", "tokenizer")),
    *(Step((stage,)) for stage in ("tokenizer", "pretrain", "extract", "finetune", "evaluate", "report")),
]


def rendered(path: Path) -> dict[str, str]:
    """By the name of the golden file."""
    profile = load_profile(str(path))
    assert isinstance(profile, SlurmProfile)
    recipe = load_recipe(str(ROOT / "recipes" / "smoke.yaml"))
    files = job_files(recipe, profile, STEPS, folder="/home/me/work")
    return {f"{path.stem}-{file.name}.sbatch": file.text for file in files}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_the_job_files_are_as_they_were_read_and_approved(path: Path) -> None:
    for name, text in rendered(path).items():
        if os.environ.get("REGENERATE_GOLDEN"):
            GOLDEN.mkdir(exist_ok=True)
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text(), f"{name} differs: see the head of this file"


def test_no_golden_file_is_without_its_profile() -> None:
    names = {name for path in PROFILES for name in rendered(path)}
    assert {path.name for path in GOLDEN.glob("*.sbatch")} == names


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sbatch")), ids=lambda path: path.stem)
def test_bash_and_shellcheck_find_nothing_in_a_job_file(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    inner = [text.replace("'\\''", "'") for text in re.findall(r"(?:bash -c |step=)'\n((?:[^']|'\\'')*)'", path.read_text())]
    assert inner, "no script of a step was found"
    for text in inner:
        assert subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck") or os.environ.get("OAR_NO_SKIP") == "1":
        checked = subprocess.run(["shellcheck", "--severity=warning", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_every_recipe_dry_runs_with_every_profile(profile: Path) -> None:
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        (whole,) = dry_run(str(recipe), str(profile), None, (), ())
        assert f"run oar run {os.getcwd()}/runs/{recipe.stem}/jobs/recipe-1.yaml\n" in whole
        assert "#SBATCH --requeue" in whole


def test_a_dry_run_of_a_chain_says_what_waits_for_what_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke, dev = str(ROOT / "recipes" / "smoke.yaml"), str(ROOT / "cluster" / "slurm" / "dev.yaml")
    words = ["--stages", "tokens,pretrain+extract", "--dry-run", "-o", f"run_dir={tmp_path}/run", "-p", "time=0-02:00:00"]
    assert main(["submit", smoke, "--cluster", dev, *words]) == 0
    printed = capsys.readouterr().out
    assert printed.count("#!/bin/bash") == 2 and "# after tokens succeeded:" in printed
    assert printed.count("#SBATCH --time=0-02:00:00") == 2
    assert not list(tmp_path.iterdir())
