"""Edits of pictures: what is hidden has no influence, what is known stays as it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from edited_pictures import KINDS, MODES, drawer, holes, picture, same, with_hidden
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from oar_scale.data.images import on_white, upright
from oar_scale.errors import UserError
from oar_scale.generation.canvas import make_canvas, mix
from oar_scale.generation.editing import expected, share_of
from oar_scale.generation.seen_codes import DEFAULT_FILLS, FILLS, Fill, cells_of, fill_hole, pixels_of, seen_codes
from oar_scale.tokenizers.image import ImageTokenizer


def test_all_kinds_of_tokenizers_are_tested_for_leaks() -> None:
    kinds = {kind for kind in ImageTokenizer.__subclasses__() if kind.__module__.startswith("oar_scale.")}
    assert kinds == set(KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_pixels_have_no_influence_on_an_edit(kind: str) -> None:
    """Not on a bit of it: codes, order, scores, the cells that count as known, and pictures, whatever the size."""
    model = drawer(kind)
    assert model.vq is not None
    size = model.vq.spec.image_size
    for width, height in ((size, size), (3 * size + 1, 2 * size), (7, 5)):
        image = picture(width, height)
        masks = list(holes(width, height).values())
        others = [with_hidden(image, mask, seed) for seed, mask in enumerate(masks, 5)]
        assert all(image.tobytes() != other.tobytes() for other in others)
        count = len(masks)
        for fills in (tuple(FILLS), DEFAULT_FILLS):  # with a single one all cells outside the hole are known
            options: Any = {"seed": 3, "feather": 2, "fills": fills, "steps": 4}
            first, second = (model.edit(each, masks, [2] * count, **options) for each in ([image] * count, others))
            assert all(map(same, first, second))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_an_intact_picture_do_see_the_hole(kind: str) -> None:
    """So the test above can fail: what is hidden changes codes of cells outside the hole, if it is not filled first."""
    vq = drawer(kind).vq
    assert vq is not None
    size = vq.spec.image_size
    image, mask = picture(size, size), holes(size, size)["box"]
    squares = [make_canvas(each, mask, size, "x").pixels(hide=False) for each in (image, with_hidden(image, mask, 5))]
    first_N, second_N = vq.encode(torch.stack(squares))
    assert (first_N != second_N)[~cells_of(torch.from_numpy(mask), vq.spec.grid)].any()


@pytest.mark.parametrize("mode", MODES)
def test_hidden_pixels_have_no_influence_in_any_mode(mode: str) -> None:
    image, mask = picture(40, 30, mode), holes(40, 30)["box"]
    other = with_hidden(image, mask, 5)
    assert other.mode == image.mode and other.tobytes() != image.tobytes()
    first, second = (drawer().edit([each], [mask], [1], fills=["blur"])[0] for each in (image, other))
    assert same(first, second)


@examples(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    mode=st.sampled_from(MODES),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    strength=st.sampled_from([0.3, 1.0]),
    feather=st.sampled_from([0.0, 3.5]),
    ring=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_an_edit_never_changes_a_known_pixel(
    width: int, height: int, mode: str, share: float, strength: float, feather: float, ring: int, seed: int
) -> None:
    image, mask = picture(width, height, mode, seed), np.random.default_rng(seed).random((height, width)) < share
    ring = ring if strength == 1 else 0  # refused otherwise
    options: Any = {"variations": 2, "strength": strength, "feather": feather, "ring": ring, "seed": seed, "steps": 4}
    for edit in drawer().edit([image], [mask], [seed % 5], **options):
        before, after = (np.asarray(each) for each in (upright(image, "x"), edit.picture))
        assert edit.picture.size == image.size and before.shape == after.shape
        assert np.array_equal(before[~mask], after[~mask])
        assert bool(edit.squares) == mask.any()
        assert all(square.order_N.unique().numel() == len(square.codes_N) == 16 for square in edit.squares)


def test_with_everything_known_the_picture_comes_back() -> None:
    for mode in ("RGB", "RGBA"):
        for size in ((16, 16), (23, 50)):
            image = picture(*size, mode)
            edit = drawer().edit([image], [np.zeros(size[::-1], dtype=np.bool_)], [1])[0]
            assert edit.picture.mode == mode and edit.picture.tobytes() == image.tobytes() and not edit.squares


@pytest.mark.parametrize("order", [None, "random", "halton"])
def test_with_nothing_known_an_edit_is_a_sample(order: str | None) -> None:
    prompts, full = [1, 4, 2], np.ones((16, 16), dtype=np.bool_)
    edits = drawer().edit([picture(16, 16, seed=seed) for seed in range(3)], [full] * 3, prompts, seed=7, order=order)
    drawn, sampled = drawer().draw(prompts, seed=7, order=order), drawer().sample(prompts, seed=7, order=order)
    for row, edit in enumerate(edits):
        assert (
            edit.squares[0].drawn_N.all()
            and torch.equal(edit.squares[0].codes_N, drawn.codes_BN[row])
            and torch.equal(edit.squares[0].order_N, drawn.order_BN[row])
        )
        assert edit.picture.tobytes() == edit.squares[0].drawing.tobytes() == sampled[row].tobytes()
    wide = drawer().edit([picture(64, 64)], [np.ones((64, 64), dtype=np.bool_)], [1], seed=7, order=order)[0]
    assert torch.equal(wide.squares[0].codes_N, drawn.codes_BN[0]) and wide.picture.size == (64, 64)


def test_an_edit_is_the_same_in_any_batch() -> None:
    """Each picture has a number and each variation its own noise; masks of a batch leave different numbers of cells."""
    images = [picture(16, 16), picture(30, 20, seed=1), picture(16, 16, "RGBA", seed=2)]
    masks = [holes(*image.size)[name] for image, name in zip(images, ("box", "around", "half"), strict=True)]
    together = drawer().edit(images, masks, [0, 1, 2], variations=2, fills=["mean"], seed=5, order="random")
    assert [(edit.image, edit.variation) for edit in together] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({int(edit.squares[0].drawn_N.sum()) for edit in together}) > 1
    for at in range(3):
        alone = drawer().edit([images[at]], [masks[at]], [at], variations=3, fills=["mean"], seed=5, numbers=[at], order="random")
        for edit, again in zip(together[2 * at :], alone[:2], strict=False):
            assert torch.equal(edit.squares[0].codes_N, again.squares[0].codes_N) and torch.equal(
                edit.squares[0].order_N, again.squares[0].order_N
            )
            assert edit.picture.tobytes() == again.picture.tobytes()
    assert len({bytes(edit.squares[0].codes_N.numpy()) for edit in alone}) == 3


def test_fills_know_the_other_pixels_alone() -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    hidden = torch.zeros(16, 16, dtype=torch.bool)
    hidden[4:12, 4:12] = True
    for fill in FILLS:
        filled = fill_hole(image.masked_fill(hidden, math.nan), hidden, fill)
        assert torch.equal(filled[:, ~hidden], image[:, ~hidden]) and filled.abs().max() <= 1
        assert torch.equal(filled, fill_hole(image, hidden, fill))
        assert torch.equal(fill_hole(image, torch.ones_like(hidden), fill), torch.zeros_like(image))
    mean, grains = (fill_hole(image, hidden, fill)[:, hidden] for fill in ("mean", "noise"))
    torch.testing.assert_close(mean, image[:, ~hidden].mean(1, keepdim=True).expand(3, 64))
    known = {tuple(pixel) for pixel in image[:, ~hidden].T.tolist()}
    assert {tuple(pixel) for pixel in grains.T.tolist()} <= known and len(grains.T.unique(dim=0)) > 30
    dark = torch.where(torch.arange(16) < 8, -1.0, 1.0).expand(3, 16, 16)  # the hole runs from dark on the left to bright
    row = fill_hole(dark, hidden, "blur")[0, 8, 4:12]
    assert (row.diff() > 0).all() and row[0] < -0.3 and row[-1] > 0.3


def test_cells_whose_codes_depend_on_the_fill_are_drawn() -> None:
    vq = drawer("shipped").vq
    assert vq is not None
    image, hidden = make_canvas(picture(32, 32), (8, 8, 24, 24), 32, "x").pixels(hide=True), torch.zeros(32, 32, dtype=torch.bool)
    hidden[8:24, 8:24] = True
    fills: tuple[Fill, ...] = ("mean", "noise")
    (mean_N, mean_known_N), (grains_N, _) = (seen_codes(vq, image, hidden, [fill]) for fill in fills)
    both = seen_codes(vq, image, hidden, fills)
    assert torch.equal(mean_known_N, ~cells_of(hidden, 8)) and int(mean_known_N.sum()) == 48
    assert torch.equal(both.known_N, mean_known_N & (mean_N == grains_N))
    assert 0 < int(both.known_N.sum()) < 48 and torch.equal(both.codes_N[both.known_N], mean_N[both.known_N])
    ringed = seen_codes(vq, image, hidden, ["mean"], ring=1).known_N.view(8, 8)
    assert int(ringed.sum()) == 64 - 36 and not ringed[1:7, 1:7].any()
    assert not seen_codes(vq, image, hidden, ["mean"], ring=99).known_N.any()


def test_strength_draws_the_least_expected_cells() -> None:
    model, image = drawer(), picture(16, 16)
    assert model.vq is not None
    codes_N = model.vq.encode(make_canvas(image, (0, 0, 1, 1), 16, "x").pixels(hide=False)[None])[0]
    marked_N = cells_of(torch.from_numpy(holes(16, 16)["box"]), 4)
    condition_TD = model._condition([3])[0]
    score_M = expected(model.model, codes_N, ~marked_N, marked_N, condition_TD)
    assert len(score_M) == 4 and (score_M < 0).all()
    least = marked_N.nonzero()[:, 0][score_M.argsort()]
    for strength, count in ((0.25, 1), (0.3, 2), (0.75, 3)):
        edit = model.edit([image], [holes(16, 16)["box"]], [3], strength=strength)[0]
        assert sorted(edit.squares[0].drawn_N.nonzero()[:, 0].tolist()) == sorted(least[:count].tolist())
        assert torch.equal(edit.squares[0].codes_N[~edit.squares[0].drawn_N], codes_N[~edit.squares[0].drawn_N])
        kept = ~pixels_of(edit.squares[0].drawn_N, 16).numpy()
        assert np.array_equal(np.asarray(edit.picture)[kept], np.asarray(image)[kept])


def test_a_share_is_of_the_number_as_it_is_written() -> None:
    """In binary 0.07 x 100 is a little above 7, and so is a float32 of 0.07 alone."""
    for hundredths in range(1, 100):
        assert [share_of(cells, hundredths / 100) for cells in range(301)] == [-(-hundredths * cells // 100) for cells in range(301)]
    assert (share_of(100, 0.07), share_of(100, np.float32(0.07)), share_of(256, 1e-9)) == (7, 7, 1)


def test_a_feathered_seam_takes_over_what_the_known_pixels_say() -> None:
    seen, drawn = torch.zeros(3, 32, 32), torch.full((3, 32, 32), 0.5)
    taken = torch.zeros(32, 32, dtype=torch.bool)
    taken[:, 16:] = True
    hard, soft = (mix(seen, drawn, taken, ~taken, feather)[0, 16] for feather in (0.0, 6.0))
    assert hard[:16].eq(0).all() and hard[16:].eq(0.5).all()
    assert soft[:16].eq(0).all() and (soft[16:].diff() >= 0).all() and soft[16] < 0.1 and soft[28:].min() > 0.49
    drawing_alone = mix(seen, drawn, torch.ones_like(taken), torch.zeros_like(taken), 6.0)
    assert torch.equal(drawing_alone, drawn)


def test_masks_refer_to_the_upright_picture() -> None:
    image = picture(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    turned = upright(image, "x")
    assert turned.size == (20, 30)
    edit = drawer().edit([image], [(0, 0, 20, 10)], [1])[0]
    assert edit.picture.size == (20, 30)
    assert np.array_equal(np.asarray(edit.picture)[10:], np.asarray(turned)[10:])
    with pytest.raises(UserError, match=r"mask of picture 1 has 30 x 20 pixels, the picture \(upright\) 20 x 30"):
        drawer().edit([image], [np.ones((20, 30), dtype=np.bool_)], [1])


def test_a_transparent_picture_stays_transparent_where_it_is_known() -> None:
    image = picture(16, 16, "RGBA")
    edit = drawer().edit([image], [(0, 0, 8, 16)], [1])[0]
    alpha = np.asarray(edit.picture)[:, :, 3]
    assert np.array_equal(alpha[:, 8:], np.asarray(image)[:, 8:, 3]) and (alpha[:, :8] == 255).all()
    on_page = drawer().edit([on_white(image)], [(0, 0, 8, 16)], [1])[0]
    assert torch.equal(edit.squares[0].codes_N, on_page.squares[0].codes_N)


def test_white_of_a_mask_is_drawn_and_black_is_kept() -> None:
    image, box = picture(20, 10), holes(20, 10)["box"]
    expected_pictures = drawer().edit([image], [box], [1])[0].picture.tobytes()
    black_and_white = Image.fromarray(box)
    for mask in (black_and_white, black_and_white.convert("L"), black_and_white.convert("RGB"), torch.from_numpy(box), (5, 2, 15, 8)):
        assert drawer().edit([image], [mask], [1])[0].picture.tobytes() == expected_pictures


def test_masks_that_do_not_fit_are_explained() -> None:
    masks: list[tuple[Any, str]] = [
        (Image.new("L", (8, 8)), r"the mask of picture 1 has 8 x 8 pixels, the picture \(upright\) 16 x 16"),
        (Image.new("RGBA", (16, 16)), "is transparent, .*Save it in black"),
        (Image.new("RGB", (16, 16), "red"), "has colours. Save it in black"),
        (Image.new("F", (16, 16)), "has mode F"),
        (np.ones((16, 16)), r"is float64 \[16, 16\]: bool \[H, W\] is wanted"),
        (np.ones((2, 16, 16), dtype=np.bool_), r"bool \[2, 16, 16\]: bool \[H, W\]"),
        ((0, 0, 17, 4), "does not lie inside 16 x 16"),
        ((4, 4, 4, 8), "does not lie inside 16 x 16"),
        ((0, 0, 8), "four whole numbers"),
        ((0, 0.5, 8, 8), "four whole numbers"),
    ]
    for mask, complaint in masks:
        with pytest.raises(UserError, match=complaint):
            drawer().edit([picture(16, 16)], [mask], [1])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"variations": 0}, "variations 0"),
        ({"strength": 0.0}, "strength 0"),
        ({"strength": math.nan}, "strength nan"),
        ({"feather": -1.0}, "feather -1"),
        ({"feather": math.nan}, "feather nan"),
        ({"ring": -1}, "ring -1"),
        ({"ring": 1.5}, "ring 1.5"),
        ({"ring": 2, "strength": 0.5}, "ring 2 with strength 0.5: .* Leave ring at 0 .* or set strength to 1"),
        ({"variations": None}, "variations None"),
        ({"strength": "half"}, "strength 'half'"),
        ({"feather": "soft"}, "feather 'soft'"),
        ({"fills": None}, r"fills \(None,\): a list of rules is wanted"),
        ({"fills": ()}, r"fills \(\)"),
        ({"fills": ("black",)}, "There are: mean, blur, noise"),
        ({"numbers": [1, 2]}, "numbers has 2 of them for 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        drawer().edit([picture(16, 16)], [(0, 0, 8, 8)], [1], **options)


def test_pictures_that_cannot_be_edited_are_explained() -> None:
    class Huge:
        size, mode = (20_000, 20_000), "RGB"

    with pytest.raises(UserError, match=r"picture 1 has 20000 x 20000 pixels; .* at most 67108864\. Scale it down"):
        drawer().edit([Huge()], [(0, 0, 8, 8)], [1])  # type: ignore[list-item]
    with pytest.raises(UserError, match="picture 1 has mode F, whose range"):
        drawer().edit([Image.new("F", (16, 16))], [(0, 0, 8, 8)], [1])
    with pytest.raises(UserError, match="one of each for every picture"):
        drawer().edit([picture(16, 16)], [(0, 0, 8, 8)], [1, 2])
