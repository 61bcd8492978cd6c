"""Paths in recipes and profiles: ``~`` and variables are expanded where a person wrote them, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from oar_scale.config.loading import dump_recipe, load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.config.section import Section
from oar_scale.errors import UserError
from oar_scale.launch.profile import Container, RayProfile, load_profile
from oar_scale.run.context import Run
from oar_scale.training.job import TrainingJob

SLURM = 'type: slurm\ncpus_per_node: 8\ntime: "01:00:00"\n'


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (("HOME", "/home/me"), ("SCRATCH", "/scratch/a$b"), ("EMPTY", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "mine.yaml").write_text(f"name: mine\n{text}")
    return load_recipe(str(folder / "mine.yaml"), overrides)


def test_every_path_of_a_recipe_is_expanded(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "run_dir: ~/runs/x\n"
        "storage: {root: $SCRATCH/runs}\n"
        "data: {source: {type: table, path: ~/list.csv, root: '${SCRATCH}/photos'}}\n"
        "tokenizer: {image: {weights: ~/vq.safetensors}, text: {type: open_clip, architecture: x, weights: $HOME/clip.pt}}\n"
        "model: {weights: s3://bucket/$SCRATCH/~/model.safetensors}\n"
        "finetune: {mix: [{shards: ~/more}]}\n",
        "pretrain.mix=[{shards: $SCRATCH/$$5/more}]",
    )
    source = recipe.data.source
    assert (recipe.run_dir, recipe.root) == ("/home/me/runs/x", "/scratch/a$b/runs")
    assert source.type == "table" and (source.path, source.root) == ("/home/me/list.csv", "/scratch/a$b/photos")
    assert recipe.tokenizer.image.weights == "/home/me/vq.safetensors"
    assert recipe.tokenizer.text.type == "open_clip" and recipe.tokenizer.text.weights == "/home/me/clip.pt"
    assert recipe.model.weights == "s3://bucket/$SCRATCH/~/model.safetensors", "URLs are left alone"
    assert (recipe.finetune.mix[0].shards, recipe.pretrain.mix[0].shards) == ("/home/me/more", "/scratch/a$b/$5/more")


def test_the_folder_of_a_run_is_no_url(tmp_path: Path) -> None:
    """It would become a folder called ``s3:`` here."""
    for url in ("s3://bucket/x", "file:///x"):
        with pytest.raises(UserError, match=f"run_dir = {url}\n.*no URL.\n.*storage.root"):
            load(tmp_path, f"run_dir: {url}\n")
        with pytest.raises(UserError, match=f"storage.scratch_dir = {url}\n.*no URL"):
            load(tmp_path, f"storage: {{scratch_dir: {url}}}\n")


@pytest.mark.parametrize("url", ["gs://bucket/x", "S3://bucket/x", "s3:/bucket/x", "file:///x", "hf://x"])
def test_a_storage_that_nobody_serves_is_refused_at_once(url: str, tmp_path: Path) -> None:
    """All results would go into a folder called ``gs:`` here."""
    with pytest.raises(UserError, match=f"storage.root = {url}\n.*not known here.\n.*s3://bucket/prefix"):
        load(tmp_path, f"storage: {{root: {url}}}\n")


PATH_WORDS = {"path", "root", "url", "weights", "captions", "names", "shards", "folder", "image", "mounts"}


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    yield kind
    for below in kind.__subclasses__():
        yield from sections(below)


def test_every_field_that_is_a_path_has_the_type_of_one() -> None:
    """The rule follows the type: a new field for a path cannot be forgotten."""
    unmarked = {
        f"{section.__name__}.{name}"
        for section in sections(Section)
        for name, field in section.model_fields.items()
        if (name in PATH_WORDS or name.endswith(("_dir", "_path", "_file"))) and "str" in str(field.annotation)
        if not field.metadata and not any(word in str(field.annotation) for word in ("AfterValidator", "BeforeValidator", "expanded on"))
    }
    # A column, or a text with columns in braces; and a folder of another machine, which may name no home of this one.
    assert unmarked == {"TableSource.image", "RayProfile.folder"}


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("run_dir=$NOT_SET/x", "run_dir = $NOT_SET/x\n  the variable NOT_SET is not set"),
        ("storage.root=${EMPTY}/x", "the variable EMPTY is not set"),
        ("run_dir=${SCRATCH:-/tmp}/x", "${SCRATCH:-/tmp} is no variable"),
        ("run_dir=$(pwd)/x", "$(pwd): commands are not run here"),
        ("storage.scratch_dir=${SLURM_TMPDIR:-/tmp}/x", "${SLURM_TMPDIR:-/tmp} is no variable"),
        ("storage.cache_dir=$(mktemp -d)/x", "$(mktemp -d): commands are not run here"),
        ("storage.cache_dir=$MYTOKEN/x", "MYTOKEN is the name of a secret"),
        ("data.source={type: folder, path: ~}", "put the tilde in quotes"),
        ("data.source={type: folder, path: ~no-such-user/x}", "there is no home folder of ~no-such-user here"),
    ],
)
def test_what_cannot_be_expanded_is_named(tmp_path: Path, setting: str, why: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, "", setting)
    assert why in str(error.value)


@pytest.mark.parametrize("path", ["~x", "~", "$HOME", "$(x)", "a$(", "$$", "$~x", "a$", "${b", "x:$$", "$~", "~$x/$$~"])
def test_a_job_works_where_the_recipe_was_read(tmp_path: Path, path: str) -> None:
    """A stored recipe is read as it was meant, whatever variables are set there, and whatever signs the folders have."""
    (tmp_path / "stored.yaml").write_text(dump_recipe(Recipe(name="x", run_dir=path)))
    assert load_recipe(str(tmp_path / "stored.yaml")).run_dir == path


def test_a_disk_of_the_node_is_looked_up_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``$SLURM_TMPDIR`` exists in the job only; the recipe is read where it does not."""
    recipe = load(tmp_path, "storage: {scratch_dir: $NOT_SET/scratch, cache_dir: ~/cache}\n")
    (tmp_path / "stored.yaml").write_text(dump_recipe(recipe))
    run = Run(load_recipe(str(tmp_path / "stored.yaml")))
    job = TrainingJob(run.recipe, "pretrain", run.at(), run.local(), "", "")
    with pytest.raises(UserError, match=r"storage\.scratch_dir = \$NOT_SET/scratch\n  the variable NOT_SET is not set"):
        _ = run.scratch
    monkeypatch.setenv("NOT_SET", "/local/17")
    monkeypatch.setenv("HOME", "/home/of-the-node")
    assert (run.scratch, job.scratch) == ("/local/17/scratch", "/local/17/scratch")
    assert (run.cache, job.cache) == ("/home/of-the-node/cache", "/home/of-the-node/cache")


