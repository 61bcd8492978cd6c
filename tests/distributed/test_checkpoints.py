"""Checkpoints by real DeepSpeed engines over gloo: the same numbers after them, whatever stage and number of workers wrote them."""

from __future__ import annotations

from typing import Any

import pytest
from launcher import run_workers
from small_run import prepare_small_run, pretraining
from small_training import note, noted, rooted, tiny_recipe, training, with_stage

from oar_scale.distributed.checkpoints import Saver, restore
from oar_scale.training.job import TrainingJob

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}
PAIRS = [(precision, source, target) for precision, stages in STAGES.items() for source in stages for target in stages]
RESHAPES = [(3, 1), (1, 3), (2, 2)]
"""Workers, and by how much the ZeRO stage is changed with them: 2 -> 3 -> 1 -> 2."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return pretraining(prepare_small_run(tiny_recipe(str(tmp_path_factory.mktemp("checkpoints") / "run"))))


def save_all(job: TrainingJob, out: str) -> None:
    """Three steps under each stage, a checkpoint, three more steps."""
    with training(job, 6) as trainer:
        for precision, stage in ((precision, stage) for precision, stages in STAGES.items() for stage in stages):
            name = f"{precision}-{stage}"
            here = with_stage(job, stage, precision, rooted(job, name))
            train = trainer(here)
            train.losses(0, 3)
            saver = Saver(here)
            saver.save(train.engine, 3, {"metrics": {"nll_random": 4.0}, "note": name})
            outcomes = [vars(outcome) for outcome in saver.finish(60)]
            note(out, name, {"digest": train.digest(), "next": train.losses(3, 6), "outcomes": outcomes, "parameters": train.parameters})


def restore_all(job: TrainingJob, out: str) -> None:
    """Into each stage's engine the checkpoints of all stages: the first one into a fresh engine, the others in the middle of training."""
    with training(job, 6) as trainer:
        for precision, stages in STAGES.items():
            for stage in stages:
                # DeepSpeed would keep parameters as small as these whole on all ranks; in bf16 they are cut up like large ones.
                cut_up({"stage3_param_persistence_threshold": 0} if precision == "bf16" else {})
                train = trainer(with_stage(job, stage, precision))
                for source in [*stages, *stages][stages.index(stage) + 1 :][: len(stages)]:
                    restored = restore(train.engine, with_stage(job, stage, precision, rooted(job, f"{precision}-{source}")))
                    digest = train.digest()
                    note(out, f"{precision}-{source}-to-{stage}", {"digest": digest, "next": train.losses(3, 6), **vars(restored)})


def cut_up(zero: dict[str, int]) -> None:
    """Give DeepSpeed more ZeRO settings from now on."""
    from oar_scale.config.deepspeed import deepspeed_config
    from oar_scale.distributed import deepspeed_engine as engine

    def more(*args: Any) -> dict[str, Any]:
        config = deepspeed_config(*args)
        return {**config, "zero_optimization": {**config["zero_optimization"], **zero}}

    engine.deepspeed_config = more


def resume_one_step(job: TrainingJob, out: str, index: int) -> None:
    """Go on for a step from each stage's last checkpoint, under another stage; save there; take two more steps."""
    world = RESHAPES[index][0]
    with training(job, 3 + len(RESHAPES) + 2) as trainer:
        for first in STAGES["fp32"]:
            stage = (first + sum(change for _, change in RESHAPES[: index + 1])) % 4
            here = with_stage(job, stage, root=rooted(job, f"fp32-{first}"))
            train = trainer(here)
            restored = restore(train.engine, here)
            note(out, f"resume-{first}-{world}", {"digest": train.digest(), "converted": restored.converted, "from": restored.world_size})
            train.losses(3 + index, 4 + index)
            saver = Saver(here)
            saver.save(train.engine, 4 + index, {})
            saver.finish(60)
            note(out, f"resumed-{first}-{world}", {"digest": train.digest(), "next": train.losses(4 + index, 6)})


@pytest.fixture(scope="module")
def saved(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("saved"))
    run_workers(save_all, 2, job, out)
    return out


@pytest.fixture(scope="module")
def restored(job: TrainingJob, saved: str) -> str:
    run_workers(restore_all, 2, job, saved)
    return saved


@pytest.fixture(scope="module")
def resumed(job: TrainingJob, restored: str) -> str:
    for index, (world, _) in enumerate(RESHAPES):
        run_workers(resume_one_step, world, job, restored, index)
    return restored


@pytest.mark.parametrize(("precision", "stage"), [(precision, stage) for precision, stages in STAGES.items() for stage in stages])
def test_the_losses_after_a_restart_are_the_same_bit_for_bit(restored: str, precision: str, stage: int) -> None:
    before, after = noted(restored, f"{precision}-{stage}"), noted(restored, f"{precision}-{stage}-to-{stage}")
    assert after["next"] == before["next"] and after["digest"] == before["digest"]
    assert (after["step"], after["converted"], after["world_size"], after["zero_stage"]) == (3, False, 2, stage)
    assert after["state"] == {"metrics": {"nll_random": 4.0}, "note": f"{precision}-{stage}"} and after["rejected"] == []


@pytest.mark.parametrize(("precision", "source", "target"), [pair for pair in PAIRS if pair[1] != pair[2]])
def test_another_zero_stage_resumes_with_the_same_losses(restored: str, precision: str, source: int, target: int) -> None:
    """And with the same weights and moments."""
    before, after = noted(restored, f"{precision}-{source}"), noted(restored, f"{precision}-{source}-to-{target}")
    assert after["digest"] == before["digest"] and after["digest"]["steps"] == 3
    assert after["next"] == pytest.approx(before["next"], abs=1e-5 if precision == "fp32" else 2e-2)
    assert after["converted"] and after["zero_stage"] == source


@pytest.mark.parametrize("first", STAGES["fp32"])
def test_other_numbers_of_workers_resume_with_the_same_losses(resumed: str, first: int) -> None:
    """And with the same weights and moments."""
    before = noted(resumed, f"fp32-{first}")
    for index, (world, workers_before) in enumerate(zip([world for world, _ in RESHAPES], [2, 3, 1], strict=True)):
        at_start, after = noted(resumed, f"resume-{first}-{world}"), noted(resumed, f"resumed-{first}-{world}")
        assert at_start["digest"] == before["digest"], f"{workers_before} -> {world} workers"
        assert at_start["converted"] and at_start["from"] == workers_before
        assert after["next"] == pytest.approx(noted(resumed, f"fp32-{first}")["next"][1 + index :], abs=1e-5)
        before = after


@pytest.mark.parametrize("precision", STAGES)
def test_a_checkpoint_holds_little_beside_weights_and_moments(saved: str, precision: str) -> None:
    """The moments are two, and the moving average."""
    for stage in STAGES[precision]:
        notes = noted(saved, f"{precision}-{stage}")
        (outcome,) = notes["outcomes"]
        assert outcome["fault"] is None and outcome["step"] == 3 and outcome["seconds"] >= outcome["wait_s"] >= 0
        minimum = 16 * notes["parameters"]
        assert minimum < outcome["bytes"] < minimum + 40_000, f"ZeRO {stage}"
