"""What the documentation tells a user to type exists, and what it shows runs."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oar_scale import cli
from oar_scale.cli import main
from oar_scale.config.loading import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "evidence").glob("*.yaml")])
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_short(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert recipe.name == path.stem
    assert len(path.read_text().splitlines()) <= 40


def test_every_recipe_and_file_the_readme_names_exists() -> None:
    named = set(re.findall(r"`(recipes/[\w./-]+|docs/[\w./-]+)`", README)) | set(re.findall(r"\]\(((?!http)[\w./-]+)\)", README))
    assert len(named) >= 8
    assert not [name for name in named if not (ROOT / name).exists()]


FOLDERS = (".ci", "cluster", "docs", "oar_scale", "recipes", "tests", "tools")
SOURCES = (".py", ".md", ".yaml", ".toml", ".j2", ".sh")


def repository_paths(text: str) -> set[str]:
    """The words in backticks that are paths of this repository.

    They begin with one of its folders, or name a source file. A run's files are none of them (they are JSON, tars and tables), nor is
    ``mine.yaml``, which stands for a recipe of the reader's own.
    """
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    words = {
        word
        for span in spans
        for word in span.split()
        if re.fullmatch(r"[\w./*-]+", word) and not word.startswith(("/", "...")) and Path(word).stem != "mine"
    }
    return {word for word in words if (word.split("/")[0] in FOLDERS and "/" in word) or (word.endswith(SOURCES) and word not in SOURCES)}


def is_there(path: str) -> bool:
    """Whether the repository has it, from its top or below a folder that the text leaves out; ``*`` and capitals stand for a name."""
    if (ROOT / path).exists():
        return True
    pattern = re.sub(r"\b[A-Z]{2,}\b", "*", path).rstrip("/")
    return any(ROOT.glob(pattern)) or any(any((ROOT / folder).rglob(pattern)) for folder in FOLDERS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_repository_path_in_the_docs_exists(document: Path) -> None:
    missing = sorted(path for path in repository_paths(document.read_text()) if not is_there(path))
    assert not missing, f"{document.name} names {missing}"


def test_a_wrong_path_in_the_docs_would_be_noticed() -> None:
    wrong = ["oar_scale/gone", "training/gone.py", "docs/gone.md", "gone.py", "recipes/gone-NAME.yaml", "tests/test_gone.py"]
    text = "see " + ", ".join(f"`{path}`" for path in wrong) + " and `python tools/gone.py --seconds`"
    assert repository_paths(text) == {*wrong, "tools/gone.py"}
    assert not [path for path in repository_paths(text) if is_there(path)]
    known = ["oar_scale/registry.py", "config/*_sections.py", "recipes/base/model-NAME.yaml", "spiral.py", "tests/", ".ci/run"]
    assert all(is_there(path) for path in known)
    assert not repository_paths("`runs/quickstart/report`, `stages/tokenizer.json`, `/metrics`, `s3://bucket/prefix`, `train/step`")


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


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((dict(each.choices) for each in parser._actions if isinstance(each, argparse._SubParsersAction)), {})


def unknown_options(text: str) -> list[str]:
    """The options that a text has in a command ``oar VERB ...`` though neither the verb nor an action of it has them."""
    verbs, unknown = verbs_of(cli._parser()), []
    for names, rest in re.findall(r"(?:^ +|`)oar ([a-z|]+)([^`\n]*)", text, re.MULTILINE):
        options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.split(r" {3,}", rest)[0])
        for name in names.split("|"):
            known = [verbs[name], *verbs_of(verbs[name]).values()] if name in verbs else []
            unknown += [f"oar {name} {each}" for each in options if not any(each in parser.format_help() for parser in known)]
    return unknown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_of_a_command_in_the_docs_exists(document: Path) -> None:
    assert not unknown_options(document.read_text())


def test_every_option_is_in_a_document() -> None:
    options = set[str]()
    parsers = [cli._parser()]
    while parsers:
        parser = parsers.pop()
        parsers += verbs_of(parser).values()
        options |= {each.option_strings[-1] for each in parser._actions if each.option_strings}
    text = "".join(document.read_text() for document in DOCUMENTS)
    assert len(options) > 80
    assert not sorted(each for each in options - {"--help", "--version"} if not re.search(rf"{each}(?![\w-])", text))


def test_a_wrong_option_in_the_docs_would_be_noticed() -> None:
    text = "    oar run RECIPE --form x    --not-ours\nsee `oar data stats URL --jsn`, `oar sampel --count 3` and `oar sample --count 3`"
    assert unknown_options(text) == ["oar run --form", "oar data --jsn", "oar sampel --count"]


def test_recipe_origin_names_the_file_that_set_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", str(ROOT / "recipes" / "quickstart.yaml"), "--origin", "-o", "finetune.steps=7"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["finetune.steps"] == "-o"
    assert "quickstart.yaml:" in lines["pretrain.steps"] and "emoji-5m.yaml:" in lines["model.dim"]


def test_a_typo_gives_one_clear_error_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(ROOT / "recipes" / "smoke.yaml"), "-o", "pretrain.stepps=3"]) == 2
    error = capsys.readouterr().err
    assert "pretrain.stepps" in error and "steps" in error and "Traceback" not in error


@pytest.mark.parametrize("guide", ["model.md", "checkpoints.md", "order-policies.md", "sampling.md", "editing.md", "sharing.md"])
def test_the_python_in_a_guide_runs(guide: str, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / guide).read_text(), re.DOTALL))
    check = code + "\nassert [image.size for image in images] == [(32, 32)] * 2\n"
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf")}  # where diffusers copies a pipeline's code to
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.png"))
