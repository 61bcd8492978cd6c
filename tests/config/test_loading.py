"""What a user reads when a recipe is wrong, and what a right one becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oar_scale.config.layers import read_layers
from oar_scale.config.loading import dump_recipe, fingerprint, load_recipe, recipe_origins
from oar_scale.config.schema import FolderSource, Recipe
from oar_scale.errors import UserError

MINIMAL = "name: mine\n"


@pytest.fixture(autouse=True)
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, so that errors show short paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def error_of(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_defaults_files_and_overrides_win_in_that_order() -> None:
    put("base/size.yaml", "model: {dim: 128, layers: 2}\nseed: 1\n")
    put("base/data.yaml", "seed: 2\ntokenizer: {views: [center, center_flip]}\n")
    path = put("mine.yaml", "extends: [base/size.yaml, base/data.yaml]\nname: mine\nmodel: {layers: 3}\ntokenizer: {views: [center]}\n")
    recipe = load_recipe(path, ["model.heads=2", "name=other"])
    assert (recipe.model.dim, recipe.model.layers, recipe.model.heads, recipe.model.dropout) == (128, 3, 2, 0.1)
    assert (recipe.seed, recipe.name, recipe.tokenizer.views) == (2, "other", ("center",))


def test_every_leaf_knows_where_it_was_set() -> None:
    put("base/size.yaml", "model:\n  dim: 128\n  layers: 2\n")
    path = put("sub/mine.yaml", "extends: ../base/size.yaml\nname: mine\nmodel:\n  layers: 3\n")
    origins = recipe_origins(path, ["model.heads=2"])
    assert origins["name"] == "sub/mine.yaml:2"
    assert origins["model.dim"] == "base/size.yaml:2"
    assert origins["model.layers"] == "sub/mine.yaml:4"
    assert origins["model.heads"] == "-o"
    assert origins["seed"] == origins["finetune.random_share"] == "(default)"


def test_one_field_of_finetune_keeps_its_random_share() -> None:
    assert load_recipe(put("a.yaml", MINIMAL), ["finetune.steps=3"]).finetune.random_share == 0.1


def test_a_source_of_another_type_replaces_the_old_one() -> None:
    put("base.yaml", "data: {source: {type: openmoji, limit: 100}, image_size: 64}\n")
    recipe = load_recipe(put("a.yaml", "extends: base.yaml\nname: a\ndata: {source: {type: folder, path: pictures}}\n"))
    assert recipe.data.source == FolderSource(type="folder", path="pictures")
    assert recipe.data.image_size == 64


def test_another_type_replaces_one_that_goes_without_saying() -> None:
    """A text section that does not say its type is SentencePiece's: its fields are not mixed with those of another type."""
    path = put("mine.yaml", MINIMAL + "tokenizer: {text: {vocab_size: 100, max_tokens: 8}}\n")
    labels = load_recipe(path, ["tokenizer.text={type: labels, classes: 4}"]).tokenizer.text
    assert labels == load_recipe(path, ["tokenizer.text.type=labels", "tokenizer.text.classes=4"]).tokenizer.text
    assert labels.type == "labels" and labels.classes == 4
    kept = load_recipe(path, ["tokenizer.text={type: sentencepiece, max_tokens: 9}"]).tokenizer.text
    assert kept.type == "sentencepiece" and (kept.vocab_size, kept.max_tokens) == (100, 9)


@pytest.mark.parametrize("project", ["team/project", "a:b", "50%", "x" * 129, " "])
def test_a_project_that_wandb_refuses_is_named_at_once(project: str) -> None:
    path = put("mine.yaml", MINIMAL)
    text = error_of(path, "observe.wandb=offline", f"observe.wandb_project='{project}'")
    assert text.startswith(f"-o  observe.wandb_project = {project[:77]}") and "W&B takes project names of 1 to 128 characters" in text
    assert "tags of 1 to 64" in error_of(path, "observe.wandb=online", f"observe.wandb_tags=[ok, {'x' * 65}]")
    assert load_recipe(path, ["observe.wandb=online", "observe.wandb_project=any name, really"]).observe.wandb == "online"


