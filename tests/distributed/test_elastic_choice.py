"""How many workers an elastic run starts with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.distributed.elastic import capacity_of, choose_workers

BATCH = {"pretrain": {"global_batch": 96}, "finetune": {"global_batch": 96}, "data": {"canonical_streams": 48}}


def recipe(workers: Any, micro_batch: int = 4) -> Recipe:
    return Recipe.model_validate({"name": "x", **BATCH, "parallel": {"workers": workers, "micro_batch": micro_batch}})


def test_only_numbers_that_divide_streams_and_batch_are_used() -> None:
    assert recipe({"min": 1, "max": 8}).worker_counts() == [8, 6, 4, 3, 2, 1]
    assert recipe({"min": 2, "max": 8}, micro_batch=6).worker_counts() == [8, 4, 2]
    assert recipe(4).worker_counts() == [4]


@given(st.integers(0, 40))
def test_the_choice_fits_the_capacity_or_is_the_smallest(capacity: int) -> None:
    counts = recipe({"min": 2, "max": 24}).worker_counts()
    chosen = choose_workers(recipe({"min": 2, "max": 24}), capacity)
    assert chosen == max((count for count in counts if count <= capacity), default=2)


@pytest.mark.parametrize(
    ("parallel", "named"),
    [
        ({"workers": {"min": 3, "max": 2}}, "min 3 is above max 2"),
        ({"workers": 0}, "greater than or equal to 1"),
        ({"workers": {"min": 5, "max": 6}}, "5 workers cannot share"),
        ({"zero_stage": 0, "precision": "bf16"}, "Use zero_stage 1 or more, or precision fp32"),
        ({"zero_stage": 2, "hpz_workers": 8}, "hpz_workers is a part of ZeRO-3"),
        ({"zero_stage": 3, "quantized_weights": True}, "on GPUs"),
        ({"zero_stage": 2, "offload": "optimizer_and_parameters"}, "only ZeRO-3 can offload parameters"),
    ],
)
def test_what_does_not_go_together_is_said(parallel: dict[str, Any], named: str) -> None:
    batch = {"pretrain": {"global_batch": 240}, "finetune": {"global_batch": 240}, "data": {"canonical_streams": 48}}
    with pytest.raises(ValidationError, match=named):
        Recipe.model_validate({"name": "x", **batch, "parallel": {"micro_batch": 1, **parallel}})


@pytest.mark.parametrize(
    ("parallel", "capacity"),
    [
        ({}, 2 + 96 + 96 + 8),
        ({"gpus_per_worker": 1}, 8 + 8 + 4),
        ({"gpus_per_worker": 1, "gpu_type": "H100"}, 16),
        ({"gpus_per_worker": 1, "gpu_type": "B200"}, 0),
        ({"gpus_per_worker": 1, "placement": "STRICT_PACK"}, 8),
        ({"gpus_per_worker": 1, "placement": "STRICT_SPREAD"}, 3),
        ({"gpus_per_worker": 1, "gpu_type": "L4", "placement": "STRICT_SPREAD"}, 1),
    ],
)
def test_capacity_follows_node_types_and_placement(parallel: dict[str, Any], capacity: int) -> None:
    h100 = {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
    nodes = [{"CPU": 2.0}, h100, h100, {"CPU": 8.0, "GPU": 4.0, "accelerator_type:L4": 1.0}]
    assert capacity_of(nodes, ParallelConfig.model_validate(parallel)) == capacity
