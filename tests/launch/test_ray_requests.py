"""What a Ray cluster is sent, letter by letter, with each profile that is shipped; and every recipe with each of them.

REGENERATE_GOLDEN=1 pytest tests/launch/test_ray_requests.py       writes tests/golden/launch anew; read the diff
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from oar_scale.config.loading import load_recipe
from oar_scale.launch import dry_run
from oar_scale.launch.job_specs import Step
from oar_scale.launch.profile import RayProfile, load_profile
from oar_scale.launch.ray_jobs import describe

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
FOLDER = "folder=/shared/me"
STEPS = {"run": [Step(())], "chain": [Step(("pretrain", "extract")), Step(("finetune",))]}
PROFILES = [path for path in sorted((ROOT / "cluster" / "ray").glob("*.yaml")) if YAML(typ="safe").load(path).get("type") == "ray"]


def requests(path: Path) -> dict[str, str]:
    """By the name of the golden file; the recipe that goes with them is another test's."""
    profile = load_profile(str(path), [FOLDER])
    assert isinstance(profile, RayProfile)
    recipe = load_recipe(str(ROOT / "recipes" / "smoke.yaml"))
    return {f"ray-{path.stem}-{name}.yaml": describe(recipe, profile, steps).partition("---\n")[0] for name, steps in STEPS.items()}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_the_requests_are_as_they_were_read_and_approved(path: Path) -> None:
    for name, text in requests(path).items():
        if os.environ.get("REGENERATE_GOLDEN"):
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text(), f"{name} differs: see the head of this file"


def test_no_golden_request_is_without_its_profile() -> None:
    assert {path.name for path in GOLDEN.glob("ray-*.yaml")} == {name for path in PROFILES for name in requests(path)}
    assert {path.stem for path in PROFILES} == {"dev", "example"}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_recipe_dry_runs_with_every_profile_and_goes_with_it_whole(path: Path, tmp_path: Path) -> None:
    profile = load_profile(str(path), [FOLDER])
    assert isinstance(profile, RayProfile)
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        (text,) = dry_run(str(recipe), str(path), profile_overrides=[FOLDER])
        request, _, sent = text.partition("---\n")
        assert YAML(typ="safe").load(request)["entrypoint"].endswith("--folder=/shared/me")
        (tmp_path / "sent.yaml").write_text(sent)
        given, asked = load_recipe(str(tmp_path / "sent.yaml")), load_recipe(str(recipe))
        assert given.model_dump(exclude={"parallel"}) == asked.model_dump(exclude={"parallel"})
        assert given.parallel.placement == (profile.placement or asked.parallel.placement)
        assert given.parallel.gpu_type == (profile.gpu_type or asked.parallel.gpu_type)
