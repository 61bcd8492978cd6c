"""All layouts, three conditions, grouped queries: whole images against one cell at a time, and what a row may know."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONDITIONS, cond_inputs, random_codes, random_orders, small_model
from torch import Tensor

from oar_scale.config.schema import Layout
from oar_scale.generation.sampling import Known, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, Decoder
from oar_scale.model.layouts import LAYOUTS
from oar_scale.model.spec import HELD, STRIDE
from oar_scale.orders.extraction import brute_force_orders, extract_orders, regret
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.orders.step_sizes import cells_per_step
from oar_scale.planning.activations import TABLES
from oar_scale.planning.shape import VECTORS

ANY_ORDER = ("instructed", "dual", "decoupled", "grouped")


def any_model(layout: str, condition: str = "text", **changes: Any) -> AnyOrderModel:
    return small_model(layout=layout, condition=CONDITIONS[condition], **changes)


@pytest.mark.parametrize("table", [LAYOUTS, STRIDE, HELD, VECTORS, TABLES])
def test_every_table_by_layout_has_all_layouts(table: dict[Layout, object]) -> None:
    assert set(table) == set(get_args(Layout))


def orders(model: AnyOrderModel, images: int, seed: int = 0) -> Tensor:
    if model.spec.layout == "raster":
        return torch.arange(model.spec.cells).expand(images, -1)
    return random_orders(model, images, seed)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the roundings of float32 sums taken in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(["raster", *ANY_ORDER]),
    condition=st.sampled_from(sorted(CONDITIONS)),
    kv_heads=st.sampled_from([None, 1]),
    rotation=st.sampled_from(["identity", "zero"]),
    grid=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
    known_share=st.floats(0, 1),
)
@torch.no_grad()
def test_likelihood_cell_by_cell_equals_the_whole_image(
    layout: str, condition: str, kv_heads: int | None, rotation: str, grid: int, batch: int, seed: int, known_share: float
) -> None:
    model = any_model(layout, condition, kv_heads=kv_heads, condition_rotation=rotation, grid=grid, seed=seed)
    codes, order, rows = random_codes(model, batch, seed), orders(model, batch, seed), model.condition(cond_inputs(model, batch, seed))
    placed, known, image = codes.gather(1, order), round(known_share * model.spec.cells), torch.arange(batch)
    prefix = Decoder(model).prefill(Decoder(model).begin(rows), order[:, :known], placed[:, :known])
    nll = []
    for step in range(known, model.spec.cells):
        empty = order[:, step : step + 1] if layout == "raster" else order[:, step:].sort(1).values
        winner = (empty == order[:, step, None]).int().argmax(1)
        candidates = Decoder(model).candidate_rows(prefix, empty)
        nll.append(-candidates.logits_BRV[image, winner].log_softmax(-1)[image, placed[:, step]])
        prefix = Decoder(model).commit(prefix, candidates, winner, placed[:, step])
    whole = model.nll(codes, order, rows)
    assert_same(torch.stack(nll, dim=1) if nll else whole[:, :0], whole[:, known:])


@pytest.mark.parametrize("layout", ["raster", *ANY_ORDER])
@pytest.mark.parametrize("condition", sorted(CONDITIONS))
def test_every_parameter_is_trained(layout: str, condition: str) -> None:
    model = any_model(layout, condition)
    # Dropping one of the prompts trains the null; the labels cover every class; ids and features are random.
    inputs = torch.arange(6)[:, None] % 5 if condition == "class" else cond_inputs(model, 6)
    drop = torch.tensor([True, False, False, False, False, False])
    model.loss(random_codes(model, 6), orders(model, 6), model.condition(inputs, drop))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("layout", ANY_ORDER)
@pytest.mark.parametrize("step", [0, 3, 7])
def test_a_logit_depends_on_earlier_codes_and_its_cell_alone(layout: str, step: int) -> None:
    """A logit depends on earlier codes and the requested cell alone."""
    model = any_model(layout)
    codes, order, rows = random_codes(model, 1), random_orders(model, 1), model.condition(cond_inputs(model, 1))
    before = model(codes, order, rows)
    changed = codes.clone()
    changed[0, order[0, step]] = (changed[0, order[0, step]] + 1) % model.spec.vocab_size
    after = model(changed, order, rows)
    assert torch.equal(before[:, : step + 1], after[:, : step + 1])
    assert (before[:, step + 1 :] - after[:, step + 1 :]).abs().amax(-1).min() > 1e-3
    swapped = order.clone()
    swapped[0, step], swapped[0, step + 1] = order[0, step + 1], order[0, step]
    other_cell = model(codes, swapped, rows)
    assert torch.equal(before[:, :step], other_cell[:, :step])
    assert (before[:, step] - other_cell[:, step]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("layout", ANY_ORDER)
@pytest.mark.parametrize("condition", sorted(CONDITIONS))
def test_orders_equal_brute_force(layout: str, condition: str) -> None:
    model = any_model(layout, condition, kv_heads=1)
    codes, rows = random_codes(model, 3), model.condition(cond_inputs(model, 3))
    orders, brute = (find(model, codes, rows, ExtractionSettings(guidance=2.0)) for find in (extract_orders, brute_force_orders))
    assert torch.equal(orders.order_BN, brute.order_BN)
    assert_same(orders.score_BN, brute.score_BN)
    assert regret(model, codes, rows, ExtractionSettings(guidance=2.0), orders.order_BN).max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("layout", ["raster", *ANY_ORDER])
def test_a_greedy_drawing_is_its_own_teacher_forced_choice(layout: str) -> None:
    model = any_model(layout, "class")
    rows, order = model.condition(cond_inputs(model, 3)), orders(model, 3)
    settings = SampleSettings(guidance=1.0, temperature=1.0, top_k=1, order_temperature=0.0)
    drawn = generate(model, rows, settings, 0, order_BN=order)
    assert torch.equal(model(drawn.codes_BN, order, rows).argmax(-1), drawn.codes_BN.gather(1, order))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["instructed", "decoupled"])
def test_known_cells_may_precede_a_parallel_drawing(layout: str) -> None:
    model = any_model(layout, "class", grid=4)
    rows, order, codes = model.condition(cond_inputs(model, 2)), random_orders(model, 2), random_codes(model, 2)
    known = Known(order[:, :5], codes.gather(1, order[:, :5]))
    settings = SampleSettings(guidance=2.0, temperature=1.0, top_k=1, order_temperature=0.0, steps=4)
    drawn = generate(model, rows, settings, 0, order_BN=order, known=known)
    assert torch.equal(drawn.codes_BN.gather(1, known.cells_BK), known.codes_BK)
    assert torch.equal(drawn.order_BN, order)
    # The first question of every pass sees exactly what a teacher-forced row sees.
    first = [5 + sum(sizes) for sizes in _beginnings(cells_per_step(16, 4, known=5))]
    null = model.null_condition(2)
    logits = model(drawn.codes_BN, order, null).lerp(model(drawn.codes_BN, order, rows), 2.0)
    assert torch.equal(logits.argmax(-1)[:, first], drawn.codes_BN.gather(1, order)[:, first])


@torch.no_grad()
@pytest.mark.parametrize("condition", sorted(CONDITIONS))
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_a_drawing_in_groups_is_its_own_teacher_forced_choice(condition: str, kv_heads: int | None) -> None:
    """All cells of all steps, and not the first ones only, are what one pass with the same groups makes likeliest."""
    model = any_model("grouped", condition, grid=4, kv_heads=kv_heads)
    rows, order, codes = model.condition(cond_inputs(model, 2)), random_orders(model, 2), random_codes(model, 2)
    known = Known(order[:, :5], codes.gather(1, order[:, :5]))
    settings = SampleSettings(guidance=2.0, temperature=1.0, top_k=1, order_temperature=0.0, steps=4)
    drawn = generate(model, rows, settings, 0, order_BN=order, known=known)
    groups = [1] * 5 + cells_per_step(16, 4, known=5)
    assert max(groups) > 2
    null = model.null_condition(2)
    logits = model(drawn.codes_BN, order, null, groups).lerp(model(drawn.codes_BN, order, rows, groups), 2.0)
    assert torch.equal(logits.argmax(-1)[:, 5:], drawn.codes_BN.gather(1, order)[:, 5:])


@torch.no_grad()
def test_questions_of_a_grouped_model_leave_nothing_behind() -> None:
    """However often and about whatever cells is asked, together or not, the answers are the same; together they are others."""
    model = any_model("grouped", grid=4)
    decoder, order, codes = Decoder(model), random_orders(model, 2), random_codes(model, 2)
    prefix = decoder.prefill(decoder.begin(model.condition(cond_inputs(model, 2))), order[:, :5], codes.gather(1, order[:, :5]))
    first = decoder.candidate_rows(prefix, order[:, 5:]).logits_BRV
    filled = prefix.cache[..., : prefix.rows, :].clone()
    assert (model.output(decoder.parallel_rows(prefix, order[:, 7:9])).float() - first[:, 2:4]).abs().amax(-1).min() > 1e-3
    assert_same(model.output(decoder.parallel_rows(prefix, order[:, 7:8])).float(), first[:, 2:3])
    assert_same(decoder.candidate_rows(prefix, order[:, 5:].flip(1)).logits_BRV.flip(1), first)
    assert torch.equal(prefix.cache[..., : prefix.rows, :], filled) and prefix.rows == model.spec.condition.rows + 5


@torch.no_grad()
def test_a_row_of_a_grouped_model_sees_its_group_and_those_before() -> None:
    """The order within a group means nothing, and codes matter to later groups alone."""
    model = any_model("grouped")
    codes, order, rows, groups = random_codes(model, 1), random_orders(model, 1), model.condition(cond_inputs(model, 1)), [2, 3, 1, 3]
    before = model(codes, order, rows, groups)
    other_way = torch.tensor([0, 1, 4, 3, 2, 5, 6, 7, 8])
    assert_same(model(codes, order[:, other_way], rows, groups), before[:, other_way])
    changed = codes.clone()
    changed[0, order[0, 3]] = (changed[0, order[0, 3]] + 1) % model.spec.vocab_size  # of the second group
    after = model(changed, order, rows, groups)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-3
    # Another cell asked for in the same step is seen, unlike its code.
    moved = order.clone()
    moved[0, 4], moved[0, 5] = order[0, 5], order[0, 4]
    assert (model(codes, moved, rows, groups)[:, 2:4] - before[:, 2:4]).abs().amax(-1).min() > 1e-3
    with pytest.raises(ValueError, match="of layout instructed asks for one cell after the other"):
        any_model("instructed")(codes, order, rows, groups)


def _beginnings(sizes: list[int]) -> list[list[int]]:
    return [sizes[:index] for index in range(len(sizes))]


@settings(max_examples=200, deadline=None)
@given(cells=st.integers(1, 600), steps=st.one_of(st.none(), st.integers(1, 700)), known=st.integers(0, 600))
def test_every_cell_is_placed_in_about_that_many_steps(cells: int, steps: int | None, known: int) -> None:
    """Every cell is placed in about as many steps as requested."""
    known = min(known, cells)
    sizes = cells_per_step(cells, steps, known)
    assert sum(sizes) == cells - known
    assert all(size >= 1 for size in sizes)
    assert len(sizes) <= (cells if steps is None else 1 if steps == 1 else steps + 1)
    if steps is None or steps >= cells:
        assert max(sizes, default=1) <= 2


def test_a_raster_model_refuses_other_orders_and_choices() -> None:
    model = any_model("raster")
    rows, backwards = model.null_condition(1), torch.arange(9).flip(0)[None]
    with pytest.raises(ValueError, match="raster order only"):
        model(random_codes(model, 1), backwards, rows)
    with pytest.raises(ValueError, match="only candidate is the next cell; it has no choice of 9"):
        extract_orders(model, random_codes(model, 1), rows, ExtractionSettings())


@pytest.mark.parametrize("layout", ["raster", "dual"])
def test_other_models_do_not_ask_for_several_cells_at_once(layout: str) -> None:
    model = any_model(layout, grid=4)
    settings = SampleSettings(guidance=1.0, temperature=1.0, top_k=1, order_temperature=0.0, steps=4)
    with pytest.raises(ValueError, match="only instructed, decoupled and grouped models decode in parallel"):
        generate(model, model.null_condition(1), settings, 0, order_BN=torch.arange(16)[None])


@torch.no_grad()
@pytest.mark.parametrize("condition", sorted(CONDITIONS))
@pytest.mark.parametrize("rotation", ["identity", "zero"])
def test_a_decoupled_model_knows_the_first_cell_by_its_condition(condition: str, rotation: str) -> None:
    """It cannot with one condition row, or with keys that are zero: then all cells have the same row to the last bit, in bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        model = any_model("decoupled", condition, condition_rotation=rotation, grid=4).to(dtype)
        decoder, order, codes = Decoder(model), random_orders(model, 3), random_codes(model, 3)
        prefix = decoder.begin(model.condition(cond_inputs(model, 3)))
        rows = decoder.candidate_rows(prefix, order).rows_BRD
        blind = condition == "class" or rotation == "zero"
        assert model.spec.blind_start is blind
        assert bool((rows == rows[:, :1]).all()) is blind
        prefix = decoder.prefill(prefix, order[:, :1], codes[:, :1])
        rows = decoder.candidate_rows(prefix, order[:, 1:]).rows_BRD
        assert (rows[:, 1:] != rows[:, :1]).any(-1).all()