def test_yaml_is_1_2() -> None:
    recipe = load_recipe(put("a.yaml", "name: on\nrun_dir: 2026-01-02\nobserve: {wandb: off}\npretrain: {lr: 1e-3}\n"))
    assert (recipe.name, recipe.run_dir, recipe.observe.wandb, recipe.pretrain.lr) == ("on", "2026-01-02", "off", 0.001)
    assert "must be true or false" in error_of(put("b.yaml", "name: b\npipeline: {control: yes}\n"))


def test_a_conflict_shows_the_line_the_value_and_what_fits() -> None:
    path = put("mine.yaml", "name: mine\nparallel:\n  workers: 8\n  micro_batch: 12\npretrain:\n  global_batch: 256\n")
    assert error_of(path) == (
        "mine.yaml:4  parallel.micro_batch = 12\n"
        "  pretrain.global_batch 256 is not a multiple of micro_batch x workers = 12 x 8 = 96.\n"
        "  Nearest that fit: micro_batch 8 (accumulation 4) or 16 (accumulation 2)."
    )
    assert error_of(path, "parallel.micro_batch=5").startswith("-o  parallel.micro_batch = 5\n  pretrain.global_batch 256")


def test_a_decoupled_model_has_an_even_number_of_layers() -> None:
    path = put("mine.yaml", "name: mine\nmodel:\n  layout: decoupled\n  layers: 5\n")
    assert error_of(path) == (
        "mine.yaml:4  model.layers = 5\n"
        "  layout decoupled has half of its layers for the codes and half for the questions; 5 is odd.\n"
        "  Nearest that fit: 4 or 6."
    )
    assert error_of(path, "model.layers=1").endswith("Nearest that fit: 2.")


def test_a_grouped_model_has_defaults_of_its_own() -> None:
    model = load_recipe(put("a.yaml", "name: a\nmodel: {layout: grouped, dim: 96, heads: 2}\n"), []).model
    assert (model.norm_eps, model.ffn_hidden) == (1e-6, 384)
    assert load_recipe(put("b.yaml", "name: b\n"), ["model.layout=grouped"]).model.norm_eps == 1e-6
    assert load_recipe(put("c.yaml", "name: c\nmodel: {layout: grouped, norm_eps: 0.001}\n"), []).model.norm_eps == 1e-3
    assert load_recipe(put("d.yaml", "name: d\n"), []).model.norm_eps == 1e-5
    # Nothing rotates, so that heads may be of any width.
    assert load_recipe(put("e.yaml", "name: e\nmodel: {layout: grouped, dim: 90, heads: 6}\n"), []).model.dim == 90
    assert "dim 90 / heads 4 must be a whole number; e.g." in error_of(put("f.yaml", "name: f\nmodel: {layout: grouped, dim: 90}\n"))
    assert "and a multiple of 4" in error_of(put("g.yaml", "name: g\nmodel: {dim: 90, heads: 6}\n"))


def test_only_a_grouped_model_is_trained_on_groups() -> None:
    path = put("a.yaml", "name: a\nfinetune: {group_steps: [64, 8]}\n")
    assert error_of(path).startswith("a.yaml:2  finetune.group_steps = ")
    assert "only a model of layout grouped is trained to answer for several cells at once" in error_of(path)
    assert load_recipe(path, ["model.layout=grouped"]).finetune.group_steps == (64, 8)
    assert "group_steps" in error_of(put("b.yaml", "name: b\nmodel: {layout: grouped}\npretrain: {group_steps: [0]}\n"))


def test_a_conflict_with_a_default_says_so() -> None:
    assert error_of(put("a.yaml", "name: a\npretrain:\n  global_batch: 256\n")).startswith("a.yaml  parallel.micro_batch = 24 (default)\n")
    path = put("b.yaml", "name: b\nparallel:\n  zero_stage: 1\npretrain: {global_batch: 256}\n")
    assert error_of(path).startswith("b.yaml:2  parallel.micro_batch = 24 (default)\n")


