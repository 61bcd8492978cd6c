"""The time of a step follows from operations, bytes and links."""

from __future__ import annotations

from typing import Any

import pytest

from oar_scale.model.flops import training_flops, useful_flops
from oar_scale.planning.case import Case
from oar_scale.planning.step_time import StepTime, collectives, communication, step_time
from tests.planning.cases import case

H200_PEAK = 989e12


def step(planned: Case, global_batch: int = 1024, **parallel: Any) -> StepTime:
    return step_time(planned, planned.recipe.parallel.model_copy(update=parallel), global_batch)


def sent(planned: Case, accumulation: int = 1, **parallel: Any) -> float:
    """In units of the parameters' bytes."""
    size = 2 * planned.parameters.total * (planned.workers - 1) / planned.workers
    bytes_by_kind, _ = communication(planned, planned.recipe.parallel.model_copy(update=parallel), accumulation)
    return sum(bytes_by_kind.values()) / size


def test_computing_takes_useful_operations_over_peak_and_mfu() -> None:
    planned = case(mfu=0.4)
    assert step(planned).compute_s == pytest.approx(1024 / 8 * useful_flops(planned.spec) / (H200_PEAK * 0.4))


@pytest.mark.parametrize("settings", [{"compile": False}, {"zero_stage": 3}], ids=["not compiled", "ZeRO-3"])
def test_blocks_that_are_not_compiled_take_longer(settings: dict[str, Any]) -> None:
    planned = case()
    assert step(planned, **settings).compute_s == pytest.approx(1.3 * step(planned).compute_s)
    assert step(planned, **settings).mfu < step(planned).mfu


def test_full_checkpointing_computes_the_trunk_once_more() -> None:
    planned = case()
    full = step(planned, activation_checkpointing="full")
    share = training_flops(planned.spec, recompute=True) / training_flops(planned.spec)
    assert full.compute_s == pytest.approx(step(planned).compute_s * share)
    assert full.mfu < step(planned).mfu


@pytest.mark.parametrize(("stage", "accumulation", "volume"), [(1, 1, 3), (1, 4, 3), (2, 1, 3), (2, 4, 9), (3, 1, 3), (3, 4, 12)])
def test_workers_send_what_the_stage_makes_them_send(stage: int, accumulation: int, volume: float) -> None:
    assert sent(case(), accumulation, zero_stage=stage) == pytest.approx(volume)


def test_zero_0_sends_gradients_in_float32_and_no_weights() -> None:
    planned = case("imagenet", "parallel.precision=fp32", "parallel.zero_stage=0")
    assert sent(planned) == pytest.approx(2 * 2)  # twice the size of bf16


def test_quantised_travel_is_shorter() -> None:
    assert sent(case(), zero_stage=3, quantized_weights=True) == pytest.approx(2)
    assert sent(case(), zero_stage=3, quantized_gradients=True) == pytest.approx(2.25)


def test_hpz_gathers_the_second_time_inside_the_node() -> None:
    planned = case(nodes=4, gpus_per_node=8)
    seconds = [communication(planned, planned.recipe.parallel.model_copy(update={"zero_stage": 3, "hpz_workers": n}), 1)[1] for n in (1, 8)]
    assert seconds[1] < seconds[0]


def test_links_between_nodes_count_as_soon_as_there_are_two() -> None:
    one, two = case(nodes=1, gpus_per_node=8).cluster, case(nodes=2, gpus_per_node=8).cluster
    assert one.link(8) == 460e9 and two.link(16) == pytest.approx(400e9 * 0.85) and two.link(8) == 460e9


def test_zero_3_hides_most_of_its_communication() -> None:
    three = step(case(nodes=8, gpus_per_node=8), zero_stage=3, micro_batch=16)
    assert three.exposed_s == pytest.approx(0.3 * three.communication_s)


@pytest.mark.parametrize("stage", [1, 2])
def test_below_zero_3_the_reduction_hides_behind_the_backward(stage: int) -> None:
    """Most of the all-reduce does where the backward pass takes longer; the all-gather of weights does not."""
    planned = case(nodes=8, gpus_per_node=8)
    made = step(planned, zero_stage=stage, micro_batch=16)
    reduction_s = made.sent["all-reduce of gradients"] / planned.cluster.link(64)
    assert made.communication_s - made.exposed_s == pytest.approx(0.7 * reduction_s)
    slow = step(case(nodes=8, gpus_per_node=8, assume=["gpus.h200.network_gb_s=0.1"]), zero_stage=stage, micro_batch=16)
    assert slow.communication_s - slow.exposed_s == pytest.approx(2 / 3 * slow.compute_s)  # there is no more to hide behind


def test_zero_1_hides_behind_the_last_micro_batch_alone() -> None:
    slow = case(nodes=1, gpus_per_node=8, assume=["gpus.h200.node_bus_gb_s=0.1"])
    one, two = (step(slow, zero_stage=stage, micro_batch=32) for stage in (1, 2))
    assert two.communication_s - two.exposed_s == pytest.approx(4 * (one.communication_s - one.exposed_s))


def test_offload_hides_no_communication() -> None:
    made = step(case(nodes=8, gpus_per_node=8), zero_stage=2, micro_batch=16, offload="optimizer")
    assert made.exposed_s == made.communication_s


def test_a_single_worker_talks_to_nobody() -> None:
    planned = case("imagenet", "parallel.workers=1")
    assert step(planned).sent == {} and step(planned).communication_s == 0
    assert collectives(planned, planned.recipe.parallel, 1) >= 1


def test_slow_storage_makes_a_step_wait() -> None:
    assert step(case()).data_wait_s == 0
    slow = step(case(assume=["storage.s3_read_gb_s=0.001"]))
    assert slow.data_wait_s > 0
    assert slow.seconds == pytest.approx(1024 * case().shard.sample / 1e6, rel=0.01)


def test_offload_pays_for_pcie_and_the_nodes_memory() -> None:
    planned = case(nodes=1, gpus_per_node=8)
    optimizer, both = (step(planned, zero_stage=3, offload=kind).offload_s for kind in ("optimizer", "optimizer_and_parameters"))
    assert 0 < optimizer < both
    assert optimizer == pytest.approx(342_912_000 / 8 * (2 * 2 / 40e9 + 8 * 28 / 200e9))


def test_a_cpu_does_what_was_measured() -> None:
    planned = case("emoji")
    assert step(planned, 48).compute_s == pytest.approx(24 * useful_flops(planned.spec) / 0.05e12)
