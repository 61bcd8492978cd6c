"""Memory by part: against DeepSpeed's own estimators, and against what workers that train take."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from oar_scale.cli import main
from oar_scale.config.schema import ParallelConfig
from oar_scale.model.spec import ModelSpec
from oar_scale.planning.activations import TrunkActivations
from oar_scale.planning.assumptions import read_assumptions
from oar_scale.planning.shape import parameters
from oar_scale.planning.worker_memory import WorkerMemory, micro_batch_sizes, worker_memory, zero_settings
from tests.launcher import run_workers
from tests.planning.cases import SPECS, case

SPEC = SPECS["instructed, class"]
TOTAL = parameters(SPEC).total
NODES, PER_NODE = 4, 8
WORKERS = NODES * PER_NODE


def held(spec: ModelSpec = SPEC, *, workers: int = WORKERS, accumulation: int = 1, average: bool = False, **parallel: Any) -> WorkerMemory:
    config = ParallelConfig(**{"gpus_per_worker": 1, "micro_batch": 4, **parallel})
    return worker_memory(spec, config, workers=workers, accumulation=accumulation, average=average, assumed=read_assumptions())


def test_zero_2_holds_what_deepspeeds_estimator_says() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    _, theirs = estimate_zero2_model_states_mem_needs(TOTAL, PER_NODE, NODES, cpu_offload=False)
    ours = held(zero_stage=2)
    # Theirs counts each gradient in bf16 and in float32; ours also the bf16 ones once more, flattened: 2 bytes of a share.
    assert ours.states + ours.step == pytest.approx(theirs + 2 * TOTAL / WORKERS, rel=1e-6)
    summed = held(zero_stage=2, gradient_dtype="fp32")
    assert summed.states + summed.step == pytest.approx(theirs, rel=1e-6)


def test_zero_2_offload_agrees_with_deepspeeds_estimator() -> None:
    """Zero 2 with offload holds what deepspeeds estimator says."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    node, theirs = estimate_zero2_model_states_mem_needs(TOTAL, PER_NODE, NODES, cpu_offload=True, additional_buffer_factor=1.0)
    ours = held(zero_stage=2, offload="optimizer")
    assert ours.states == theirs
    assert ours.host * PER_NODE < node  # theirs allows for a copy of the weights in every process
    assert ours.host == pytest.approx(18 * TOTAL / WORKERS + 2 * parameters(SPEC).largest, rel=1e-6)


@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer_and_parameters"])
def test_zero_3_shares_out_what_deepspeeds_estimator_says(offload: str) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    largest = parameters(SPEC).largest
    options = {
        "cpu_offload": offload != "none",
        "cpu_offload_params": offload == "optimizer_and_parameters",
        "additional_buffer_factor": 1.0,
    }
    node, gpu, gathered = estimate_zero3_model_states_mem_needs(TOTAL, largest, PER_NODE, NODES, **options)
    ours = held(zero_stage=3, offload=offload)
    # Theirs knows gradients in float32 alone; the engine also keeps them in bf16, and flattens them.
    ours_alone = 4 if offload == "none" else 0
    assert ours.states + ours.step == pytest.approx(gpu - gathered + ours_alone * TOTAL / WORKERS, rel=1e-6)
    if offload != "none":
        assert (ours.host - 2 * largest) * PER_NODE == pytest.approx(node + 2 * TOTAL / NODES, rel=1e-5)


def test_an_average_of_the_weights_is_a_third_moment() -> None:
    assert held(zero_stage=2, average=True).average == pytest.approx(4 * TOTAL / WORKERS, abs=4)
    assert held(zero_stage=0, precision="fp32", average=True).average == 4 * TOTAL


def test_only_zero_1_keeps_whole_gradients_between_batches() -> None:
    """Gradients wait whole for the last micro batch under zero 1 alone."""
    assert held(zero_stage=1, accumulation=2).gradients == 2 * TOTAL
    assert held(zero_stage=1).gradients == held(zero_stage=2, accumulation=2).gradients == pytest.approx(2 * TOTAL / WORKERS, abs=2)


def test_the_nodes_own_copy_of_the_parameters_is_counted() -> None:
    plain, near = held(zero_stage=3), held(zero_stage=3, hpz_workers=8)
    assert near.parameters - plain.parameters == pytest.approx(2 * TOTAL / 8, abs=2)


def test_each_stage_shards_more_checkpointing_keeps_less() -> None:
    """Every stage shares out more and checkpointing keeps less."""
    spec = SPEC.model_copy(update={"dim": 4096, "layers": 32, "heads": 32, "ffn_hidden": 11008})
    stages = [held(spec, zero_stage=stage, accumulation=2).total for stage in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True)
    kept = [held(spec, zero_stage=2, activation_checkpointing=mode).total for mode in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)


def test_a_traced_trunk_takes_the_place_of_the_formula() -> None:
    config = ParallelConfig(gpus_per_worker=1, zero_stage=2)
    traced = worker_memory(
        SPEC,
        config,
        workers=8,
        accumulation=1,
        average=False,
        assumed=read_assumptions(),
        trunk=TrunkActivations(kept=10**9, peak=2 * 10**9, late=0),
    )
    assert traced.activations == 2 * 10**9


def test_the_settings_of_the_table_are_those_a_recipe_may_have() -> None:
    for setting in zero_settings(case().recipe.parallel):
        ParallelConfig.model_validate(setting.model_dump())
    stages = [(setting.zero_stage, setting.offload) for setting in zero_settings(ParallelConfig(precision="fp32"))]
    assert (0, "none") in stages and (3, "optimizer_and_parameters") in stages


def test_micro_batches_divide_every_global_batch() -> None:
    recipe = case("imagenet", "finetune.global_batch=768", "parallel.micro_batch=16").recipe
    assert micro_batch_sizes(recipe, 8) == [32, 16, 8, 4, 2, 1]
    assert micro_batch_sizes(recipe, 7) == []


def benchmark() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tools" / "benchmarks" / "plan.py"
    spec = importlib.util.spec_from_file_location("plan_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = [("4.5 M (emoji)", 24, "none", 2, "backward pass"), ("24 M", 2, "selective", 1, "reduction")]
LARGE = [("24 M", 4, "selective", 3, "backward pass"), ("111 M (b)", 1, "full", 2, "reduction")]


def _train(cases: list[dict[str, Any]], folder: str) -> None:
    benchmark().worker(cases, folder, give_back=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("sizes", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "large"])
def test_workers_that_train_hold_what_is_printed(sizes: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two real workers, by the column ``tensors`` of the planned row; sizes are at their most at different moments."""
    tool = benchmark()
    cases = [tool.case(size, images=images, checkpointing=mode, zero_stage=stage) for size, images, mode, stage, _ in sizes]
    run_workers(_train, tool.WORKERS, cases, str(tmp_path))
    for wanted, took, (*_, moment) in zip(cases, tool.peaks(str(tmp_path)), sizes, strict=True):
        assert main(["plan", wanted["recipe"], *(word for override in wanted["overrides"] for word in ("-o", override))]) == 0
        lines = capsys.readouterr().out.splitlines()
        (heads,) = [line.split() for line in lines if "weights" in line and "tensors" in line]
        (row,) = [line.split() for line in lines if line.startswith("  *ZeRO")]
        assert any(f"most is held in the {moment}" in line for line in lines)
        printed = float(row[2:][heads[1:].index("tensors")]) * 1e9  # "*ZeRO", "2"; its offload is empty
        assert printed == pytest.approx(took, rel=0.1), wanted
        assert tool.predicted(wanted, traced=True) == pytest.approx(took, rel=0.1), wanted