def test_unknown_keys_name_the_nearest_key() -> None:
    path = put("a.yaml", "name: a\nmicro_batch: 3\nparallel: {micro_bach: 3}\ndata: {zzz: 1}\n")
    text = error_of(path)
    assert "a.yaml:3  parallel.micro_bach = 3\n  unknown key. Did you mean parallel.micro_batch?" in text
    assert "a.yaml:2  micro_batch = 3\n  unknown key. Did you mean parallel.micro_batch?" in text
    assert "a.yaml:4  data.zzz = 1\n  unknown key. Keys of data: source, image_size," in text


def test_all_wrong_values_are_listed_in_the_order_of_the_lines() -> None:
    path = put(
        "a.yaml",
        "seed: -1\nparallel:\n  precision: fp16\n  workers: two\n  zero_stage: 9\npretrain:\n  lr: .inf\n  steps: 1.5\n"
        "tokenizer:\n  views:\n    - center\n    - upside_down\nsample: 3\n",
    )
    lines = error_of(path).splitlines()
    assert lines[0::2] == [
        "a.yaml  name",
        "a.yaml:1  seed = -1",
        "a.yaml:3  parallel.precision = fp16",
        "a.yaml:4  parallel.workers = two",
        "a.yaml:5  parallel.zero_stage = 9",
        "a.yaml:7  pretrain.lr = Infinity",
        "a.yaml:8  pretrain.steps = 1.5",
        "a.yaml:10  tokenizer.views[1] = upside_down",
        "a.yaml:13  sample = 3",
    ]
    assert lines[1::2][:6] == [
        "  is required and not set.",
        "  must be greater than or equal to 0.",
        "  must be 'bf16' or 'fp32'.",
        "  must be a valid integer.",
        "  must be 0, 1, 2 or 3.",
        "  must be a finite number.",
    ]


def test_a_source_is_explained_by_the_keys_a_user_writes() -> None:
    path = put("a.yaml", MINIMAL)
    types = ["openmoji", "folder", "table", "class_folders", "webdataset"]
    quoted = ", ".join(f"'{name}'" for name in types)
    assert error_of(path, "data.source.type=zip") == f"-o  data.source.type = zip\n  must be one of {quoted}."
    assert error_of(path, "data.source.limit=50") == f"-o  data.source\n  needs a type: one of {', '.join(types)}."
    assert error_of(path, "data.source={type: folder}") == "-o  data.source.path\n  is required and not set."
    assert error_of(path, "data.source={type: folder, path: 3}").startswith("-o  data.source.path = 3\n  must be text")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: 1\nname: b\n", "a.yaml:3  name\n  is set twice in the same mapping: first at a.yaml:1."),
        ("name: a\nmodel: {dim: 8\n", "a.yaml:3  is not valid YAML:"),
        ("name: a\n\tseed: 1\n", "a.yaml:2  is not valid YAML:"),
        ("", "a.yaml: a recipe is a mapping of sections (`name: ...`), and this file is empty."),
        ("- name\n", "and this file holds a list."),
        ("just text\n", "and this file holds a single value."),
        ("name: &a {b: *a}\n", "is an alias of something that contains it"),
        ("name: !!python/name:os.system x\n", "a.yaml:1  the YAML tag"),
        ("name: a\n---\nname: b\n", "a.yaml:2  is not valid YAML:"),
        ("name: a\nextends: 3\n", "a.yaml:2  extends\n  must be a file name"),
        ("name: a\nextends: base/no.yaml\n", "a.yaml:2  extends = base/no.yaml\n  there is no file base/no.yaml."),
    ],
)
def test_a_broken_file_is_one_error_with_its_line(text: str, message: str) -> None:
    assert message in error_of(put("a.yaml", text))


