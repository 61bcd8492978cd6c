"""What the formula says activations take is what the real model's run on fake tensors takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from oar_scale.model import AnyOrderModel, Decoder, cache, decoding, loss
from oar_scale.orders import scores
from oar_scale.planning import activations, extraction_plan, trace
from oar_scale.planning.trace import LiveTensors, trace_trunk
from oar_scale.shard_pool.ledger import _READERS
from tests.planning.cases import SPECS

IMAGES = 4


def test_the_constants_are_those_of_the_modules_that_use_them() -> None:
    assert activations.CHUNK_NUMBERS == loss.CHUNK_NUMBERS
    assert activations.ROWS_AT_ONCE == decoding.ROWS_AT_ONCE
    assert activations.SCORE_BLOCK == scores.BLOCK
    assert extraction_plan.READERS == _READERS


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(("name", "precision"), [(name, "fp32" if "features" in name or name == "emoji" else "bf16") for name in SPECS])
def test_the_formula_says_what_the_trace_finds(name: str, precision: Any, checkpointing: Any) -> None:
    traced = trace_trunk(SPECS[name], IMAGES, precision, checkpointing)
    formula = activations.trunk(SPECS[name], IMAGES, precision, checkpointing)
    assert formula.kept == pytest.approx(traced.kept, rel=0.04)
    assert formula.peak == pytest.approx(traced.peak, rel=0.12 if checkpointing == "full" else 0.06)
    assert formula.late == pytest.approx(traced.late, rel=0.06)


def test_shallow_models_tell_the_memory_of_a_deep_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["dual, grouped queries, text, no dropout"]
    from_shallow = trace_trunk(spec, IMAGES, "bf16", "none")
    monkeypatch.setattr(trace, "SHALLOW", (spec.layers, spec.layers))
    assert trace_trunk(spec, IMAGES, "bf16", "none") == from_shallow


def test_trunk_and_head_together_are_a_whole_loss() -> None:
    """The plan puts a traced trunk and the head by formula together: as much as one trace of the real loss."""
    spec = SPECS["instructed, class"].model_copy(update={"layers": 3})
    trunk, head = trace_trunk(spec, IMAGES, "fp32", "none"), activations.head(spec, IMAGES, "fp32", gpu=False)
    with FakeTensorMode():
        model, alive = AnyOrderModel(spec).train(), LiveTensors()
        for parameter in model.parameters():
            alive.ignore(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: alive.mark_gradient(p.grad))
        codes_BN, label_B1 = torch.zeros(IMAGES, spec.cells, dtype=torch.long), torch.zeros(IMAGES, 1, dtype=torch.long)
        model.rotations(codes_BN.device)
        with alive:
            mean, _ = model.loss(codes_BN, torch.zeros_like(codes_BN), model.condition(label_B1))
            forward = alive.peak
            mean.backward()
    assert trunk.kept + head.working == pytest.approx(forward, rel=0.03)
    assert max(trunk.kept + head.working, trunk.peak) == pytest.approx(alive.peak, rel=0.03)


def test_it_counts_as_torchs_own_tracker_does() -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    def step(model: torch.nn.Sequential, x: torch.Tensor) -> None:
        model(x).sum().backward()

    with FakeTensorMode():
        model, x = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)), torch.nn.GELU()), torch.zeros(512, 256)
        tracker = MemTracker()
        tracker.track_external(model, x)
        with tracker:
            step(model, x)
        theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        model.zero_grad()
        alive = LiveTensors()
        for tensor in (x, *model.parameters()):
            alive.count(tensor)
        with alive:
            step(model, x)
    assert alive.peak == pytest.approx(theirs, rel=0.01)  # theirs rounds each tensor up to 512 bytes


def test_heads_that_a_gpu_pads_cost_more() -> None:
    spec = SPECS["instructed, class"].model_copy(update={"dim": 3200, "heads": 32})  # LlamaGen-3B: heads of 100 channels
    one_block = spec.model_copy(update={"layers": 1})
    padded = activations.padding(one_block, 1, "bf16", "none")
    assert padded == spec.rows * (3 * 32 * 4 + 32 * 104) * 2
    assert not activations.padding(SPECS["instructed, class"], 1, "bf16", "none") and not activations.padding(spec, 1, "bf16", "full")


@pytest.mark.parametrize("name", ["instructed, class", "dual, grouped queries, text, no dropout", "decoupled, class", "grouped, class"])
def test_decoding_takes_what_a_trace_of_it_takes(name: str) -> None:
    spec, images = SPECS[name].model_copy(update={"layers": 4 if SPECS[name].decoupled else 3}), 2
    cache, working = activations.decoding(spec, images, "fp32", gpu=False)
    with FakeTensorMode():
        model, alive = AnyOrderModel(spec).eval(), LiveTensors()
        for parameter in model.parameters():
            alive.ignore(parameter)
        model.rotations(torch.device("cpu"))
        cells_BR = torch.zeros(images, spec.cells, dtype=torch.long)
        with alive:
            prefix = Decoder(model).begin(torch.zeros(images, spec.condition.rows, spec.dim))
            assert prefix.cache.nbytes == pytest.approx(cache, rel=0.01)
            Decoder(model).candidate_rows(prefix, cells_BR)
    assert cache + working == pytest.approx(alive.peak, rel=0.1)


@pytest.mark.parametrize("name", ["instructed, class", "decoupled, class"])
def test_a_gpu_has_a_cache_with_static_buffers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, images = SPECS[name], 2
    monkeypatch.setitem(cache.STATIC_ROWS, "cpu", 1)
    with FakeTensorMode():
        prefix = Decoder(AnyOrderModel(spec)).begin(torch.zeros(images, spec.condition.rows, spec.dim))
    assert prefix.cache.nbytes == pytest.approx(activations.decoding(spec, images, "fp32", gpu=True)[0], rel=0.03)
