"""Extraction on paper: operations and memory by formula, stragglers and losses acted out."""

from __future__ import annotations

import pytest

from oar_scale.errors import UserError
from oar_scale.model.flops import extraction_flops
from oar_scale.planning.assumptions import Assumptions, read_assumptions
from oar_scale.planning.case import Case
from oar_scale.planning.evaluation_plan import plan_evaluation
from oar_scale.planning.extraction_plan import ActorPlan, ExtractionPlan, makespan, plan_actors, plan_extraction
from oar_scale.planning.failures import YEAR_S
from tests.planning.cases import case

EVEN = ["actors.slow_share=0", "actors.spread=0"]


def planned(case: Case) -> tuple[ActorPlan, ExtractionPlan]:
    actors = plan_actors(case)
    assert actors is not None
    orders = plan_extraction(case, actors)
    assert orders is not None
    return actors, orders


def even(*more: str) -> Assumptions:
    return read_assumptions([*EVEN, *more])


def test_equal_actors_end_together() -> None:
    outcome = makespan(1000, 60.0, 10, 0.0, 5.0, even(), seed=0)
    assert outcome.seconds == outcome.ideal_s == 5.0 + 100 * 60.0
    assert (outcome.lost_actors, outcome.given_twice, outcome.idle_share) == (0, 0, 0)


def test_slow_actors_take_fewer_shards_and_the_rest_go_on() -> None:
    outcome = makespan(1000, 60.0, 10, 0.0, 0.0, even("actors.slow_share=0.5"), seed=0)
    assert outcome.ideal_s < outcome.seconds < 2 * outcome.ideal_s


def test_a_late_shard_is_given_to_a_second_actor() -> None:
    slow = even("actors.slow_share=0.2", "actors.slow_factor=50")
    outcome = makespan(40, 60.0, 20, 0.0, 0.0, slow, seed=1)
    assert outcome.given_twice > 0 and outcome.seconds < 10 * 60.0  # and not 50


def test_lost_actors_cost_their_shard_and_a_start() -> None:
    hour = 3600.0
    quiet = makespan(2000, hour, 100, 0.0, 60.0, even(), seed=0)
    dying = makespan(2000, hour, 100, 20.0, 60.0, even(), seed=0)
    expected = 20.0 * 100 * quiet.seconds / (365.25 * 86400)
    assert dying.lost_actors == pytest.approx(expected, rel=0.5) and quiet.seconds < dying.seconds < 1.2 * quiet.seconds


