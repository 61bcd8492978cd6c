"""LPD's orders: its own recorded ones obey the rule that ours are made by."""

from __future__ import annotations

import io
import itertools
from collections.abc import Collection, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from parity import FOLDER
from PIL import Image
from small_models import small_model

import oar_scale
from oar_scale.errors import UserError
from oar_scale.orders.order_files import folder_files
from oar_scale.orders.policies import OrderRequest, policy
from oar_scale.orders.policies.locality import REPULSION, locality_order
from oar_scale.orders.step_sizes import cells_per_step
from oar_scale.serve.limits import Limits
from oar_scale.serve.requests import EditSettings
from oar_scale.serve.tasks import Planner, begin
from oar_scale.serve.uploads import Upload

NOWHERE = folder_files("nowhere")
Order = NDArray[np.int64]


def distance(one: int, other: int, grid: int) -> tuple[int, int]:
    """The larger and the smaller of the distances in rows and columns."""
    down, across = abs(one // grid - other // grid), abs(one % grid - other % grid)
    return max(down, across), min(down, across)


def violations(order: Sequence[int], sizes: Sequence[int], grid: int, known: Collection[int] = ()) -> tuple[int, int]:
    """How often a cell was taken although one that is nearer to what is placed was apart from the step; and of how many steps' cells.

    Args:
        order: of the cells that are not known.
    """
    placed, wrong, strong, start = set(known), 0, 0, 0
    for size in sizes:
        step = list[int]()
        proximity = {
            cell: sum(2 ** (-far[1] / 2) for other in placed if (far := distance(cell, other, grid))[0] == 1)
            for cell in set(range(grid * grid)) - placed
        }
        for cell in order[start : start + size]:
            apart = [
                each
                for each in proximity.keys() - set(step)
                if proximity[each] > 1 - 1e-9 and all(distance(each, other, grid)[0] > REPULSION for other in step)
            ]
            if apart:
                strong += 1
                wrong += cell not in apart or proximity[cell] < max(proximity[each] for each in apart) - 1e-9
            step.append(cell)
        placed, start = placed | set(step), start + size
    return wrong, strong


@pytest.mark.parametrize("steps", [20, 32])
def test_recorded_orders_and_ours_obey_one_rule(steps: int) -> None:
    with np.load(FOLDER / "lpd_orders.npz") as arrays:
        sizes, recorded = arrays[f"groups_{steps}"].tolist(), arrays[f"orders_{steps}_repulsion2"][:2].tolist()
    ours = [locality_order(16, sizes, np.random.default_rng(seed).permutation(256)).tolist() for seed in range(2)]
    for order in (*recorded, *ours):
        wrong, strong = violations(order, sizes, 16)
        assert wrong == 0 and strong > 190
    # The test sees what it is meant to see.
    assert violations(np.random.default_rng(0).permutation(256).tolist(), sizes, 16)[0] > 100


@settings(max_examples=30, deadline=None)
@given(grid=st.integers(1, 6), seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 35), max_size=6))
def test_any_steps_of_any_grid_give_a_permutation(grid: int, seed: int, cuts: list[int]) -> None:
    ends = sorted({0, grid * grid, *(cut for cut in cuts if cut < grid * grid)})
    sizes = [end - start for start, end in itertools.pairwise(ends)]
    order = locality_order(grid, sizes, np.random.default_rng(seed).permutation(grid * grid))
    assert np.array_equal(np.sort(order), np.arange(grid * grid))
    assert violations(order.tolist(), sizes, grid)[0] == 0


