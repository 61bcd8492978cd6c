"""Images that appear in their order, frame by frame."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from oar_scale.evaluation.animation import FRAMES, LAST_MS, animated, appearing
from oar_scale.evaluation.pictures import UNKNOWN_GREY, contact_sheet, upscale

PICTURES = [np.random.default_rng(seed).integers(0, 160, (8, 8, 3)).astype(np.uint8) for seed in range(3)]  # none of it is grey
ORDERS = np.stack([np.arange(16), np.arange(16)[::-1], np.random.default_rng(9).permutation(16)])


def grey(frame: np.ndarray) -> float:
    return float((frame == UNKNOWN_GREY).all(-1).sum())


def test_one_more_cell_of_each_image_is_there_in_every_frame() -> None:
    frames = appearing(PICTURES, ORDERS, columns=2, pixels=16)
    assert len(frames) == 17
    cell = (2 * 2) ** 2
    assert [grey(frame) for frame in frames] == [3 * cell * (16 - placed) for placed in range(17)]
    whole = contact_sheet([[upscale(picture, 2) for picture in row] for row in (PICTURES[:2], PICTURES[2:])], gap=6)
    np.testing.assert_array_equal(frames[-1], whole)
    assert grey(frames[1][:4, :4]) == 0 and grey(frames[1][:16, :16]) == 16**2 - cell  # the first image starts upper left


def test_large_grids_show_several_cells_at_a_time() -> None:
    frames = appearing([np.zeros((32, 32, 3), np.uint8)], np.arange(1024)[None], columns=1, pixels=32)
    assert len(frames) == FRAMES + 1 and grey(frames[0]) == 1024 and grey(frames[-1]) == 0


@pytest.mark.parametrize("file_format", ["WEBP", "GIF"])
def test_both_files_loop_over_all_frames_and_rest_on_the_last(file_format: str) -> None:
    """Both files play all frames for ever and rest on the last."""
    frames = appearing(PICTURES, ORDERS, columns=3, pixels=16)
    image = Image.open(io.BytesIO(animated(frames, file_format)))  # type: ignore[arg-type]
    assert image.format == file_format and image.n_frames == 17 and image.info["loop"] == 0
    image.seek(16)
    image.load()
    assert image.info["duration"] == LAST_MS
    tolerance = 0 if file_format == "WEBP" else 40  # 256 colours for all frames
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frames[-1]).max() <= tolerance
