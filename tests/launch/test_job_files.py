"""The Slurm job files: each kind of job letter by letter, and every stage with every shipped profile checked by bash and shellcheck.

REGENERATE_GOLDEN=1 pytest tests/launch/test_job_files.py       writes the golden files anew; read the diff
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from second_user import UID

from oar_scale.cli import main
from oar_scale.config.loading import load_recipe
from oar_scale.launch.job_specs import JobSpec
from oar_scale.launch.jobs import JobFile, dry_run, job_files
from oar_scale.launch.profile import Container, SlurmProfile, load_profile
from oar_scale.launch.slurm import container

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
PROFILES = sorted((ROOT / "cluster" / "slurm").glob("*.yaml"))
STAGES: list[tuple[str, ...]] = [
    (),
    ("data",),
    ("data", "tokenizer"),
    *((stage,) for stage in ("tokenizer", "pretrain", "extract", "finetune", "evaluate", "report")),
]
KINDS: list[tuple[str, tuple[str, ...]]] = [
    ("dev", ()),  # a whole run with Ray, no node check
    ("gpu", ("pretrain",)),  # one training stage, with a node check
    ("gpu", ("data", "tokenizer")),  # two stages that share a job without Ray
    ("gpu", ("extract",)),  # a job array
    ("gpu-gres", ("pretrain",)),  # GPUs by --gres
    ("gpu-apptainer", ()),
    ("gpu-enroot", ()),
]
"""Profile and stages of the job files that are stored."""


def job_file(profile: str, stages: tuple[str, ...]) -> JobFile:
    loaded = load_profile(str(ROOT / "cluster" / "slurm" / f"{profile}.yaml"))
    assert isinstance(loaded, SlurmProfile)
    recipe = load_recipe(str(ROOT / "recipes" / "smoke.yaml"))
    (file,) = job_files(recipe, loaded, [JobSpec(stages)], folder="/home/me/work")
    return file


def golden_files() -> dict[str, str]:
    """The text by the name of the golden file."""
    files = [(profile, job_file(profile, stages)) for profile, stages in KINDS]
    return {f"{profile}-{file.name}.sbatch": file.text for profile, file in files}


def test_job_files_are_as_they_were_read_and_approved() -> None:
    for name, text in golden_files().items():
        if os.environ.get("REGENERATE_GOLDEN"):
            GOLDEN.mkdir(exist_ok=True)
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text(), f"{name} differs: see the head of this file"


def test_each_profile_has_a_golden_job_file() -> None:
    assert {path.stem for path in PROFILES} == {profile for profile, _ in KINDS}
    assert {path.name for path in GOLDEN.glob("*.sbatch")} == set(golden_files())


def alike(profile: str, stages: tuple[str, ...]) -> bool:
    """A profile and stages that differ from others in nothing but the command: a whole run, a training and an array are of each profile."""
    return profile != "gpu" and stages not in ((), ("pretrain",), ("extract",))


CHECKED = [
    pytest.param(
        path.stem, stages, id=f"{path.stem}-{'-'.join(stages) or 'run'}", marks=[pytest.mark.slow] if alike(path.stem, stages) else []
    )
    for path in PROFILES
    for stages in STAGES
]


@pytest.mark.parametrize(("profile", "stages"), CHECKED)
def test_bash_and_shellcheck_accept_each_job_file(profile: str, stages: tuple[str, ...], tmp_path: Path) -> None:
    """The job file itself, and the scripts that it passes to ``srun ... bash -c``."""
    path = tmp_path / "job.sbatch"
    path.write_text(job_file(profile, stages).text)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    inner = [text.replace("'\\''", "'") for text in re.findall(r"(?:bash -c |step=)'\n((?:[^']|'\\'')*)'", path.read_text())]
    assert inner, "no script of a step was found"
    for text in inner:
        assert subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck") or os.environ.get("OAR_NO_SKIP") == "1":
        checked = subprocess.run(["shellcheck", "--severity=warning", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_a_job_refuses_a_folder_that_another_user_has_made(tmp_path: Path) -> None:
    """The folder of Ray's sockets: made anew it lets nobody else in; a link in its place, or somebody else's folder, is not used."""
    text = job_file("dev", ()).text
    assert re.search(r"OAR_RAY_FOLDER=/tmp/oar-\$SLURM_JOB_ID-\$attempt-\$mark\n", text) and "mark=$(od -An -tx1 -N4 /dev/urandom" in text
    (line,) = (line for line in text.splitlines() if "mkdir -m 700" in line)
    mine, link, target = tmp_path / "mine", tmp_path / "link", tmp_path / "target"
    target.mkdir()
    link.symlink_to(target)

    def make(folder: Path) -> int:
        return subprocess.run(["bash", "-c", line], env={**os.environ, "OAR_RAY_FOLDER": str(folder)}, stderr=subprocess.DEVNULL).returncode

    assert make(mine) == 0 and stat.S_IMODE(mine.stat().st_mode) == 0o700
    assert make(mine) == 0, "two nodes on one machine have one folder"
    assert make(link) == 1 and not list(target.iterdir())
    if os.geteuid() == 0:
        os.chown(target, UID, UID)
        assert make(target) == 1


@pytest.mark.parametrize("image", ["nvcr.io#nvidia/pytorch:24.10-py3", "/shared/a;touch${IFS}ran", "a|b&c>d(e)*?[f]#g"])
def test_an_image_is_one_word_of_the_shell(image: str, tmp_path: Path) -> None:
    """In a job file, and in what the doctor runs in an allocation: whatever its name, no part of it is a command."""
    for engine in ("enroot", "apptainer"):
        profile = load_profile(str(ROOT / "cluster" / "slurm" / "dev.yaml"))
        assert isinstance(profile, SlurmProfile)
        contained = profile.model_copy(update={"container": Container(engine=engine, image=image.replace("$", ""), mounts=("/a;b",))})
        words = container(contained, ("/run with blanks", "/it's"))
        script = f"printf '%s\\n' {words['srun_container']}{words['exec_container']}"
        shown = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert any(line.endswith(image.replace("$", "")) for line in shown.stdout.splitlines()) and not shown.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("profile", [path.stem for path in PROFILES])
def test_a_job_file_has_what_its_stages_and_profile_need(profile: str) -> None:
    """Of each stage: its command, Ray where it needs one, the check of the nodes, the container, and the array of the extraction."""
    loaded = load_profile(str(ROOT / "cluster" / "slurm" / f"{profile}.yaml"))
    assert isinstance(loaded, SlurmProfile)
    for stages in STAGES:
        spec, text = JobSpec(stages), job_file(profile, stages).text
        resources, array = loaded.resources(spec.single_stage), loaded.array(spec.single_stage)
        commands = [" ".join(command) for command in spec.commands("/home/me/work/runs/smoke/jobs/recipe-1.yaml", array=bool(array))]
        assert re.findall("^run oar (.*)$", text, re.MULTILINE) == commands
        assert ("ray start" in text) == (spec.needs_ray and not array)
        assert ("#SBATCH --array" in text) == bool(array)
        assert ("checks=()" in text) == bool(resources.node_check)
        assert ("apptainer exec" in text, "--container-image" in text) == (profile == "gpu-apptainer", profile == "gpu-enroot")
        assert f"#SBATCH --time={resources.time}\n" in text and f"#SBATCH --job-name=smoke-{spec.name}\n" in text
        assert f"#SBATCH --nodes={1 if array else resources.nodes}\n" in text and "#SBATCH --requeue\n" in text


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_every_recipe_dry_runs_with_every_profile(profile: Path) -> None:
    for recipe in sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "evidence").glob("*.yaml")]):
        (whole,) = dry_run(str(recipe), str(profile), None, (), ())
        assert f"run oar run {os.getcwd()}/runs/{recipe.stem}/jobs/recipe-1.yaml\n" in whole
        assert "#SBATCH --requeue" in whole


def test_a_dry_run_of_a_chain_names_the_order_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke, dev = str(ROOT / "recipes" / "smoke.yaml"), str(ROOT / "cluster" / "slurm" / "dev.yaml")
    arguments = ["--stages", "tokens,pretrain+extract", "--dry-run", "-o", f"run_dir={tmp_path}/run", "-p", "time=0-02:00:00"]
    assert main(["submit", smoke, "--cluster", dev, *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("#!/bin/bash") == 2 and "# after tokens succeeded:" in printed
    assert printed.count("#SBATCH --time=0-02:00:00") == 2
    assert not list(tmp_path.iterdir())