@settings(max_examples=30, deadline=None)
@given(grid=st.integers(2, 8), steps=st.one_of(st.none(), st.integers(1, 20)), seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_known_cells_count_as_placed(grid: int, steps: int | None, seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    known_N = random.random(grid * grid) < share
    known = int(known_N.sum())
    sizes = cells_per_step(grid * grid, steps, known)
    order = locality_order(grid, sizes, random.permutation(grid * grid), known_N).tolist()
    assert order[:known] == np.flatnonzero(known_N).tolist() and sorted(order) == list(range(grid * grid))
    assert violations(order[known:], sizes, grid, order[:known])[0] == 0


def test_cells_that_fill_a_step_are_the_farthest_from_it() -> None:
    """A corner is placed, and both of its neighbours are too near to one another: one begins the step, and a far cell follows."""
    order = locality_order(5, [1, 3, 21], np.array([1, *range(2, 25), 0]))
    assert order[0] == 24 and order[1] in (19, 23)
    far = [squared(cell, order[1]) for cell in set(range(25)) - {24, order[1]}]
    assert squared(order[2], order[1]) == max(far)


def squared(one: int, other: int) -> int:
    return (one // 5 - other // 5) ** 2 + (one % 5 - other % 5) ** 2


def test_an_image_has_its_order_in_any_batch_for_its_steps() -> None:
    model = small_model(grid=4)

    def orders(images: list[int], steps: int | None, seed: int = 3) -> list[list[int]]:
        request = OrderRequest(model, torch.tensor(images), seed, NOWHERE, "", steps)
        found = policy("locality").sampling(request)
        assert isinstance(found, torch.Tensor) and found.dtype == torch.int64
        return found.tolist()

    first = orders([0, 1, 2, 3], 6)
    assert orders([2], 6) == [first[2]] and len({tuple(order) for order in first}) == 4
    assert len({order[0] for order in orders(list(range(20)), None)}) > 5  # begins anywhere
    assert orders([0], 6, seed=4) != [first[0]] and orders([0], None) != [first[0]]
    assert all(violations(order, cells_per_step(16, 6), 4)[0] == 0 for order in first)


def test_a_drawing_follows_the_order_of_its_steps() -> None:
    emoji = oar_scale.load("recipes/weights/emoji")
    drawn = emoji.draw(["a red apple"], seed=1, order="locality", steps=6, guidance=1.0)
    assert drawn.passes_B.tolist() == [6]
    assert violations(drawn.order_BN[0].tolist(), cells_per_step(64, 6), 8)[0] == 0


def test_the_cells_of_an_edit_lie_beside_known_ones_and_apart_in_each_pass() -> None:
    """By the model's own methods and by the server's; pictures of one batch know different cells."""
    emoji = oar_scale.load("recipes/weights/emoji")
    boxes, pictures = [(8, 8, 24, 24), (0, 0, 32, 20)], [Image.new("RGB", (32, 32), colour) for colour in ("red", "gold")]
    edits = emoji.edit(pictures, boxes, ["a red apple", "a smiling cat"], order="locality", steps=12, guidance=1.0)
    planner = Planner(emoji, Limits(), ["locality"])
    files = [upload(picture, box) for picture, box in zip(pictures, boxes, strict=True)]
    task = planner.edit(EditSettings(prompt="a red apple", order="locality", steps=12, seed=0), files, 1, 0)
    for edit, start in zip(edits, begin(emoji, task), strict=True):
        (square,) = edit.squares
        order, known, drawn = square.order_N.tolist(), set((~square.drawn_N).nonzero()[:, 0].tolist()), int(square.drawn_N.sum())
        sizes = cells_per_step(64, 12, 64 - drawn)
        assert len(sizes) < drawn and max(sizes) > 1 and set(order[: 64 - drawn]) == known
        assert violations(order[64 - drawn :], sizes, 8, known)[0] == 0
        assert isinstance(start.drawing.order, torch.Tensor) and start.known == order[: 64 - drawn]
        assert start.drawing.order.tolist() == order


def upload(picture: Image.Image, box: tuple[int, int, int, int]) -> Upload:
    """A picture and the mask of a box, as a client sends them."""
    picture_file, mask_file, mask = io.BytesIO(), io.BytesIO(), Image.new("L", picture.size)
    mask.paste(255, box)
    picture.save(picture_file, "PNG")
    mask.save(mask_file, "PNG")
    return Upload(picture_file.getvalue(), mask_file.getvalue(), "white", "image", False, Limits(), 32)


def test_nothing_is_trained_on_it() -> None:
    with pytest.raises(UserError, match="order 'locality' has no orders to train on"):
        policy("locality").training(NOWHERE, 4)
