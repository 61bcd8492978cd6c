"""How much of a training step torch.compile gets to see, under each ZeRO stage and kind of activation checkpointing.

What is compiled is counted by a backend that compiles nothing, so no C++ compiler runs. Recipes rest on these counts
(``ParallelConfig``): under ZeRO-3 the hooks that gather weights cut blocks into pieces, and with selective checkpointing nothing is left.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import run_workers
from torch.fx import GraphModule

from oar_scale.config.deepspeed import deepspeed_config
from oar_scale.config.schema import ParallelConfig, TrainingConfig
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.acceleration import accelerate
from oar_scale.model.spec import ClassSpec
from oar_scale.tokenizers.prompts import LabelEncoder
from oar_scale.training.engine import Objective
from oar_scale.training.optimizer import parameter_groups

SPEC = ModelSpec(dim=32, layers=3, heads=4, ffn_hidden=64, vocab_size=64, grid=4, condition=ClassSpec(classes=4), dropout=0.1)
ONE_LAYER = SPEC.model_copy(update={"layers": 1})
"""For ZeRO-3, whose pieces take long to trace."""
IMAGES, STEPS = 2, 2
CASES = ((1, "none"), (1, "selective"), (2, "none"), (3, "none"), (3, "selective"))
EVALUATED = {"1 none": (4 * IMAGES, IMAGES + 1, 1), "1 selective": (IMAGES + 1,)}
"""Held-out images as a worker takes them: whole batches, what is left of them, a rank's only one. ZeRO-2 differs from ZeRO-1 in what
becomes of gradients, of which an evaluation has none; selective checkpointing in a block, whatever its images."""
RECOMPILATIONS = 8
"""Dynamo's ``recompile_limit``: with more graphs of a function it would run the rest eagerly."""


def count(out: str) -> None:
    """The graphs of each case, and where Dynamo gave up."""
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    found = {f"{stage} {mode}": graphs(SPEC if stage < 3 else ONE_LAYER, stage, mode) for stage, mode in CASES}
    Path(out).write_text(json.dumps(found))


def graphs(spec: ModelSpec, stage: int, mode: str) -> dict[str, Any]:
    """The number of graphs after each step of two micro-batches; of some also after each of two evaluations with a step."""
    seen: list[GraphModule] = []

    def note(graph: GraphModule, example_inputs: object) -> Any:
        seen.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile
    torch.compile = lambda function: compiled(function, backend=note)  # type: ignore[assignment]
    try:
        engine = engine_of(spec, stage, mode)
    finally:
        torch.compile = compiled
    after = []
    for _ in range(STEPS if stage < 3 else 1):  # ZeRO-3's pieces take long to trace, and the first step has them all
        step(engine)
        after.append(len(seen))
    found = {"steps": after, "evaluations": list[int](), "nodes": [len(graph.graph.nodes) for graph in seen]}
    for _ in range(2 if f"{stage} {mode}" in EVALUATED else 0):
        evaluate(engine, EVALUATED[f"{stage} {mode}"])
        step(engine)
        found["evaluations"].append(len(seen))
    engine.destroy()
    return found


def engine_of(spec: ModelSpec, stage: int, mode: str) -> Any:
    """DeepSpeed's engine as a worker makes it."""
    import deepspeed

    from oar_scale.distributed.deepspeed_optimizer import DeepSpeedAdamW

    parallel = ParallelConfig.model_validate({"workers": 1, "zero_stage": stage, "micro_batch": IMAGES, "compile": True})
    config = deepspeed_config(parallel, TrainingConfig(global_batch=2 * IMAGES), 1)
    with deepspeed.zero.Init(config_dict_or_path=config) if stage == 3 else nullcontext():
        model = AnyOrderModel(spec)
    accelerate(model, parallel.model_copy(update={"activation_checkpointing": mode}))
    objective = Objective(model, LabelEncoder(4))
    optimizer = DeepSpeedAdamW(parameter_groups(objective, 0.0), lr=1e-3, betas=(0.9, 0.95), ema_decay=None)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    optimizer.armed = True
    return engine


def batch(images: int) -> tuple[torch.Tensor, ...]:
    codes = torch.randint(SPEC.vocab_size, (images, SPEC.cells))
    order = torch.stack([torch.randperm(SPEC.cells) for _ in range(images)])
    return codes, order, torch.zeros(images, 1, dtype=torch.long), torch.zeros(images, dtype=torch.bool)


def step(engine: Any) -> None:
    engine.train()
    for _ in range(2):
        loss, _ = engine(*batch(IMAGES))
        engine.backward(loss)
        engine.step()


@torch.no_grad()
def evaluate(engine: Any, batches: tuple[int, ...]) -> None:
    model: AnyOrderModel = engine.module.model.eval()
    for images in batches:
        codes, order, labels, _ = batch(images)
        model.nll(codes, order, model.condition(labels))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("graphs") / "found.json"
    run_workers(count, 1, str(out))
    counted: dict[str, Any] = json.loads(out.read_text())
    return counted


@pytest.mark.parametrize("case", ["1 none", "1 selective", "2 none"])
def test_below_zero_3_a_step_is_two_graphs_whatever_follows(found: dict[str, Any], case: str) -> None:
    """All blocks but the last share one. Evaluations add theirs once, and leave room below Dynamo's limit."""
    assert found[case]["steps"] == [2] * STEPS
    if case in EVALUATED:
        first, second = found[case]["evaluations"]
        assert first == second <= RECOMPILATIONS
    assert torch._dynamo.config.recompile_limit == RECOMPILATIONS


def test_zero_3_cuts_blocks_to_pieces(found: dict[str, Any]) -> None:
    pieces = found["3 none"]
    assert pieces["steps"][-1] > 2 * found["1 none"]["steps"][-1]
    assert max(pieces["nodes"]) < max(found["1 none"]["nodes"])


def test_zero_3_with_selective_checkpointing_compiles_nothing(found: dict[str, Any]) -> None:
    assert found["3 selective"]["steps"] == [0]
