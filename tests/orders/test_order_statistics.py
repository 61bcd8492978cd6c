"""Words, agreement, numbers and the page, on orders whose answer is known."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from oar_scale.errors import UserError
from oar_scale.orders.analysis import choice_entropy, describe_orders, frontier_share, mean_time_map, neighbour_share
from oar_scale.orders.analysis.agreement import agreement
from oar_scale.orders.analysis.analysis_values import HeadReport, HeadRow, OrderAnalysis
from oar_scale.orders.analysis.caption_groups import caption_words, groups, most_deviating
from oar_scale.orders.policies import grid_policies
from oar_scale.report.orders_page import render_orders
from oar_scale.results.examples import OrderExample

GRID, CELLS = 4, 16


def random_orders(count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(CELLS) for _ in range(count)])


def test_diagonal_steps_touch_the_frontier_but_no_neighbour() -> None:
    """Diagonal steps do not count as steps to a neighbour but keep to the frontier."""
    order = np.array([[0, 3, 1, 2]])  # in a grid of 2 x 2 every cell touches every other
    assert neighbour_share(order, 2)[0] == pytest.approx(1 / 3)
    assert frontier_share(order, 2)[0] == 1.0


def test_the_spiral_stays_at_its_frontier_a_lattice_does_not() -> None:
    """The spiral stays at its frontier and a lattice leaves it."""
    paths = {name: policy.path(8)[None] for name, policy in grid_policies().items()}
    assert frontier_share(paths["spiral"], 8)[0] == 1.0 and neighbour_share(paths["spiral"], 8)[0] == 1.0
    # Of the checkerboard's cells the 16 of the 4 x 4 lattice touch nothing when they are placed.
    assert frontier_share(paths["checkerboard"], 8)[0] == pytest.approx((63 - 15) / 63)


def test_entropy_of_a_shared_step_is_0_of_a_fair_choice_1() -> None:
    """A step that all images share has no entropy and a fair choice all of it."""
    orders = np.stack([np.roll(np.arange(CELLS), shift) for shift in range(CELLS)])
    orders = np.concatenate([np.zeros((CELLS, 1), int), orders + 1], axis=1)  # a first cell that all share
    entropy = choice_entropy(orders)
    assert entropy[0] == 0.0 and entropy[1:] == pytest.approx(math.log(CELLS))


def test_a_word_with_other_orders_stands_out_a_random_one_not() -> None:
    """A word whose images go another way stands out and a word by chance does not."""
    orders = random_orders(400)
    orders[:40] = np.sort(orders[:40])[:, ::-1]  # the images of "late": backwards
    names = [
        [*(["late"] if row < 40 else []), *(["chance"] if row % 7 == 3 else []), "all", *(["rare"] if row < 5 else [])]
        for row in range(400)
    ]
    by_name = {group.name: group for group in groups(orders, GRID, names, at_least=8)}
    assert set(by_name) == {"late", "chance"}  # "all" is the mean itself, "rare" has too few
    assert by_name["late"].images == 40 and by_name["late"].deviation > 0.25
    assert by_name["chance"].deviation < 0.02 < by_name["late"].deviation
    np.testing.assert_allclose(by_name["late"].time_map.ravel(), np.arange(CELLS)[::-1] / 15)
    assert most_deviating(list(by_name.values()), 1)[0].name == "late"


def test_caption_words_ignore_case_and_punctuation() -> None:
    """The words of a caption are counted whatever their case and punctuation."""
    assert caption_words("A drawing of the Cat, a cat & St. Pierre") == ["drawing", "the", "cat", "pierre"]


def test_agreement_is_read_beside_that_of_different_images() -> None:
    orders = random_orders(200)
    same = agreement("same", orders, orders, GRID)
    assert (same.distance, same.same_first, same.early_overlap) == (0.0, 1.0, 1.0) and same.map_correlation == pytest.approx(1.0)
    assert same.other_image_distance == pytest.approx(0.5, abs=0.03)
    other = agreement("other", orders, random_orders(200, seed=1), GRID)
    assert other.distance == pytest.approx(0.5, abs=0.03) and other.early_overlap == pytest.approx(0.25, abs=0.05)
    assert agreement("backwards", orders, orders[:, ::-1], GRID).distance == 1.0
    with pytest.raises(UserError, match="finer: orders of 25 cells, the run's have 16"):
        agreement("finer", orders, np.tile(np.arange(25), (200, 1)), 5)


@pytest.fixture(scope="module")
def analysis() -> OrderAnalysis:
    orders = random_orders(60)
    names = [["cat" if row % 2 else "dog"] for row in range(60)]
    groups_shown = tuple(groups(orders, GRID, names, 8))
    picture = np.zeros((8, 8, 3), np.uint8)
    return OrderAnalysis(
        recipe_name="made-up",
        where="runs/x/orders/train",
        model_id="m",
        settings_id="s",
        score="gt_logprob",
        all_images=1000,
        grid=GRID,
        statistics=describe_orders(orders, GRID),
        random=describe_orders(random_orders(60, 1), GRID),
        time_map=mean_time_map(orders, GRID),
        choice_entropy=choice_entropy(orders),
        random_choice_entropy=choice_entropy(random_orders(60, 1)),
        step_score=-np.linspace(0, 3, CELLS),
        distances={"raster": 0.4, "spiral": 0.55, "mean": 0.3},
        frequent=groups_shown,
        deviating=groups_shown,
        agreements=(
            agreement("<b>other</b>", orders, orders, GRID),
            replace(agreement("flat", orders, orders, GRID), map_correlation=math.nan),
        ),
        examples=(OrderExample('a "cat" <i>', picture, np.arange(CELLS).reshape(GRID, GRID)),),
        head=HeadReport("m", "s", 50, 10, 136, 5, 1.0, 0, (HeadRow("order head ahead", 0.4, 0.4, 16),)),
        animation=b"RIFF",
    )


def test_the_numbers_are_json_and_what_is_none_is_null(analysis: OrderAnalysis) -> None:
    numbers = json.loads(json.dumps(analysis.numbers(), allow_nan=False))
    assert numbers["agreements"][1]["map_correlation"] is None
    assert numbers["statistics"]["orders"] == 60 and np.shape(numbers["time_map"]) == (GRID, GRID)
    assert numbers["head"]["rows"][0]["tau"] == 0.4 and numbers["distances"]["raster"] == 0.4
    assert "animation" not in numbers and "examples" not in numbers


def test_the_page_loads_nothing_and_shows_what_was_found(analysis: OrderAnalysis) -> None:
    html = render_orders(analysis)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", html)
    assert "<b>other</b>" not in html and "&lt;b&gt;other&lt;/b&gt;" in html
    for expected in (
        "60 of 1,000 training images",
        "order head ahead",
        "tau 0.40",
        "136",
        "dog · 30 images",
        "data:image/webp;base64,UklGRg==",
    ):
        assert expected in html, expected
    assert html.index("<td>mean</td>") < html.index("<td>raster</td>") < html.index("<td>spiral</td>")


def test_a_page_without_pictures_words_or_head_says_so(analysis: OrderAnalysis) -> None:
    bare = replace(analysis, examples=(), animation=b"", frequent=(), deviating=(), agreements=(), head=None)
    html = render_orders(bare)
    for expected in ("no image tokenizer", "No word or class has enough images", "--against FOLDER", "--train-head"):
        assert expected in html, expected
