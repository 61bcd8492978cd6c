"""Recomputed and compiled blocks compute what plain ones do, and keep less."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import run_workers
from small_models import random_codes, random_orders, random_text, small_model, small_spec
from torch import Tensor, nn

from oar_scale.config.schema import ParallelConfig
from oar_scale.model import AnyOrderModel
from oar_scale.model.acceleration import accelerate
from oar_scale.model.spec import ClassSpec

MODES = ("selective", "full")


class Ran:
    """Loss, gradients and bytes kept (weights aside) of one training pass."""

    def __init__(self, model: AnyOrderModel, images: int = 2) -> None:
        order = random_orders(model, images)
        if model.spec.layout == "raster":
            order = torch.arange(model.spec.cells).expand_as(order)
        arguments = random_codes(model, images), order, random_text(model, images)
        excluded = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in excluded:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        torch.manual_seed(0)  # dropout
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = model.loss(*arguments[:2], model.condition(arguments[2]))
        loss.backward()
        self.loss, self.kept = loss.detach(), sum(kept.values())
        self.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ran(mode: str = "none", *, compiled: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> Ran:
    model = small_model(layers=4 if changes.get("layout") == "decoupled" else 3, grid=5, **changes).to(dtype).train()
    names = model.state_dict().keys()
    accelerate(model, ParallelConfig(activation_checkpointing=mode, compile=compiled))  # type: ignore[arg-type]
    assert model.state_dict().keys() == names
    return Ran(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["raster", "instructed", "dual", "decoupled", "grouped"])
def test_recomputing_changes_no_bit_of_the_loss_or_a_gradient(layout: str, dtype: torch.dtype, dropout: float, mode: str) -> None:
    plain, recomputed = (ran(each, layout=layout, dtype=dtype, dropout=dropout) for each in ("none", mode))
    assert torch.equal(plain.loss, recomputed.loss)
    assert plain.gradients.keys() == recomputed.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert torch.equal(gradient, recomputed.gradients[name]), name


@pytest.mark.parametrize(
    "changes", [{}, {"kv_heads": 1}, {"dropout": 0.1}, {"layout": "decoupled"}], ids=["plain", "grouped", "dropout", "decoupled"]
)
def test_the_more_is_recomputed_the_less_is_kept(changes: dict[str, Any]) -> None:
    none, selective, full = (ran(mode, **changes).kept for mode in ("none", *MODES))
    assert selective < 0.9 * none
    assert full < 0.3 * selective


@pytest.mark.slow  # runs a C++ compiler
@pytest.mark.parametrize("mode", ["none", *MODES])
def test_compiled_blocks_compute_the_same_to_rounding(mode: str) -> None:
    torch._dynamo.reset()
    plain, compiled = ran(mode), ran(mode, compiled=True)
    torch.testing.assert_close(compiled.loss, plain.loss, rtol=1e-5, atol=1e-5)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(compiled.gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", *MODES])
def test_compiled_dropout_is_the_same_under_a_seed(mode: str) -> None:
    torch._dynamo.reset()
    first, second = ran(mode, compiled=True, dropout=0.3), ran(mode, compiled=True, dropout=0.3)
    assert torch.equal(first.loss, second.loss)
    assert not torch.equal(first.loss, ran(mode, compiled=True, dropout=0.0).loss)


@pytest.mark.slow
def test_blocks_share_their_compilations() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_model(layers=6).train()
    accelerate(model, ParallelConfig(compile=True))
    Ran(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the last block lets fewer rows out


class Objective(nn.Module):
    def __init__(self, model: AnyOrderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes_bN: Tensor, order_bN: Tensor, labels_b: Tensor) -> Tensor:
        return self.model.loss(codes_bN, order_bN, self.model.condition(labels_b))[0]


def test_a_model_in_pieces_recomputes_too(tmp_path: Path) -> None:
    """ZeRO-3 takes each module's weights away after its forward pass and must bring them back for the second one."""
    run_workers(two_ranks, 2, str(tmp_path))
    for name in ("none", *MODES):
        losses = torch.load(tmp_path / name)
        assert losses[-1, 0] < losses[0, 0]
        torch.testing.assert_close(losses[:, 0], losses[:, 1], rtol=1e-5, atol=1e-5)


def two_ranks(folder: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    import deepspeed

    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    for mode in ("none", *MODES):
        losses = zero3_losses(mode)
        if torch.distributed.get_rank() == 0:
            torch.save(losses, Path(folder) / mode)
    torch.distributed.destroy_process_group()


def zero3_losses(mode: str) -> Tensor:
    """[steps, 2]: losses of a partitioned model that recomputes, and of a plain whole one, trained alike."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # DeepSpeed would clip at 1
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000},
    }
    spec = small_spec(condition=ClassSpec(classes=5))
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = AnyOrderModel(spec)
    whole = AnyOrderModel(spec)
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        with torch.no_grad(), deepspeed.zero.GatheredParameters(ours, modifier_rank=0):
            theirs.copy_(torch.randn(theirs.shape, generator=generator) * 0.3 if theirs.ndim > 1 else 1)
            ours.copy_(theirs)
    accelerate(model, ParallelConfig(activation_checkpointing=mode))  # type: ignore[arg-type]
    engine, *_ = deepspeed.initialize(model=Objective(model), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    optimizer, batch = torch.optim.SGD(whole.parameters(), lr=0.1), (random_codes(whole, 2), random_orders(whole, 2), torch.tensor([1, 4]))
    losses = []
    for _ in range(3):
        loss, expected = engine(*batch), Objective(whole)(*batch)
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        losses.append([float(loss.detach()), float(expected.detach())])
    engine.destroy()
    return torch.tensor(losses)
