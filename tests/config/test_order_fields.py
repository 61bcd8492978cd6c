"""What a recipe may say about orders."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from oar_scale.config.schema import Recipe


def recipe(**sections: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"name": "orders", **sections})


def test_an_order_that_no_sample_would_follow_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"none follows pretrain\.order 'raster'(.|\n)*Set random_share: 0"):
        recipe(pretrain={"order": "raster"})
    assert recipe(pretrain={"order": "raster", "random_share": 0}).pretrain.order == "raster"
    assert recipe(finetune={"order": "spiral"}).finetune.random_share == 0.1
    assert recipe(pretrain={"order": "random"}).pretrain.random_share == 1.0


@pytest.mark.parametrize("section", ["pretrain", "sample"])
def test_a_raster_model_takes_no_other_order(section: str) -> None:
    with pytest.raises(ValidationError, match="a raster model has its raster order only"):
        recipe(model={"layout": "raster"}, **{section: {"order": "spiral", **({"random_share": 0} if section == "pretrain" else {})}})
    assert recipe(model={"layout": "raster"}, sample={"order": "raster"}).sample.order == "raster"


def test_a_refusal_passes_from_process_to_process() -> None:
    """An evaluation has processes: an error that cannot be read where it arrives looks like a process that was killed."""
    with pytest.raises(ValidationError) as refused:
        recipe(extract={"orders_per_image": 2})
    there = pickle.loads(pickle.dumps(refused.value))
    (error,) = there.errors()
    assert str(there) == str(refused.value) and error["ctx"]["error"].key == "extract.orders_per_image"


def test_a_policy_is_named_like_a_module() -> None:
    with pytest.raises(ValidationError):
        recipe(sample={"order": "../spiral"})
