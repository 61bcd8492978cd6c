"""The sizes in recipes/base are the peers' sizes, to the last parameter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import Layout, ModelConfig, Recipe
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.spec import ClassSpec

BASE = Path(__file__).resolve().parents[2] / "recipes" / "base"
FILES = {path.stem.removeprefix("model-"): path for path in BASE.glob("model-*.yaml")}
CLASSES, GRID = 1000, 16


def shape(size: str) -> ModelConfig:
    return load_recipe(str(FILES[size]), [f"name={size}"]).model


def parameters(model: ModelConfig, vocab_size: int, layout: Layout = "instructed") -> int:
    config = model.model_copy(update={"layout": layout})
    with torch.device("meta"):
        built = AnyOrderModel(ModelSpec.from_recipe(config, vocab_size=vocab_size, grid=GRID, condition=ClassSpec(classes=CLASSES)))
    return sum(parameter.numel() for parameter in built.parameters())


# Of RandAR's class model (d374a72, randar_gpt.py), its position instruction vector included.
@pytest.mark.parametrize(
    ("size", "vocab_size", "count"),
    [
        ("b", 16384, 110_889_216),
        ("b", 1024, 87_296_256),
        ("l", 16384, 342_912_000),
        ("l", 1024, 311_454_720),
        ("xl", 16384, 774_700_800),
        ("xl", 1024, 735_379_200),
        ("xxl", 16384, 1_410_974_208),
        ("xxl", 1024, 1_363_788_288),
        ("3b", 16384, 3_096_662_400),
    ],
)
def test_a_size_has_as_many_parameters_as_in_randars_code(size: str, vocab_size: int, count: int) -> None:
    assert parameters(shape(size), vocab_size) == count


@pytest.mark.parametrize(("size", "count"), [("l", 319_845_376), ("xl", 718_997_760), ("xxl", 1_302_449_664)])
def test_a_decoupled_size_has_as_many_parameters_as_in_arpgs_code(size: str, count: int) -> None:
    assert parameters(shape(size), 16384, "decoupled") == count


@pytest.mark.parametrize(("size", "count"), [("l", 337_157_120), ("xl", 751_947_520), ("xxl", 1_412_184_576)])
def test_a_grouped_size_has_as_many_parameters_as_in_lpds_code(size: str, count: int) -> None:
    assert parameters(shape(size), 16384, "grouped") == count


@pytest.mark.parametrize(("layout", "vectors"), [("raster", 0), ("instructed", 1), ("dual", 2)])
@pytest.mark.parametrize(("size", "layers", "dim", "ffn"), [("7b", 32, 4096, 11008), ("13b", 40, 5120, 13824)])
def test_larger_sizes_have_the_parameters_of_the_formula(size: str, layers: int, dim: int, ffn: int, layout: Layout, vectors: int) -> None:
    """The larger sizes have as many parameters as the formula says."""
    block = 4 * dim * dim + 3 * dim * ffn + 2 * dim  # qkv and out, SwiGLU, two norms
    tables = (16384 + 16384 + CLASSES + 1) * dim  # codes in, codes out, classes and the null
    assert parameters(shape(size), 16384, layout) == layers * block + tables + dim + vectors * dim


@pytest.mark.parametrize("size", FILES)
def test_the_count_a_base_recipe_states_is_its_count(size: str) -> None:
    stated = re.match(r"# ([\d,]+) parameters with ([\d,]+) codes, ([\d,]+) classes and layout instructed\.", FILES[size].read_text())
    assert stated
    count, codes, classes = (int(number.replace(",", "")) for number in stated.groups())
    assert classes == CLASSES
    assert parameters(shape(size), codes) == count


def test_each_size_has_a_base_recipe_of_the_model_alone() -> None:
    """There is a base recipe of each size that sets the model alone."""
    assert FILES.keys() == {"tiny", "b", "l", "xl", "xxl", "3b", "7b", "13b"}
    for path in FILES.values():
        assert load_recipe(str(path), ["name=x"]).model_dump(exclude={"model"}) == Recipe(name="x").model_dump(exclude={"model"}), path


def test_the_tiny_size_is_for_a_few_seconds_on_a_cpu() -> None:
    assert 100_000 < parameters(shape("tiny"), 512) < 1_000_000
