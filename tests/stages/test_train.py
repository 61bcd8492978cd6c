"""What pretraining starts with: given weights, with what they need, or a refusal that names the field."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import copy_run, prepare_small_run, small_recipe
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, ModelSpec, load_model, model_id, save_model
from oar_scale.observe.console import Console
from oar_scale.run.context import Run
from oar_scale.stages import train as stage_train
from oar_scale.stages.train import _warn_of_slow_bf16, run_train, write_base
from oar_scale.storage import open_storage
from oar_scale.training.job import TrainingJob


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare_small_run(small_recipe(str(tmp_path_factory.mktemp("run"))))


def starting_from(run: Run, weights: Path, **changes: object) -> Run:
    recipe = run.recipe
    return Run(recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": str(weights), **changes})}))


@pytest.mark.parametrize(("precision", "native", "said"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)])
def test_a_cpu_without_bfloat16_is_pointed_out(
    run: Run, precision: str, native: bool, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    parallel = run.recipe.parallel.model_copy(update={"precision": precision})
    _warn_of_slow_bf16(Run(run.recipe.model_copy(update={"parallel": parallel}), Console()))
    assert ("parallel.precision=fp32" in capsys.readouterr().out) is said


def test_a_peers_habits_go_with_its_weights(run: Run, tmp_path: Path) -> None:
    spec = load_model(run.model_uri("base")).spec.model_copy(update={"condition_rotation": "zero", "dropout": 0.0})
    torch.manual_seed(1)
    peer = AnyOrderModel(spec)
    save_model(str(tmp_path / "peer.safetensors"), peer)
    write_base(starting_from(run, tmp_path / "peer.safetensors"))
    base = load_model(run.model_uri("base"))
    assert base.spec == spec.model_copy(update={"dropout": run.recipe.model.dropout})
    assert all(torch.equal(tensor, peer.state_dict()[name]) for name, tensor in base.state_dict().items())


def test_the_seed_decides_about_fresh_weights(run: Run) -> None:
    """They are drawn module by module, and are those that the model's constructor draws."""
    write_base(run)
    base = load_model(run.model_uri("base"))
    torch.manual_seed(run.recipe.seed)
    expected = AnyOrderModel(base.spec).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base.state_dict().items())


def test_weights_of_another_shape_are_refused_by_field(run: Run, tmp_path: Path) -> None:
    save_model(str(tmp_path / "model.safetensors"), AnyOrderModel(load_model(run.model_uri("base")).spec))
    with pytest.raises(UserError, match=r"has layers 2, the recipe and its tokenizers make 3"):
        write_base(starting_from(run, tmp_path / "model.safetensors", layers=3))


def test_without_pretraining_given_weights_are_the_model(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(2)
    peer = AnyOrderModel(load_model(run.model_uri("base")).spec)
    save_model(str(tmp_path / "peer.safetensors"), peer, shard_bytes=50_000)  # in several files, which have one name
    given = starting_from(run, tmp_path / "peer.safetensors")
    at_once = Run(given.recipe.model_copy(update={"pretrain": given.recipe.pretrain.model_copy(update={"steps": 0})}))
    results = run_train(at_once, "pretrain")
    assert results == {"steps": 0, "parameters": sum(parameter.numel() for parameter in peer.parameters())}
    taken = load_model(run.model_uri("any_order")).state_dict()
    assert all(torch.equal(tensor, peer.state_dict()[name]) for name, tensor in taken.items())


def test_no_pretraining_and_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there has to be a trained any-order model.*\n.*model\.weights"):
        small_recipe(str(tmp_path), pretrain={"steps": 0})


def test_under_torchrun_others_do_not_wait_for_a_base_model_that_rank_0_still_writes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy_run(run, str(tmp_path), **run.recipe.model_dump(exclude={"run_dir", "name"}))
    os.unlink(own.model_uri("base"))
    met: list[TrainingJob] = []
    monkeypatch.setattr(stage_train, "run_training", lambda job, console: met.append(job) or {})
    run_train(replace(own, console=Console(), rank=1), "pretrain")
    assert met, "it comes to the process group, where rank 0 meets it once the model is written"


def test_first_weights_are_not_drawn_anew_where_a_pretraining_resumes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another CPU, or another version of torch, draws others from the same seed."""
    own, plain = copy_run(run, str(tmp_path), **run.recipe.model_dump(exclude={"run_dir", "name"})), stage_train.fresh_weights
    write_base(own)
    first = model_id(own.model_uri("base"))

    def others(spec: ModelSpec) -> dict[str, Tensor]:
        torch.manual_seed(99)
        return plain(spec)

    monkeypatch.setattr(stage_train, "fresh_weights", others)
    open_storage(own.at()).write(own.at("checkpoints", "pretrain", "step-00000100", "COMMITTED"), b"{}")
    write_base(own)
    assert model_id(own.model_uri("base")) == first
