"""Arguments that mean nothing, in every method of a loaded model: one clear error each, and nothing drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from edited_pictures import drawer, picture
from PIL import Image

from oar_scale.errors import UserError
from oar_scale.generation.canvas import Margins

BOX = (0, 0, 8, 8)
METHODS: dict[str, Callable[..., Any]] = {
    "sample": lambda prompts, **options: drawer().sample(prompts, **options),
    "draw": lambda prompts, **options: drawer().draw(prompts, **options),
    "edit": lambda prompts, **options: drawer().edit(_each(prompts, picture(16, 16)), _each(prompts, BOX), prompts, **options),
    "variations": lambda prompts, **options: drawer().variations(_each(prompts, picture(16, 16)), prompts, **options),
    "expand": lambda prompts, **options: drawer().expand(_each(prompts, picture(8, 8)), Margins(8), prompts, **options),
}


def _each(prompts: Any, value: Any) -> list[Any]:
    return [value] * (len(prompts) if hasattr(prompts, "__len__") else 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("prompts", "complaint"),
    [
        ([], "at least one: got a list of 0 entries"),
        ("3", "prompts are a list with one entry for each picture"),
        (b"12", "prompts are a list with one entry for each picture"),
        (None, "prompts are a list .* got None"),
        ([None], "None is no class label: this model knows the labels 0 to 4"),
        ([b"3"], "1 bytes that begin with b'3' is no class label"),
        ([1.0], "1.0 is no class label"),
        ([True], "True is no class label"),
        ([math.nan], "nan is no class label"),
        (["x" * 10_000], r"'x{57}\.\.\.' is no class label"),
        (["\u202eشمس 🍎"], "is no class label"),
        ([np.zeros((2, 3))], "is no class label"),
    ],
)
def test_prompts_of_no_use_are_refused_everywhere(method: str, prompts: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        METHODS[method](prompts)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"guidance": math.nan}, "guidance nan must be a number from 0 to 1,000,000"),
        ({"guidance": "3"}, "guidance '3' must be a number"),
        ({"guidance": None}, "guidance None must be a number"),
        ({"temperature": math.nan}, "temperature nan must be a number"),
        ({"temperature": 0}, "temperature 0 must be at least 1e-06"),
        ({"top_k": 2.5}, "top_k 2.5 must be a whole number"),
        ({"top_p": math.nan}, "top_p nan must be a number"),
        ({"steps": 2.5}, "steps 2.5 must be a whole number from 1"),
        ({"draft": "a"}, "draft 'a' must be a whole number"),
        ({"draft": 4}, "draft 4: cells are drafted along an order that is known beforehand, and here the model decides"),
        ({"draft": 4, "order": "confidence"}, "draft 4: cells are drafted along an order"),
        ({"guidance_schedule": 3}, "guidance_schedule 3: there are constant"),
        ({"seed": None}, "seed None must be a whole number"),
        ({"seed": 1.5}, "seed 1.5 must be a whole number"),
        ({"seed": 1 << 64}, r"seed 18446744073709551616 must lie between -2\^63 and 2\^64 - 1"),
        ({"order": "diagonal"}, "order 'diagonal': no such policy"),
        ({"order": [0, 1, 1]}, "order a list of 3 entries must hold each of the cells 0 to 15 once"),
        ({"order": [0.5] * 16}, "must hold each of the cells 0 to 15 once"),
        ({"order": [list(range(16))] * 7}, "neither the name of a policy nor a permutation of the cells, or [14] of them"),
        ({"order": {"a": 1}}, "a mapping of 1 entries is neither the name of a policy nor a permutation"),
    ],
)
def test_settings_of_no_use_are_refused_everywhere(method: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        METHODS[method]([1], **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ([1, 2], "has 2 of them for 1 pictures"),
        ([1.5], "the number 1.5 must be a whole number"),
        ([-1], "-1 must lie between 0 and"),
        ([1 << 63], "9223372036854775808 must lie between 0 and"),
        (["a"], "the number 'a' must be a whole number"),
        (5, "5: a list with a whole number for each picture is wanted"),
    ],
)
def test_numbers_of_no_use_are_refused_everywhere(method: str, numbers: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        METHODS[method]([1], **{"images" if method in ("sample", "draw") else "numbers": numbers})


def test_numbers_of_edits_leave_room_for_variations_and_steps() -> None:
    assert len(METHODS["edit"]([1], numbers=[(1 << 48) - 1])) == 1
    with pytest.raises(UserError, match="numbers: 281474976710656 must lie between 0 and 281474976710655"):
        METHODS["edit"]([1], numbers=[1 << 48])
    with pytest.raises(UserError, match="must lie between 0 and 281470681743359"):
        METHODS["edit"]([1], numbers=[(1 << 48) - 1], variations=2)


def test_numpy_and_digits_are_labels_and_seeds() -> None:
    plain = drawer().draw([3, 1], seed=5).codes_BN
    for prompts in (np.array([3, 1]), ["3", "1"], (np.int64(3), np.uint8(1)), torch.tensor([3, 1]).tolist()):
        assert torch.equal(drawer().draw(prompts, seed=np.int64(5)).codes_BN, plain)  # type: ignore[arg-type]
    assert torch.equal(drawer().draw([1], seed=5, images=np.array([1])).codes_BN[0], plain[1])  # type: ignore[arg-type]
    order = list(range(16))
    for each in (tuple(order), np.array(order), torch.tensor(order, dtype=torch.int32)):
        assert drawer().draw([1], order=each).order_BN[0].tolist() == order  # type: ignore[arg-type]


MASKS: list[tuple[Any, str]] = [
    (np.ones((8, 8), dtype=np.bool_), "the mask of picture 1 has 8 x 8 pixels"),
    (np.ones((16, 16), dtype=np.int64), r"int64 \[16, 16\]: bool \[H, W\] is wanted"),
    (np.ones((16, 16), dtype=np.uint8), r"uint8 \[16, 16\]: bool"),
    (torch.ones(4, 4, dtype=torch.bool), "has 4 x 4 pixels"),
    ((0.5, 0.0, 8.0, 8.0), "must be four whole numbers"),
    ((math.nan, 0, 8, 8), "must be four whole numbers"),
    (("0", "0", "8", "8"), "must be four whole numbers"),
    (None, r"the mask of picture 1 is object \[\]: bool"),
    ("mask.png", r"bool \[H, W\] is wanted"),
]


def test_masks_of_no_use_are_refused() -> None:
    for mask, complaint in MASKS:
        with pytest.raises(UserError, match=complaint):
            drawer().edit([picture(16, 16)], [mask], [1])


@pytest.mark.parametrize("method", ["edit", "variations", "expand"])
@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (["photo.png"], "picture 1 is a str: a Pillow picture is wanted"),
        ([np.zeros((8, 8, 3), dtype=np.uint8)], "picture 1 is a ndarray: a Pillow picture is wanted"),
        ([None], "picture 1 is a NoneType"),
        ([], "images are a list with one entry for each picture, at least one"),
        (Image.new("RGB", (8, 8)), "images are a list with one entry for each picture"),
        ([Image.new("F", (8, 8))], "picture 1 has mode F"),
        ([Image.new("RGB", (0, 8))], "picture 1 has 0 x 8 pixels; there must be some"),
    ],
)
def test_pictures_of_no_use_are_refused(method: str, images: Any, complaint: str) -> None:
    arguments = {"edit": ([BOX], [1]), "variations": ([1],), "expand": (Margins(8), [1])}[method]
    with pytest.raises(UserError, match=complaint):
        getattr(drawer(), method)(images, *arguments)


@pytest.mark.parametrize(
    ("margins", "complaint"),
    [
        (Margins(), "each must be 0 or more, one more"),
        (Margins(left=-1), "each must be 0 or more"),
        (Margins(left=1.5), r"margins Margins\(left=1.5.* must be four whole numbers"),  # type: ignore[arg-type]
        ((1, 2), "must be four whole numbers"),
        (Margins(left=9_000_000_000), "the page may have 67108864 pixels"),
        (None, "margins None must be Margins"),
        ("left=1", "margins 'left=1' must be Margins"),
        ([Margins(1), Margins(1)], "margins has 2 of them for 1 pictures"),
    ],
)
def test_margins_of_no_use_are_refused(margins: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        drawer().expand([picture(8, 8)], margins, [1])


def test_a_picture_of_one_pixel_is_varied_and_grows() -> None:
    dot = Image.new("RGB", (1, 1), "red")
    assert drawer().variations([dot], [1], 1)[0].picture.size == (1, 1)
    (grown,) = drawer().expand([dot], Margins(3, 2, 1, 0), [1])
    assert grown.picture.size == (5, 3) and grown.picture.getpixel((3, 2)) == (255, 0, 0)