def test_a_missing_recipe_names_those_that_exist() -> None:
    put("recipes/quickstart.yaml", MINIMAL)
    assert error_of("recipes/quikstart.yaml") == "recipes/quikstart.yaml: there is no such recipe. In recipes: quickstart.yaml."


def test_a_recipe_that_extends_itself_shows_the_circle() -> None:
    put("b.yaml", "extends: a.yaml\n")
    assert "b.yaml:1  extends = a.yaml\n  a recipe cannot extend itself: a.yaml -> b.yaml -> a.yaml" in error_of(
        put("a.yaml", "extends: b.yaml\nname: a\n")
    )


def test_two_ways_to_the_same_base_are_no_circle() -> None:
    put("root.yaml", "seed: 5\n")
    put("left.yaml", "extends: root.yaml\nname: left\n")
    put("right.yaml", "extends: root.yaml\n")
    recipe = load_recipe(put("a.yaml", "extends: [left.yaml, right.yaml]\n"))
    assert (recipe.seed, recipe.name) == (5, "left")


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", "seed=[1", "seed=1: 2: 3"])
def test_a_malformed_override_is_shown(override: str) -> None:
    assert error_of(put("a.yaml", MINIMAL), override).startswith(f"-o {override}")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.from_regex(r"[._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*", fullmatch=True),
    run_dir=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
    lr=st.floats(1e-12, 1e6),
)
def test_a_dumped_recipe_loads_to_the_same_recipe(name: str, run_dir: str, lr: float) -> None:
    recipe = Recipe.model_validate({"name": name, "run_dir": run_dir, "pretrain": {"lr": lr}, "tokenizer": {"views": ["center"]}})
    assert load_recipe(put("dump.yaml", dump_recipe(recipe))) == recipe


def test_removed_fields_are_read_where_they_change_nothing() -> None:
    """The stored recipe of an older run names them at their defaults; a recipe that sets one gets the error that there is no such key."""
    stored = put("stored.yaml", "name: x\nextract: {repulsion_radius: 0, frontier_random: null, rescore_radius: null}\n")
    assert load_recipe(stored) == Recipe(name="x")
    for setting in ("repulsion_radius: 1", "frontier_random: 0", "rescore_radius: 2"):
        text = error_of(put("recipe.yaml", f"name: x\nextract:\n  {setting}\n"))
        assert f"recipe.yaml:3  extract.{setting.replace(': ', ' = ')}\n  unknown key. " in text and "score" in text


def test_the_fingerprint_is_of_the_content() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})
    recipe = Recipe(name="a")
    assert fingerprint(recipe) == fingerprint(recipe.model_dump(mode="json")) and len(fingerprint(recipe)) == 16


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("%YAML 1.1\n---\nname: yes\n", 1, "this is read as YAML 1.2"),
        ("# mine\n\n%TAG ! tag:x,2000:\n---\nname: !y x\n", 3, "this is read as YAML 1.2"),
        ("...\n%YAML 1.1\n---\nname: yes\n", 2, "this is read as YAML 1.2"),
        ('seed: 1\nname: "a\\ud83d"\n', 2, "half a surrogate pair"),
        ('name: x\ndata: ["\\ude00\\ud83d"]\n', 2, "half a surrogate pair"),
        ('name: x\n"\\ud83d": 1\n', 2, "half a surrogate pair"),
        ("name: x\nbase: &base {a: 1}\ndata:\n  <<: *base\n", 4, "YAML 1.2 has no merge keys: use extends, or write the values"),
    ],
)
def test_yaml_that_means_something_else_is_refused(tmp_path: Path, text: str, line: int, why: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=why) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(f"{path}:{line}  ")


def test_pairs_of_surrogates_and_anchors_used_again_are_read(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('a: "\\ud83d\\ude00"\nb: &x 1\nc: &x 2\nd: *x\n"<<": 3\ne: <<\n')
    assert read_layers(str(path)).plain() == {"a": "\U0001f600", "b": 1, "c": 2, "d": 2, "<<": 3, "e": "<<"}
    assert not recwarn.list