@torch.no_grad()
def test_questions_of_a_decoupled_model_leave_nothing_behind() -> None:
    """However often and about whatever cells is asked, in parallel or not, the answers are the same."""
    model = any_model("decoupled", grid=4)
    decoder, order, codes = Decoder(model), random_orders(model, 2), random_codes(model, 2)
    prefix = decoder.prefill(decoder.begin(model.condition(cond_inputs(model, 2))), order[:, :5], codes.gather(1, order[:, :5]))
    first = decoder.candidate_rows(prefix, order[:, 5:]).logits_BRV
    filled = prefix.cache[..., : prefix.rows, :].clone()
    assert_same(model.output(decoder.parallel_rows(prefix, order[:, 7:9])).float(), first[:, 2:4])
    assert_same(decoder.candidate_rows(prefix, order[:, 5:].flip(1)).logits_BRV.flip(1), first)
    assert torch.equal(prefix.cache[..., : prefix.rows, :], filled) and prefix.rows == model.spec.condition.rows + 5


def test_a_decoupled_spec_has_an_even_number_of_layers() -> None:
    with pytest.raises(ValueError, match="layers 3 must be even"):
        any_model("decoupled", layers=3)


@torch.no_grad()
def test_a_dropped_prompt_is_the_null_condition_of_each_kind() -> None:
    for condition in CONDITIONS:
        model = any_model("instructed", condition)
        rows = model.condition(cond_inputs(model, 2), torch.tensor([True, False]))
        null = model.null_condition(1)[0]
        # Other batches, other last bits: how a CPU multiplies depends on the shape.
        assert torch.allclose(rows[0], null, rtol=1e-5, atol=1e-6), condition
        assert not torch.allclose(rows[1], null, rtol=0.1, atol=0.01), condition


@torch.no_grad()
def test_a_feature_row_of_zeros_is_no_token() -> None:
    model = any_model("instructed", "features")
    features = cond_inputs(model, 1)
    features[0, 1:] = 0
    rows, null = model.condition(features), model.null_condition(1)
    assert torch.equal(rows[0, 1:], null[0, 1:])
    assert not torch.equal(rows[0, 0], null[0, 0])


def test_features_of_another_shape_are_named() -> None:
    model = any_model("instructed", "features")
    with pytest.raises(ValueError, match=r"\[2, 3, 7\], the model takes \[B, 3, 6\]"):
        model.condition(torch.zeros(2, 3, 7))
