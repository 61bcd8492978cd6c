"""Shipped recipes for GPUs are as fast as their settings allow: the lowest ZeRO stage that fits, compiled, nothing computed again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from oar_scale.cli import main
from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import ParallelConfig
from oar_scale.distributed.attempt_metadata import notices
from oar_scale.planning.memory_fit import fits_on, memory_function
from oar_scale.planning.plan import PlanOptions, case_of
from oar_scale.planning.worker_memory import zero_settings
from tests.planning.cases import RECIPES, SHIPPED

FOR_GPUS = [path for path in SHIPPED if load_recipe(str(path), ()).parallel.gpus_per_worker]
SMALLEST = "h100"
"""80 GB: the least that any of them asks for."""


def test_there_are_gpu_recipes_of_every_size() -> None:
    assert len(FOR_GPUS) >= 13


@pytest.mark.parametrize("path", FOR_GPUS, ids=lambda path: path.stem)
def test_gpu_recipes_use_the_lowest_zero_stage_that_fits(path: Path) -> None:
    """On their own number of GPUs of 80 GB, with their own micro-batch."""
    planned = case_of(load_recipe(str(path), ()), PlanOptions(gpu=SMALLEST))
    parallel, holds = planned.recipe.parallel, memory_function(planned)
    fitting = [each.zero_stage for each in zero_settings(parallel) if each.offload == "none" and fits_on(planned, holds(each))]
    assert parallel.zero_stage == min(fitting)


@pytest.mark.parametrize("path", FOR_GPUS, ids=lambda path: path.stem)
def test_gpu_recipes_compile_and_recompute_nothing_in_vain(path: Path) -> None:
    planned = case_of(load_recipe(str(path), ()), PlanOptions(gpu=SMALLEST))
    parallel = planned.recipe.parallel
    assert parallel.compile and parallel.slow_compilation is None
    plain = memory_function(planned)(parallel.model_copy(update={"activation_checkpointing": "none"}))
    assert parallel.activation_checkpointing == "none" or not fits_on(planned, plain)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_stage": 3}, r"under ZeRO-3 compiles blocks in pieces only.* lowest that fits \(oar plan\), or leave compile out"),
        ({"zero_stage": 3, "activation_checkpointing": "selective"}, r"compiles nothing: every block runs eagerly.*leave compile out"),
        ({"gpus_per_worker": 0}, r"on a CPU .*no faster: leave it out"),
    ],
    ids=["ZeRO-3", "ZeRO-3, selective", "CPU"],
)
def test_compilation_in_vain_is_said_with_the_remedy(settings: dict[str, object], said: str) -> None:
    parallel = ParallelConfig.model_validate({"gpus_per_worker": 1, "zero_stage": 1, "compile": True})
    assert parallel.slow_compilation is None and notices(parallel, "NVIDIA H200") == []
    (notice,) = notices(parallel.model_copy(update=settings), None)
    assert re.search(said, notice)
    assert notices(parallel.model_copy(update={**settings, "compile": False}), None) == []


def test_a_plan_says_that_compilation_is_in_vain(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "text-3b.yaml")
    assert main(["plan", recipe]) == 0 and "note:" not in capsys.readouterr().out
    assert main(["plan", recipe, "-o", "parallel.zero_stage=3"]) == 0
    assert "note: parallel.compile under ZeRO-3" in capsys.readouterr().out


def test_a_gpu_without_a_known_peak_is_named() -> None:
    parallel = ParallelConfig(gpus_per_worker=1)
    (notice,) = notices(parallel, "NVIDIA H300 NVL")
    assert notice.startswith("no MFU: the peak of NVIDIA H300 NVL is not known")
    assert notices(parallel.model_copy(update={"precision": "fp32"}), "NVIDIA H300 NVL") == []
