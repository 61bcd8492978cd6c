"""Extraction on paper: operations and memory by formula, stragglers and losses acted out."""

from __future__ import annotations

import pytest

from oar_scale.model.flops import extraction_flops
from oar_scale.planning.assumptions import Assumptions, read_assumptions
from oar_scale.planning.extracting import evaluation, extraction, makespan
from tests.planning.cases import case

EVEN = ["actors.slow_share=0", "actors.spread=0"]


def even(*more: str) -> Assumptions:
    return read_assumptions([*EVEN, *more])


def test_equal_actors_end_together() -> None:
    found = makespan(1000, 60.0, 10, 0.0, 5.0, even(), seed=0)
    assert found.seconds == found.ideal_s == 5.0 + 100 * 60.0
    assert (found.lost_actors, found.given_twice, found.idle_share) == (0, 0, 0)


def test_slow_actors_take_fewer_shards_and_the_rest_go_on() -> None:
    found = makespan(1000, 60.0, 10, 0.0, 0.0, even("actors.slow_share=0.5"), seed=0)
    assert found.ideal_s < found.seconds < 2 * found.ideal_s


def test_a_late_shard_is_given_to_a_second_actor() -> None:
    slow = even("actors.slow_share=0.2", "actors.slow_factor=50")
    found = makespan(40, 60.0, 20, 0.0, 0.0, slow, seed=1)
    assert found.given_twice > 0 and found.seconds < 10 * 60.0  # and not 50


def test_lost_actors_cost_their_shard_and_a_start() -> None:
    hour = 3600.0
    quiet = makespan(2000, hour, 100, 0.0, 60.0, even(), seed=0)
    dying = makespan(2000, hour, 100, 20.0, 60.0, even(), seed=0)
    expected = 20.0 * 100 * quiet.seconds / (365.25 * 86400)
    assert dying.lost_actors == pytest.approx(expected, rel=0.5) and quiet.seconds < dying.seconds < 1.2 * quiet.seconds


def test_the_same_seed_acts_out_the_same() -> None:
    first, again, other = (makespan(500, 60.0, 7, 1.0, 5.0, read_assumptions(), seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_extraction_takes_the_operations_of_its_formula_whatever_dies() -> None:
    planned = case("imagenet", nodes=8, gpus_per_node=8, images=10**6, assume=["time.extraction_mfu=0.5"])
    found = extraction(planned)
    assert found is not None and found.flops_per_order == extraction_flops(planned.spec)
    assert found.images_per_s == pytest.approx(64 * 989e12 * 0.5 / extraction_flops(planned.spec))
    assert found.seconds == pytest.approx(10**6 / found.images_per_s + 60 + found.shard_s / 2, rel=0.01)


def test_guidance_and_several_orders_cost_their_share() -> None:
    one = extraction(case(images=10**6))
    guided = extraction(case("imagenet", "extract.guidance=2.0", images=10**6))
    several = extraction(case("imagenet", "extract.orders_per_image=4", "extract.first_cell=random", images=10**6))
    assert one and guided and several
    assert 1.8 < guided.seconds / one.seconds < 2.1 and several.orders == 4 * one.orders
    assert several.seconds == pytest.approx(4 * one.seconds, rel=0.05)


def test_a_cheaper_way_is_called_an_upper_bound() -> None:
    found = extraction(case("imagenet", "extract.commit_per_step=4", images=10**6))
    assert found is not None and not found.exact


def test_a_raster_model_has_nothing_to_extract() -> None:
    planned = case("imagenet", "model.layout=raster", images=10**6)
    assert extraction(planned) is None and evaluation(planned) is None


def test_the_largest_batch_fills_the_gpu_and_not_more() -> None:
    found = extraction(case(images=10**6))
    assert found is not None and found.largest_batch > 1000
    too_many = extraction(case("imagenet", f"extract.batch={found.largest_batch + 1}", images=10**6))
    assert too_many is not None and too_many.memory > 141e9 > found.memory


def test_the_evaluation_draws_with_three_models_and_two_without_a_control() -> None:
    with_control, without = (evaluation(case("imagenet", *more)) for more in ((), ("pipeline.control=false",)))
    assert with_control and without and without.flops == pytest.approx(with_control.flops * 2 / 3, rel=0.05)


def test_the_evaluation_takes_the_gpus_of_one_node() -> None:
    on_gpus, on_cpus = evaluation(case("imagenet", "parallel.workers=32", nodes=4)), evaluation(case("smoke"))
    assert on_gpus and (on_gpus.processes, on_gpus.on) == (8, "GPUs")
    assert on_cpus and (on_cpus.processes, on_cpus.on) == (2, "CPUs")