def test_the_same_seed_acts_out_the_same() -> None:
    first, again, other = (makespan(500, 60.0, 7, 1.0, 5.0, read_assumptions(), seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_extraction_takes_its_formulas_operations() -> None:
    """Extraction takes the operations of its formula whatever dies."""
    large = case("imagenet", nodes=8, gpus_per_node=8, images=10**6, assume=["time.extraction_mfu=0.5"])
    _, planned_case = planned(large)
    assert planned_case.flops_per_order == extraction_flops(large.spec)
    assert planned_case.images_per_s == pytest.approx(64 * 989e12 * 0.5 / extraction_flops(large.spec))
    assert planned_case.seconds == pytest.approx(10**6 / planned_case.images_per_s + 60 + planned_case.shard_s / 2, rel=0.01)


@pytest.mark.parametrize(
    ("more", "orders"),
    [
        (["extract.orders_per_image=4", "extract.first_cell=random"], 4),
        (["extract.views=2"], 2),
        (["extract.orders_per_image=4", "extract.first_cell=random", "extract.views=2"], 8),
    ],
)
def test_every_order_of_every_view_costs_its_share(more: list[str], orders: int) -> None:
    _, one = planned(case("imagenet", *(word for word in more if "first_cell" in word), images=10**6))
    _, several = planned(case("imagenet", "extract.mirror=false", *more, images=10**6))
    assert several.orders == orders * 10**6 and several.order_bytes == orders * one.order_bytes
    assert several.images_per_s == pytest.approx(one.images_per_s / orders)
    assert several.seconds == pytest.approx(orders * one.seconds, rel=0.05)


def test_guidance_costs_a_second_branch() -> None:
    (_, one), (_, guided) = planned(case(images=10**6)), planned(case("imagenet", "extract.guidance=2.0", images=10**6))
    assert 1.8 < guided.seconds / one.seconds < 2.1


def test_steps_that_place_several_cells_are_planned_as_they_are() -> None:
    _, exact = planned(case("imagenet", images=10**6))
    _, four = planned(case("imagenet", "extract.commit_per_step=4", images=10**6))
    assert 3.5 < exact.flops_per_order / four.flops_per_order < 4
    evaluated, cheaper = plan_evaluation(case(images=10**6)), plan_evaluation(case("imagenet", "extract.commit_per_step=4", images=10**6))
    assert evaluated is not None and cheaper is not None and cheaper.flops < evaluated.flops


def test_a_raster_model_has_nothing_to_extract() -> None:
    raster = case("imagenet", "model.layout=raster", images=10**6)
    assert plan_actors(raster) is None and plan_evaluation(raster) is None


def test_the_largest_batch_fills_the_gpu_and_not_more() -> None:
    largest = planned(case(images=10**6))[0].largest_batch
    assert largest > 1000
    full, too_many = (planned(case("imagenet", f"extract.batch={batch}", images=10**6))[0] for batch in (largest, largest + 1))
    assert full.fits and not too_many.fits and too_many.memory > 141e9 >= full.memory


def test_a_small_model_is_not_cut_short() -> None:
    largest = planned(case("smoke", images=1000))[0].largest_batch
    assert largest > 8192 and planned(case("smoke", f"extract.batch={largest}", images=1000))[0].fits


def test_without_a_cluster_the_recipes_numbers_are_the_most() -> None:
    """Without a cluster there are no more actors and workers than the recipe has."""
    few = case("imagenet", "extract.actors=3", images=10**6)
    actors, orders = planned(few)
    assert (actors.count, actors.held) == (3, 3) and orders.gpu_hours == pytest.approx(3 * orders.seconds / 3600)
    assert planned(case("imagenet", "extract.actors=3", nodes=2, images=10**6))[0].count == 16
    twelve = ("data.canonical_streams=12", "parallel.workers=12", "pretrain.global_batch=768", "finetune.global_batch=768")
    assert case("imagenet", *twelve).workers == 12  # on two nodes of eight


def test_actors_that_share_a_gpu_have_half_its_memory() -> None:
    """Actors that share a gpu are as fast and have half the memory."""
    (one, whole), (two, halves) = (
        planned(case("imagenet", f"extract.gpus_per_actor={share}", nodes=2, images=10**6)) for share in (1, 0.5)
    )
    assert two.count == 2 * one.count == 32 and two.held == one.held and two.room == one.room / 2
    assert halves.images_per_s == whole.images_per_s and halves.shard_s == pytest.approx(2 * whole.shard_s)
    (four,) = {planned(case("imagenet", "extract.gpus_per_actor=4", nodes=2, images=10**6))[0]}
    assert (four.count, four.computing, four.held) == (4, 4, 16)


@pytest.mark.parametrize("share", [0.25, 1, 4])
def test_an_actor_is_lost_with_any_gpu_of_its_node(share: float) -> None:
    busy = case("imagenet", f"extract.gpus_per_actor={share}", nodes=4, gpus_per_node=8, images=10**7, failures_per_gpu_year=100.0)
    actors, orders = planned(busy)
    assert actors.lost_per_year == 8 * 100.0
    acted = makespan(orders.shards, orders.shard_s, actors.count, actors.lost_per_year, orders.start_s, even(), seed=0)
    nodes_lost = 100.0 * 32 * acted.seconds / YEAR_S
    assert acted.lost_actors == pytest.approx(nodes_lost * actors.count / 4, rel=0.3)


def test_an_actor_on_more_gpus_than_a_node_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"extract\.gpus_per_actor = 16: a node has 8"):
        plan_actors(case("imagenet", "extract.gpus_per_actor=16"))


def test_the_evaluation_draws_with_three_models_or_two() -> None:
    """The evaluation draws with three models and two without a control."""
    with_control, without = (plan_evaluation(case("imagenet", *more)) for more in ((), ("pipeline.control=false",)))
    assert with_control and without and without.flops == pytest.approx(with_control.flops * 2 / 3, rel=0.05)


def test_the_evaluation_takes_the_gpus_of_one_node() -> None:
    on_gpus, on_cpus = plan_evaluation(case("imagenet", "parallel.workers=32", nodes=4)), plan_evaluation(case("smoke"))
    assert on_gpus and (on_gpus.processes, on_gpus.on) == (8, "GPUs")
    assert on_cpus and (on_cpus.processes, on_cpus.on) == (2, "CPUs")
