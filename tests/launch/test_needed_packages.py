"""Packages of extras that a recipe needs are looked for where the job will run, and before it does anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_refusals import fake

from oar_scale.cli import main
from oar_scale.config import extras
from oar_scale.config.loading import load_recipe
from oar_scale.errors import UserError
from oar_scale.launch import ray_entry
from oar_scale.launch.jobs import dry_run
from oar_scale.launch.needed_packages import check_packages, is_environment_of
from oar_scale.launch.profile import Container, SlurmProfile, load_profile

ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "recipes" / "smoke.yaml")
FAULT = "stage evaluate: the distance of features needs the package no_such_package: pip install 'oar_scale[eval]'"


@pytest.fixture
def without_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.MODULES, "eval", ("no_such_package",))


def profile(folder: Path, **fields: object) -> str:
    path = folder / "profile.yaml"
    path.write_text(json.dumps({"type": "slurm", "cpus_per_node": 1, "time": "00:10:00", **fields}))
    return str(path)


@pytest.mark.usefixtures("without_eval")
def test_a_run_ends_before_its_first_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", SMOKE, "-o", f"run_dir={tmp_path}/run"]) == 2
    printed = capsys.readouterr()
    assert FAULT in printed.err and "[1/" not in printed.out
    assert not list(tmp_path.glob("run/images/**/*.tar"))


def test_only_what_the_recipe_has_is_needed(tmp_path: Path, without_eval: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.MODULES, "demo", ("no_other_package",))
    recipe = load_recipe(SMOKE)
    stages = [stage.name for stage in recipe.stages()]
    assert set(extras.missing_packages(recipe, stages)) == {"data", "evaluate"}
    assert set(extras.missing_packages(recipe, ["pretrain", "data"])) == {"data"}
    perceptual = load_recipe(SMOKE, ["data.source={type: folder, path: x}", "tokenizer.image.training.perceptual_weight=1"])
    assert set(extras.missing_packages(perceptual, stages)) == {"tokenizer", "evaluate"}


@pytest.mark.usefixtures("without_eval")
def test_a_submission_is_refused_where_jobs_share_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(tmp_path, monkeypatch, sbatch="echo 7", squeue="", scancel="", scontrol="", sinfo="")
    submit = ["submit", SMOKE, "-o", f"run_dir={tmp_path}/run", "--cluster"]
    assert main([*submit, profile(tmp_path)]) == 2
    assert FAULT in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*submit, profile(tmp_path), "--stages", "data,pretrain"]) == 0, "those stages need no features"


@pytest.mark.usefixtures("without_eval")
def test_finished_stages_need_no_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a submission, a chain's first command and a Ray job; what has to be done again counts."""
    fake(tmp_path, monkeypatch, sbatch="echo 7", squeue="", scancel="", scontrol="", sinfo="")
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "runs" / "new" / "stages" / "evaluate.json"
    marker.parent.mkdir(parents=True)
    submit = ["submit", SMOKE, "-o", "run_dir=runs/new", "--cluster", profile(tmp_path)]
    for stale, code in (({"stale": "finetune"}, 2), ({}, 0)):
        marker.write_text(json.dumps({"stage": "evaluate", "seconds": 1, **stale}))
        assert main(submit) == code, capsys.readouterr().err
    stored = "runs/new/jobs/recipe-1.yaml"
    check_packages(load_recipe(stored), ["pretrain", "evaluate"])
    monkeypatch.setattr(ray_entry.signal, "signal", lambda *_: None)
    monkeypatch.setattr(ray_entry.subprocess, "call", lambda command, env: 0)
    assert ray_entry.main(["--max-failures", "2", "--backoff-s", "0.01", "--recipe", stored, "pretrain", "evaluate"]) == 0
    marker.unlink()
    with pytest.raises(UserError, match="no_such_package"):
        check_packages(load_recipe(stored), ["pretrain", "evaluate"])


def test_whether_jobs_share_the_environment_is_read_from_the_profile() -> None:
    plain = SlurmProfile(type="slurm", cpus_per_node=1, time="00:10:00")
    assert is_environment_of(plain)
    assert is_environment_of(plain.model_copy(update={"setup": ("module load x", f"source {sys.prefix}/bin/activate")}))
    assert not is_environment_of(plain.model_copy(update={"setup": ("source /elsewhere/bin/activate",)}))
    assert not is_environment_of(plain.model_copy(update={"container": Container(engine="enroot", image="x.sqsh")}))
    assert not is_environment_of(load_profile(str(ROOT / "cluster" / "ray" / "example.yaml")))


def test_the_first_job_of_a_chain_looks_for_all_stages() -> None:
    first, second = dry_run(SMOKE, str(ROOT / "cluster" / "slurm" / "gpu-enroot.yaml"), "data+tokenizer,evaluate", (), ())
    commands = [line for line in first.splitlines() if line.startswith("run ")]
    assert commands[0].startswith("run python -m oar_scale.launch.needed_packages ") and commands[0].endswith(" data tokenizer evaluate")
    assert commands[1].startswith("run oar prepare ") and "needed_packages" not in second


def test_the_command_of_a_chain_ends_with_code_2(tmp_path: Path) -> None:
    """In an environment in which the extra is not installed: its modules are hidden."""
    hide = "import sys; sys.modules['efficientnet_lite_pytorch'] = None; sys.argv[1:] = [{!r}, *{!r}]; import runpy; "
    run = hide + "runpy.run_module('oar_scale.launch.needed_packages', run_name='__main__')"
    for stages, code in ((["data", "evaluate"], 2), (["data"], 0)):
        done = subprocess.run([sys.executable, "-c", run.format(SMOKE, stages)], capture_output=True, text=True)
        assert done.returncode == code and ("oar_scale[eval]" in done.stderr) == (code == 2), done.stderr


@pytest.mark.usefixtures("without_eval")
def test_a_ray_job_looks_before_its_first_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ray_entry.signal, "signal", lambda *_: None)
    monkeypatch.setattr(ray_entry.subprocess, "call", lambda command, env: pytest.fail(f"called {command}"))
    monkeypatch.setenv(ray_entry.RECIPE, "name: x\n")
    assert ray_entry.main(["--max-failures", "2", "--backoff-s", "0.01", "pretrain", "evaluate"]) == 2
    assert FAULT in capsys.readouterr().out


def test_the_stored_recipe_of_a_slurm_job_has_absolute_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, sbatch="echo 7", squeue="", scancel="", scontrol="", sinfo="")
    monkeypatch.chdir(tmp_path)
    assert main(["submit", SMOKE, "--cluster", profile(tmp_path), "-o", "storage.root=store"]) == 0
    stored = load_recipe(str(tmp_path / "runs/smoke/jobs/recipe-1.yaml"))
    assert (stored.run_dir, stored.storage.root) == (f"{tmp_path}/runs/smoke", f"{tmp_path}/store")
