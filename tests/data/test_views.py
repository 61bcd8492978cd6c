"""Views: what each variant of an image shows, and how a recipe names them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from oar_scale.config.schema import TokenizerConfig
from oar_scale.data.views import make_view

SIDE = 20


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a pixel says where it comes from."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8))


def test_the_ten_crops_are_middle_corners_and_mirrors() -> None:
    """The ten crops are the middle and the corners of an image a tenth larger and their mirrors."""
    image = ramp(22, 22)  # exactly 1.1 times the size: nothing is resized
    pixels = np.asarray(image)
    corners = {0: (1, 1), 1: (0, 0), 2: (0, 2), 3: (2, 0), 4: (2, 2)}
    for number, (top, left) in corners.items():
        wanted = pixels[top : top + SIDE, left : left + SIDE]
        np.testing.assert_array_equal(np.asarray(make_view(image, f"crop{number}", "key", SIDE)), wanted)
        np.testing.assert_array_equal(np.asarray(make_view(image, f"crop{number + 5}", "key", SIDE)), wanted[:, ::-1])


def test_the_second_ten_crops_are_nearer_to_the_whole_image() -> None:
    image = ramp(21, 21)  # 1.05 times
    np.testing.assert_array_equal(np.asarray(make_view(image, "crop14", "key", SIDE)), np.asarray(image)[1:, 1:])
    np.testing.assert_array_equal(np.asarray(make_view(image, "crop16", "key", SIDE)), np.asarray(image)[:SIDE, SIDE - 1 :: -1])


def test_llamagens_sizes_come_out() -> None:
    """281 and 268 pixels for crops of 256."""
    for number, larger in ((0, 281), (10, 268)):
        image = ramp(larger, larger)
        np.testing.assert_array_equal(np.asarray(make_view(image, f"crop{number + 4}", "key", 256)), np.asarray(image)[-256:, -256:])


@pytest.mark.parametrize("view", ["center", "center_flip", "jitter3", "crop7", "crop19"])
def test_every_view_of_any_image_has_the_size_that_was_asked_for(view: str) -> None:
    for image in (ramp(SIDE, SIDE), ramp(64, 31), ramp(9, 40)):
        assert make_view(image, view, "key", SIDE).size == (SIDE, SIDE)


def test_a_square_of_the_right_size_is_its_own_centre() -> None:
    image = ramp(SIDE, SIDE)
    assert make_view(image, "center", "key") is image
    wide = make_view(ramp(60, 20), "center", "key", SIDE)
    assert wide.tobytes() == ImageOps.fit(ramp(60, 20), (SIDE, SIDE), Image.Resampling.LANCZOS).tobytes()
    assert 80 < np.asarray(wide)[:, 0, 0].mean() < 100, "the outer thirds are cut off"


def test_one_word_in_a_recipe_stands_for_ten_crops() -> None:
    views = TokenizerConfig.model_validate({"views": ["center", "tencrop", "tencrop105"]}).views
    assert views == ("center", *(f"crop{number}" for number in range(20)))
    for wrong in ("crop20", "crop01", "tencrop2"):
        with pytest.raises(ValueError, match="pattern"):
            TokenizerConfig.model_validate({"views": [wrong]})
