"""What a Ray cluster is sent: each kind of request letter by letter, and every recipe with every shipped profile.

REGENERATE_GOLDEN=1 pytest tests/launch/test_ray_requests.py       writes tests/golden/launch anew; read the diff
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from oar_scale.config.loading import load_recipe
from oar_scale.launch import dry_run, ray_entry
from oar_scale.launch.job_specs import JobSpec
from oar_scale.launch.profile import RayProfile, load_profile
from oar_scale.launch.ray_jobs import describe

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
FOLDER = "folder=/shared/me"
RUN, CHAIN = [JobSpec(())], [JobSpec(("pretrain", "extract")), JobSpec(("finetune",))]
KINDS = {"ray-dev-run.yaml": ("dev", RUN), "ray-example-chain.yaml": ("example", CHAIN)}
"""Profile and jobs of the requests that are stored."""
PROFILES = [path for path in sorted((ROOT / "cluster" / "ray").glob("*.yaml")) if YAML(typ="safe").load(path).get("type") == "ray"]


def request(path: Path, specs: list[JobSpec]) -> str:
    """The request without the recipe that goes with it, which is another test's."""
    profile = load_profile(str(path), [FOLDER])
    assert isinstance(profile, RayProfile)
    recipe = load_recipe(str(ROOT / "recipes" / "smoke.yaml"))
    return describe(recipe, profile, specs).partition("---\n")[0]


@pytest.mark.parametrize("name", KINDS)
def test_requests_are_as_they_were_read_and_approved(name: str) -> None:
    stem, specs = KINDS[name]
    text = request(ROOT / "cluster" / "ray" / f"{stem}.yaml", specs)
    if os.environ.get("REGENERATE_GOLDEN"):
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text(), f"{name} differs: see the head of this file"


def test_each_ray_profile_has_a_golden_request() -> None:
    assert {path.name for path in GOLDEN.glob("ray-*.yaml")} == set(KINDS)
    assert {path.stem for path in PROFILES} == {profile for profile, _ in KINDS.values()}


@pytest.mark.parametrize("specs", [RUN, CHAIN], ids=["run", "chain"])
@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_request_has_the_stages_and_settings_of_its_profile(path: Path, specs: list[JobSpec]) -> None:
    profile = load_profile(str(path), [FOLDER])
    assert isinstance(profile, RayProfile)
    sent = YAML(typ="safe").load(request(path, specs))
    stages = [stage for spec in specs for stage in spec.stages]
    limits = [f"--max-failures={profile.max_failures}", f"--backoff-s={profile.backoff_s}", "--folder=/shared/me"]
    assert sent["address"] == profile.address
    assert sent["entrypoint"] == " ".join(["exec", profile.python, "-m", "oar_scale.launch.ray_entry", *limits, *stages])
    assert profile.env.items() <= sent["runtime_env"]["env_vars"].items()


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_recipe_is_sent_whole_with_every_profile(path: Path, tmp_path: Path) -> None:
    profile = load_profile(str(path), [FOLDER])
    assert isinstance(profile, RayProfile)
    for recipe in sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "evidence").glob("*.yaml")]):
        (text,) = dry_run(str(recipe), str(path), profile_overrides=[FOLDER])
        request, _, sent = text.partition("---\n")
        assert YAML(typ="safe").load(request)["entrypoint"].endswith("--folder=/shared/me")
        (tmp_path / "sent.yaml").write_text(sent)
        given, original = load_recipe(str(tmp_path / "sent.yaml")), load_recipe(str(recipe))
        assert given.model_dump(exclude={"parallel"}) == original.model_dump(exclude={"parallel"})
        assert given.parallel.placement == (profile.placement or original.parallel.placement)
        assert given.parallel.gpu_type == (profile.gpu_type or original.parallel.gpu_type)


def test_a_ray_job_that_was_stopped_begins_no_further_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def call(command: list[str], env: dict[str, str]) -> int:
        begun.append(command[3])
        os.kill(os.getpid(), signal.SIGTERM)
        return 0  # it was at its end

    monkeypatch.setattr(ray_entry.subprocess, "call", call)
    monkeypatch.setattr(ray_entry, "check_packages", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        options = ["--max-failures", "3", "--backoff-s", "0", "--recipe", str(ROOT / "recipes" / "smoke.yaml")]
        assert ray_entry.main([*options, "pretrain", "extract"]) == os.EX_TEMPFAIL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert begun == ["train"]
