"""Pictures that take several drawings: windows of large ones, margins, and regions with prompts of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from edited_pictures import KINDS, MODES, drawer, holes, picture, same, with_hidden
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray

from oar_scale.data.images import upright
from oar_scale.errors import UserError
from oar_scale.generation import pages
from oar_scale.generation.canvas import Margins
from oar_scale.generation.editing import EditOptions
from oar_scale.generation.pages import plan_steps
from oar_scale.generation.windows import MAX_WINDOWS, plan_windows


def box_of(width: int, height: int, *box: int) -> NDArray[np.bool_]:
    mask, (left, top, right, bottom) = np.zeros((height, width), dtype=np.bool_), box
    mask[top:bottom, left:right] = True
    return mask


@examples(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    size=st.sampled_from([8, 16, 33]),
    share=st.sampled_from([0.001, 0.05, 1.0]),
    seed=st.integers(0, 99),
)
def test_windows_draw_every_marked_pixel_once(width: int, height: int, size: int, share: float, seed: int) -> None:
    marked = np.random.default_rng(seed).random((height, width)) < share
    times = np.zeros((height, width), dtype=int)
    for (left, top, right, bottom), drawn, prompt in plan_steps([marked], [7], size, windows=True, where="x"):
        assert prompt == 7 and drawn.any() and left >= 0 and top >= 0
        if max(width, height) > size:
            assert (right - left, bottom - top) == (min(size, width), min(size, height)) and right <= width and bottom <= height
        times[top:bottom, left:right] += drawn
    assert np.array_equal(times, marked.astype(int))


def test_a_small_part_is_in_the_middle_of_its_only_window() -> None:
    two = box_of(200, 100, 40, 30, 60, 54) | box_of(200, 100, 150, 2, 158, 8)
    assert sorted(box for box, _ in plan_windows(two, 32, "x")) == [(34, 26, 66, 58), (138, 0, 170, 32)]


def test_windows_go_from_what_is_known_outwards() -> None:
    """At its turn at least half of each is known, and its neighbours overlap it by half."""
    for marked in (box_of(96, 64, 32, 0, 96, 64), box_of(100, 90, 20, 10, 77, 80), ~box_of(90, 90, 30, 20, 62, 60)):
        known = ~marked
        for (left, top, right, bottom), drawn in plan_windows(marked, 32, "x"):
            assert known[top:bottom, left:right].mean() >= 0.5
            known[top:bottom, left:right] |= drawn


def test_what_a_window_draws_at_its_end_is_left_to_the_next() -> None:
    """Where nothing more is to be drawn, at the border of the picture or of what is known, there is no margin."""
    to_the_right = plan_windows(box_of(80, 24, 32, 0, 80, 24), 32, "x")
    drawn_columns = [(box[0], *(box[0] + drawn.any(0).nonzero()[0][[0, -1]])) for box, drawn in to_the_right]
    assert drawn_columns == [(16, 32, 43), (28, 44, 55), (40, 56, 67), (48, 68, 79)]


def test_more_windows_than_anyone_would_wait_for_are_refused() -> None:
    for side in (600, 3000):
        with pytest.raises(UserError, match=rf"photo: .* windows of 8 x 8 pixels, and {MAX_WINDOWS} are drawn at most"):
            plan_windows(np.ones((side, side), dtype=np.bool_), 8, "photo")


def test_the_windows_of_all_regions_of_a_picture_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = [box_of(90, 16, left, 0, left + 10, 16) for left in (0, 40, 80)]
    assert len(plan_steps(regions, [0, 1, 2], 16, windows=True, where="x")) == 3
    monkeypatch.setattr(pages, "MAX_WINDOWS", 2)
    with pytest.raises(UserError, match="x: what is marked would take at least 3 windows of 16 x 16 pixels"):
        plan_steps(regions, [0, 1, 2], 16, windows=True, where="x")


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_pixels_have_no_influence_by_windows(kind: str) -> None:
    """Nor on the windows, nor on what later windows see of the former ones."""
    model = drawer(kind)
    assert model.vq is not None
    size = model.vq.spec.image_size
    width, height = size * 2 + 3, size - 2
    image, masks = picture(width, height, "RGBA"), [box_of(width, height, 5, 3, 5 + size, height), holes(width, height)["half"]]
    for fills in (("blur",), ("mean", "noise"))[: 1 if kind == "shipped" else 2]:
        first, second = (
            model.edit(each, masks, [2, 1], seed=3, fills=fills, windows=True, steps=6)
            for each in ([image] * 2, [with_hidden(image, mask, seed) for seed, mask in enumerate(masks, 5)])
        )
        assert len(first[0].squares) > 1 and all(map(same, first, second))


@examples(max_examples=8, deadline=None)
@given(
    width=st.integers(10, 26),
    height=st.integers(10, 26),
    mode=st.sampled_from(MODES),
    share=st.sampled_from([0.01, 0.5]),
    strength=st.sampled_from([0.3, 1.0]),
    windows=st.booleans(),
    seed=st.integers(0, 99),
)
def test_windows_and_regions_never_change_a_known_pixel(
    width: int, height: int, mode: str, share: float, strength: float, windows: bool, seed: int
) -> None:
    image, random = picture(width, height, mode, seed), np.random.default_rng(seed).random((height, width))
    first, second = random < share, random > 1 - share / 2
    options: Any = {"strength": strength, "windows": windows, "seed": seed, "fills": ["mean"], "steps": 4}
    for edit in drawer().edit([image], [[first, second]], [[1, 2]], **options):
        before, after = (np.asarray(each) for each in (upright(image, "x"), edit.picture))
        assert before.shape == after.shape and np.array_equal(before[~first & ~second], after[~first & ~second])


def test_windows_draw_at_the_resolution_of_the_picture() -> None:
    """A hole of a large picture is drawn pixel for pixel, and every square says where it lies."""
    edit = drawer().edit([picture(48, 40)], [(20, 16, 28, 24)], [1], windows=True, feather=0)[0]
    (square,) = edit.squares
    assert square.box == (16, 12, 32, 28) and square.drawing.size == (16, 16)
    drawn, page = np.asarray(square.drawing), np.asarray(edit.picture)
    assert np.array_equal(drawn[4:12, 4:12], page[16:24, 20:28])
    small = [drawer().edit([picture(16, 12)], [(4, 4, 9, 9)], [1], windows=windows)[0] for windows in (False, True)]
    assert same(*small) and small[0].squares[0].box == (0, 0, 16, 12)
    assert EditOptions().seam(drawer().vq.spec, window=True) == 4 and EditOptions().seam(drawer().vq.spec, window=False) == 0  # type: ignore[union-attr]


def test_windows_are_the_same_in_any_batch() -> None:
    """Each picture takes as many as it needs; each drawing has noise by its number, its variation and its window."""
    images, sizes = [picture(30, 16), picture(20, 34, seed=1), picture(16, 16, seed=2)], [(30, 16), (20, 34), (16, 16)]
    masks = [holes(*size)["half"] for size in sizes]
    together = drawer().edit(images, masks, [0, 1, 2], variations=2, windows=True, fills=["mean"], seed=5, order="random")
    assert len({len(edit.squares) for edit in together}) == 3
    for at in range(3):
        alone = drawer().edit(
            [images[at]], [masks[at]], [at], variations=3, windows=True, fills=["mean"], seed=5, numbers=[at], order="random"
        )
        for edit, again in zip(together[2 * at :], alone[:2], strict=False):
            assert edit.picture.tobytes() == again.picture.tobytes()
            for one, other in zip(edit.squares, again.squares, strict=True):
                assert one.box == other.box and torch.equal(one.codes_N, other.codes_N) and torch.equal(one.order_N, other.order_N)
    orders = [tuple(square.order_N[-6:].tolist()) for edit in together for square in edit.squares]
    assert len(set(orders)) > len(orders) * 0.8


def test_a_permutation_is_followed_by_each_variation_in_each_step() -> None:
    backwards, each = list(range(16))[::-1], torch.stack([torch.arange(16), torch.arange(16).flip(0)])
    one = drawer().edit([picture(40, 16)], [holes(40, 16)["half"]], [1], windows=True, order=backwards, ring=4)[0]
    assert len(one.squares) > 1 and all(square.order_N.tolist() == backwards for square in one.squares)
    two = drawer().edit([picture(40, 16)], [holes(40, 16)["half"]], [1], windows=True, order=each, ring=4, variations=2)
    assert all(torch.equal(square.order_N, each[edit.variation]) for edit in two for square in edit.squares)


def test_a_picture_grows_beyond_the_square() -> None:
    image = picture(20, 30, "RGBA")
    wide, tall = drawer().expand([image, image], [Margins(left=20), Margins(top=3, bottom=2)], [1, 2], seed=4)
    assert wide.picture.size == (40, 30) and tall.picture.size == (20, 35) and len(wide.squares) > 4
    assert np.array_equal(np.asarray(wide.picture)[:, 20:], np.asarray(image)) and len(np.unique(np.asarray(wide.picture)[:, :20, 0])) > 20
    assert np.array_equal(np.asarray(tall.picture)[3:33], np.asarray(image))
    (scaled,) = drawer().expand([image], Margins(left=20), [1], windows=False)
    assert len(scaled.squares) == 1 and scaled.picture.size == (40, 30)
    assert len(drawer().expand([picture(8, 8)], (8, 0, 0, 8), [1], variations=2)[1].squares) == 1  # type: ignore[arg-type]


def test_regions_are_drawn_from_their_own_prompts_in_turn() -> None:
    image, left, right = picture(16, 16), box_of(16, 16, 0, 0, 8, 16), box_of(16, 16, 9, 0, 16, 16)
    model, options = drawer(), {"seed": 2, "fills": ["blur"]}

    def drawn(prompts: list[Any], image: Any = image) -> tuple[bytes, bytes]:
        pixels = np.asarray(model.edit([image], [[left, right]], [prompts], **options)[0].picture)  # type: ignore[arg-type]
        return pixels[left].tobytes(), pixels[right].tobytes()

    first, second = drawn([1, 2])
    assert drawn([1, 3])[0] == first and drawn([1, 3])[1] != second
    assert drawn([3, 2])[0] != first
    assert drawn([1, 2], with_hidden(image, left | right, 5)) == (first, second)
    alone = model.edit([image], [[left | right]], [[1]], **options)[0]  # type: ignore[arg-type]
    assert np.asarray(alone.picture)[left].tobytes() == first  # nothing was known of the second region


def test_regions_that_overlap_or_lack_a_prompt_are_refused() -> None:
    with pytest.raises(UserError, match=r"picture 1: regions 1 and 3 both mark 6 pixels\. Mark each pixel in one of them"):
        drawer().edit([picture(16, 16)], [[(0, 0, 8, 8), (8, 8, 16, 16), (6, 5, 9, 8)]], [[1, 2, 3]])
    with pytest.raises(UserError, match="picture 2 has 2 masks and 1 prompts: one prompt for each region"):
        drawer().edit([picture(16, 16)] * 2, [(0, 0, 8, 8), [(0, 0, 8, 8), (8, 8, 16, 16)]], [1, 2])
    with pytest.raises(UserError, match="mask 2 of picture 1 has 8 x 8 pixels"):
        drawer().edit([picture(16, 16)], [[(0, 0, 8, 8), np.ones((8, 8), dtype=np.bool_)]], [[1, 2]])


def test_variations_draw_a_share_of_each_picture() -> None:
    images = [picture(16, 16), picture(16, 16, seed=1)]
    edits = drawer().variations(images, [1, 2], 3, 0.25, seed=3)
    assert [(edit.image, edit.variation) for edit in edits] == [(image, variation) for image in range(2) for variation in range(3)]
    for edit in edits:
        (square,) = edit.squares
        assert int(square.drawn_N.sum()) == 4 and torch.equal(square.drawn_N, edits[3 * edit.image].squares[0].drawn_N)
        kept = ~square.drawn_N.view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
        assert np.array_equal(np.asarray(edit.picture)[kept], np.asarray(images[edit.image])[kept])
    assert len({edit.picture.tobytes() for edit in edits}) == 6
    new = drawer().variations(images, [1, 2], 1, 1.0, seed=3)
    assert [edit.picture.tobytes() for edit in new] == [each.tobytes() for each in drawer().sample([1, 2], seed=3)]
