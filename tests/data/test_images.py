"""Pictures from strangers: read if they are pictures of a bearable size, refused before they are decoded if not."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from foreign_shards import bomb, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from oar_scale.data.images import MAX_PIXELS, decode_image, image_size
from oar_scale.errors import UserError


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_of_the_three_formats_are_read(kind: str) -> None:
    data = picture(0, (12, 8), kind)
    image = decode_image(memoryview(data), "x")
    assert (image.size, image.mode, image_size(data, "x")) == ((12, 8), "RGB", (12, 8))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("size", [(9000, 9000), (20_000, 20_000), (65_000, 1100)])
def test_a_bomb_is_refused_without_being_decoded(size: tuple[int, int]) -> None:
    data = bomb(*size)
    assert len(data) < 200_000 and size[0] * size[1] > MAX_PIXELS
    tracemalloc.start()
    with pytest.raises(UserError, match=r"0\.tar: image of sample 'k' cannot be read \(.*pixels"):
        decode_image(data, "0.tar: image of sample 'k'")
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_the_limit_is_the_callers() -> None:
    assert decode_image(picture(0, (10, 10)), "x", max_pixels=100).size == (10, 10)
    with pytest.raises(UserError, match="it says 10 x 10 pixels, the limit is 99"):
        decode_image(picture(0, (10, 10)), "x", max_pixels=99)


def test_formats_that_are_programs_or_exotic_are_not_tried() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    for data in (buffer.getvalue(), b"", b"GIF89a", b"<svg/>"):
        with pytest.raises(UserError, match="x cannot be read"):
            decode_image(data, "x")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_a_damaged_picture_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    """300 damaged pictures are tried in each run."""
    damaged = bytearray(picture(1, (16, 16), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]), "x")
    except UserError as error:
        assert str(error).startswith("x cannot be read")
    else:
        assert image.width * image.height <= MAX_PIXELS and image.mode == "RGB"
