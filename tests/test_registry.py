"""The names of stages and models stand in ``oar_scale.registry`` and in no second list."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import oar_scale
from oar_scale.config.schema import Recipe
from oar_scale.pipeline import entry_point
from oar_scale.registry import MODELS, STAGES, TRAINING_SECTIONS, ModelName, StageName, current_name

PACKAGE = Path(oar_scale.__file__).parent


def texts(node: ast.AST) -> set[str]:
    """The texts that one list, tuple, set, dictionary or ``Literal[...]`` names."""
    match node:
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            pass
        case ast.Dict(keys=keys):
            items = [key for key in keys if key is not None]
        case _:
            return set()
    return {item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)}


def lists_of(names: set[str], source: str) -> Iterator[tuple[int, set[str]]]:
    """The line and the names of each list in a source that has two or more of ``names``.

    Sections of a recipe have names of stages too: a dictionary with other sections besides is a change to a recipe.
    """
    for node in ast.walk(ast.parse(source)):
        listed = texts(node) & names
        sections = isinstance(node, ast.Dict) and not texts(node) <= names and texts(node) <= set(Recipe.model_fields)
        if len(listed) > 1 and not sections:
            yield node.lineno, listed  # type: ignore[attr-defined]


def test_a_second_list_of_names_is_seen() -> None:
    for source in ('A = ["pretrain", "x", "finetune"]', 'A = {"pretrain": 1, "finetune": 2}', 'T = Literal["pretrain", "finetune"]'):
        assert list(lists_of(set(STAGES), source)) == [(1, {"pretrain", "finetune"})]


@pytest.mark.parametrize(
    "names", [set(STAGES), {*MODELS, *(old for model in MODELS.values() for old in model.old_names)}], ids=["stages", "models"]
)
def test_no_other_file_lists_the_names(names: set[str]) -> None:
    elsewhere = [
        f"{path.relative_to(PACKAGE)}:{line}: {sorted(listed)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "registry.py"
        for line, listed in lists_of(names, path.read_text())
    ]
    assert elsewhere == []


def test_the_types_name_what_the_tables_have() -> None:
    assert get_args(StageName) == tuple(STAGES)
    assert get_args(ModelName) == tuple(MODELS)
    assert TRAINING_SECTIONS == ("pretrain", "finetune")


def test_stages_come_after_those_they_need() -> None:
    names = list(STAGES)
    for stage in STAGES.values():
        assert all(names.index(need) < names.index(stage.name) for need in stage.needs)


def test_models_and_the_stages_that_make_them_agree() -> None:
    for stage in STAGES.values():
        assert (stage.model is not None) == bool(stage.training)
        assert stage.model is None or MODELS[stage.model].stage == stage.name
    made = [stage.model for stage in STAGES.values() if stage.model]
    assert sorted([*made, "base"]) == sorted(MODELS)


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_has_an_entry_point(name: str) -> None:
    """It takes the run, and the name of the stage where several stages share it."""
    parameters = list(inspect.signature(entry_point(STAGES[name])).parameters)
    assert parameters == (["run", "name"] if STAGES[name].takes_name else ["run"])


def test_models_are_known_by_their_old_names() -> None:
    assert [current_name(text) for text in ("anyorder", "any-order", "any_order", "ordered", "other")] == [
        "any_order",
        "any_order",
        "any_order",
        "ordered",
        "other",
    ]
