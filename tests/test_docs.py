"""What the documentation tells a user to type exists, and what it shows runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from oar_scale.cli import main
from oar_scale.config.loading import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_short(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert recipe.name == path.stem
    assert len(path.read_text().splitlines()) <= 40


def test_every_recipe_and_file_the_readme_names_exists() -> None:
    named = set(re.findall(r"`(recipes/[\w./-]+|docs/[\w./-]+)`", README)) | set(re.findall(r"\]\(((?!http)[\w./-]+)\)", README))
    assert len(named) >= 8
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_make_target_the_readme_names_exists() -> None:
    targets = set(re.findall(r"`?make ([a-z0-9-]+)", README))
    assert {"quickstart", "quickstart-s3", "test"} <= targets
    for target in targets:
        dry = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr


def test_what_make_test_cluster_leaves_out_is_one_test() -> None:
    (word,) = re.findall(r"^LONGEST := (\w+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    tests = [name for path in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)]
    assert sum(word in name for name in tests) == 1


def test_every_verb_the_readme_names_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = {verb for line in re.findall(r"^ +oar ([a-z|]+) ", README, re.MULTILINE) for verb in line.split("|")}
    assert {"run", "train", "sample", "recipe", "extract"} <= verbs
    for verb in verbs:
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
    assert "--from" in capsys.readouterr().out


def test_recipe_origin_names_the_file_that_set_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", str(ROOT / "recipes" / "quickstart.yaml"), "--origin", "-o", "finetune.steps=7"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["finetune.steps"] == "-o"
    assert "quickstart.yaml:" in lines["pretrain.steps"] and "emoji-5m.yaml:" in lines["model.dim"]


def test_a_typo_gives_one_clear_error_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(ROOT / "recipes" / "smoke.yaml"), "-o", "pretrain.stepps=3"]) == 2
    error = capsys.readouterr().err
    assert "pretrain.stepps" in error and "steps" in error and "Traceback" not in error


@pytest.mark.parametrize("guide", ["model.md", "checkpoints.md", "order-policies.md"])
def test_the_python_in_a_guide_runs(guide: str, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / guide).read_text(), re.DOTALL))
    check = code + "\nassert [image.size for image in images] == [(32, 32)] * 2\n"
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.png"))
