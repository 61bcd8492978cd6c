"""Lists of pictures: those of one seed and those with seeds of their own are what each would be alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oar_scale.config.schema import SampleConfig
from oar_scale.data.prompt_files import GivenPrompt
from oar_scale.errors import UserError
from oar_scale.generation.model_bundle import find_bundle
from oar_scale.generation.pretrained import Pretrained, load_bundle
from oar_scale.generation.wanted_pictures import check_given, draw_wanted, wanted_pictures

EMOJI = str(Path(__file__).resolve().parents[2] / "recipes" / "weights" / "emoji")
PROMPTS = ["a red apple", "a smiling cat", "a blue car"]


@pytest.fixture(scope="module")
def drawer() -> Pretrained:
    return load_bundle(replace(find_bundle(EMOJI), sample=SampleConfig(steps=6)))


@pytest.mark.parametrize("order", [None, "random"])
@pytest.mark.parametrize("seeds", [(5, 5, 5), (5, -1, 2**62)], ids=["one seed", "three seeds"])
def test_each_picture_is_what_it_would_be_alone(drawer: Pretrained, seeds: tuple[int, ...], order: str | None) -> None:
    given = [GivenPrompt(prompt, 7 * place, seed, "") for place, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True))]
    drawn = {each.wanted: each for each in draw_wanted(drawer, wanted_pictures(given, 1), batch=2, order=order)}
    assert len(drawn) == 3
    for wanted, each in drawn.items():
        alone = drawer.draw([wanted.prompt], seed=wanted.seed, images=[wanted.noise], order=order)
        assert torch.equal(each.order_N, alone.order_BN[0])
        assert each.picture.tobytes() == drawer.decode(alone.codes_BN)[0].tobytes()


def test_drawings_of_a_prompt_differ_and_the_first_stays(drawer: Pretrained) -> None:
    given = [GivenPrompt("a red apple", 3, 0, "")]
    (one,), several = (list(draw_wanted(drawer, wanted_pictures(given, count), batch=8)) for count in (1, 3))
    pictures = [each.picture.tobytes() for each in several]
    assert len(set(pictures)) == 3 and pictures[0] == one.picture.tobytes()
    assert [each.record.number for each in several] == [3, 3 + 2**32, 3 + 2 * 2**32]


def test_settings_that_a_model_cannot_take_are_a_user_error() -> None:
    bundle = replace(find_bundle(EMOJI), sample=SampleConfig(order="stored"))
    with pytest.raises(UserError, match="stored"):
        list(draw_wanted(load_bundle(bundle), wanted_pictures([GivenPrompt("a cat", 0, 0, "")], 1), batch=1))


def test_first_prompt_that_cannot_be_drawn_is_named(drawer: Pretrained) -> None:
    given = [GivenPrompt(prompt, place, 0, f"file:{place}") for place, prompt in enumerate(["a cat"] * 1500 + ["\u200b", "\u200b"])]
    with pytest.raises(UserError, match=r"^file:1500: caption .* has no token"):
        check_given(drawer, given)
