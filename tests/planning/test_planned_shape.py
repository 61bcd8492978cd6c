"""A recipe's model is known to the last parameter before it exists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oar_scale.config.loading import load_recipe
from oar_scale.data.manifest import Manifest, ShardInfo, write_manifest
from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, ModelSpec, load_model
from oar_scale.model.spec import ClassSpec, FeatureSpec, TextSpec
from oar_scale.planning.assumptions import read_assumptions
from oar_scale.planning.shape import parameters, spec_of, training_images
from tests.planning.cases import RECIPES, SHIPPED, SPECS

BASES = sorted((RECIPES / "base").glob("model-*.yaml"))
CONDITIONS = {
    "class": ClassSpec(classes=1000),
    "text": TextSpec(vocab=2000, rows=24, encoder_layers=2),
    "features": FeatureSpec(width=768, rows=77),
    "a stored null that is longer": FeatureSpec(width=64, rows=7, null_rows=120),
}


def real(spec: ModelSpec) -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        return list(AnyOrderModel(spec).parameters())


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("path", BASES, ids=lambda path: path.stem)
def test_the_count_is_that_of_the_real_model(path: Path, condition: str) -> None:
    model = load_recipe(str(path), ["name=x"]).model
    for layout in ("raster", "instructed", "dual", "grouped", *(() if model.layers % 2 else ("decoupled",))):
        config = model.model_copy(update={"layout": layout})
        spec = ModelSpec.from_recipe(config, vocab_size=16384, grid=16, condition=CONDITIONS[condition])
        made = real(spec)
        assert parameters(spec).total == sum(parameter.numel() for parameter in made)
        if condition == "class":
            assert parameters(spec).largest == max(parameter.numel() for parameter in made)


@pytest.mark.parametrize("name", SPECS)
def test_grouped_queries_and_text_encoders_are_counted(name: str) -> None:
    assert parameters(SPECS[name]).total == sum(parameter.numel() for parameter in real(SPECS[name]))


def test_the_shipped_weights_are_as_large_as_their_recipe_says() -> None:
    """SentencePiece found 1,247 pieces in the captions; the recipe asks for 2,000 at most."""
    shipped = load_model(str(RECIPES / "weights" / "emoji" / "model.safetensors"))
    spec = spec_of(load_recipe(str(RECIPES / "emoji.yaml"), ["tokenizer.text.vocab_size=1247"]))
    assert spec.model_dump() == shipped.spec.model_dump()
    assert parameters(spec).total == sum(weight.numel() for weight in shipped.parameters()) == 6_438_400


def test_a_text_tower_is_described_as_open_clip_does() -> None:
    import open_clip

    spec = spec_of(load_recipe(str(RECIPES / "celeba.yaml")))
    config = open_clip.get_model_config("ViT-L-14")
    assert config is not None and isinstance(spec.condition, FeatureSpec)
    assert (spec.condition.width, spec.condition.rows) == (config["text_cfg"]["width"], config["text_cfg"]["context_length"])
    pooled = spec_of(load_recipe(str(RECIPES / "celeba.yaml"), ["tokenizer.text.features=pooled"]))
    assert isinstance(pooled.condition, FeatureSpec) and (pooled.condition.width, pooled.condition.rows) == (config["embed_dim"], 1)


def test_a_text_tower_that_nobody_knows_is_named() -> None:
    with pytest.raises(UserError, match="ViT-Z-99"):
        spec_of(load_recipe(str(RECIPES / "celeba.yaml"), ["tokenizer.text.architecture=ViT-Z-99"]))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_images_of_every_shipped_recipe_are_known(path: Path) -> None:
    images = training_images(load_recipe(str(path)), None, read_assumptions())
    assert images is not None and images.count > 100


def test_images_kept_for_a_test_are_not_trained_on() -> None:
    recipe = load_recipe(str(RECIPES / "emoji.yaml"))
    images = training_images(recipe, None, read_assumptions())
    assert recipe.data.test_fraction == 0.1 and images is not None and images.count == round(0.8 * 10856)
    assert images.source == "the data set, without the shares held out and kept for a test"
    without = training_images(load_recipe(str(RECIPES / "emoji.yaml"), ["data.test_fraction=0"]), None, read_assumptions())
    assert without is not None and (without.count, without.source) == (round(0.9 * 10856), "the data set, without the share held out")


def test_the_shards_of_a_run_know_better_than_a_table(tmp_path: Path) -> None:
    recipe = load_recipe(str(RECIPES / "emoji.yaml"), [f"run_dir={tmp_path}"])
    shards = (ShardInfo(name="0.tar", bytes=1, samples=41, crc32c=0), ShardInfo(name="1.tar", bytes=1, samples=1, crc32c=0))
    write_manifest(str(tmp_path / "tokens" / "train"), Manifest(shards=shards))
    images = training_images(recipe, None, read_assumptions())
    assert images is not None and (images.count, images.source) == (42, str(tmp_path / "tokens" / "train"))
    given = training_images(recipe, 7, read_assumptions())
    assert given is not None and given.count == 7