def test_a_base_may_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("seed: 5\n")
    assert load(tmp_path, "extends: ~/base.yaml\n").seed == 5
    with pytest.raises(UserError, match=r"extends = \$NOT_SET/base.yaml\n  the variable NOT_SET is not set"):
        load(tmp_path, "extends: $NOT_SET/base.yaml\n")


def test_paths_of_profiles_follow_the_same_rule(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(SLURM + "container: {engine: apptainer, image: ~/oar.sif, mounts: [$HOME/data]}\n")
    slurm = load_profile(str(path))
    assert slurm.type == "slurm" and slurm.container == Container(engine="apptainer", image="/home/me/oar.sif", mounts=("/home/me/data",))
    path.write_text("type: ray\naddress: http://head:8265\nworking_dir: ~/code\n")
    ray = load_profile(str(path))
    assert isinstance(ray, RayProfile) and ray.working_dir == "/home/me/code"
    with pytest.raises(UserError, match="~/runs would be a home folder of this machine"):
        load_profile(str(path), ["folder=~/runs"])
    with pytest.raises(UserError, match=r"cluster.yaml:4  container.image = .*\n  the variable NOT_SET is not set"):
        path.write_text(SLURM + "container: {engine: apptainer, image: $NOT_SET/oar.sif}\n")
        load_profile(str(path))
