"""Big models never exist whole on one machine: built on the meta device, or partitioned by DeepSpeed's ZeRO-3 as they are built.

What a constructor forgets to fill shows: memory from ``torch.empty`` holds NaN here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from launcher import run_workers
from small_models import random_codes, random_orders, small_spec
from torch import Tensor, nn

from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.spec import ClassSpec, FeatureSpec, TextSpec

WIDTH, IMAGES, STEPS, LR = 24, 4, 2, 0.1
CONDITIONS = {"class": ClassSpec(classes=5), "text": TextSpec(vocab=11, rows=4), "features": FeatureSpec(width=WIDTH, rows=3)}
SPECS = {
    f"{layout}-{name}": small_spec(layout=layout, condition=condition, trainable_null=(layout, name) != ("raster", "features"))
    for layout in ("raster", "instructed", "dual", "decoupled", "grouped")
    for name, condition in CONDITIONS.items()
}


DAILY = [name for name in SPECS if name.startswith("instructed") or name.endswith("text") or name == "raster-features"]
"""Every layout and every condition, of which neither knows of the other, and a null condition that is not trained."""
partitioned = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DAILY else [pytest.mark.slow]) for name in SPECS], ids=SPECS.keys()
)


class Careless(nn.Module):
    """What the tests must notice."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten = nn.Parameter(torch.empty(8))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory from ``torch.empty`` holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1])


def assert_starts_as_documented(spec: ModelSpec, name: str, values: Tensor) -> None:
    """Norms at one, head and biases at zero, all else Normal(0, 0.02), the null in feature space of about unit length.

    Matrices of blocks of the family vit are Xavier-uniform.
    """
    rounding, values = torch.finfo(values.dtype).eps, values.float()
    assert values.isfinite().all(), name
    if name.endswith("norm.weight"):
        assert (values == 1).all(), name
    elif name == "output.weight" or name.endswith(".bias"):
        assert (values == 0).all(), name
    else:
        expected = WIDTH**-0.5 if name.endswith("uncond_embedding") else 0.02
        if spec.block == "vit" and "layers." in name:
            expected = math.sqrt(2 / sum(values.shape))
            assert values.abs().max() <= math.sqrt(3) * expected * (1 + rounding)
        numbers = values.numel()
        assert abs(values.mean()) < 5 * expected / math.sqrt(numbers), name  # five standard errors
        assert float(values.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * numbers)), name


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_model_from_the_meta_device_starts_as_documented(spec: ModelSpec) -> None:
    torch.manual_seed(0)
    with poisoned_memory():
        with torch.device("meta"):
            model, careless = AnyOrderModel(spec), Careless()
        model.to_empty(device="cpu")
        assert careless.to_empty(device="cpu").forgotten.isnan().all()
        assert all(parameter.isnan().all() for parameter in model.parameters())
        model.reset_parameters()
    for name, parameter in model.named_parameters():
        assert_starts_as_documented(spec, name, parameter.detach())


class Objective(nn.Module):
    def __init__(self, model: AnyOrderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes_bN: Tensor, order_bN: Tensor, inputs_b: Tensor, drop_b: Tensor) -> Tensor:
        return self.model.loss(codes_bN, order_bN, self.model.condition(inputs_b, drop_b))[0]


class RankResults(NamedTuple):
    """The results of the ranks for one spec."""

    initial: dict[str, list[dict[str, Tensor]]]
    """For each precision and rank: the parameters, gathered."""
    sizes: dict[str, list[int]]
    """Numbers of each parameter, and how many of them each rank held."""
    losses: Tensor
    """[steps, ranks, 2]: partitioned, whole."""
    nll: Tensor
    """[2, B, N] after the last step: partitioned, whole."""
    trained: list[dict[str, Tensor]]
    """The parameters after the last step: partitioned, whole."""
    careless: Tensor


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RankResults]:
    """The results for a spec: all daily ones are made at once, and all others."""

    @cache
    def results(daily: bool) -> dict[str, RankResults]:
        folder, names = tmp_path_factory.mktemp("zero"), [name for name in SPECS if (name in DAILY) == daily]
        run_workers(two_ranks, 2, str(folder), names)
        return {name: RankResults(**torch.load(folder / name)) for name in names}

    return lambda name: results(name in DAILY)[name]


@partitioned
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_partitioned_model_starts_the_same_on_both_ranks(results_of: Callable[[str], RankResults], name: str, precision: str) -> None:
    """A model built in slices starts as documented and the same on both ranks."""
    results = results_of(name)
    assert results.careless.isnan().all()
    first, second = results.initial[precision]
    assert first.keys() == AnyOrderModel(SPECS[name]).state_dict().keys()
    for parameter, values in first.items():
        assert values.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert_starts_as_documented(SPECS[name], parameter, values)
        assert torch.equal(values, second[parameter]), parameter


@partitioned
def test_each_rank_holds_half_of_every_parameter(results_of: Callable[[str], RankResults], name: str) -> None:
    for parameter, (whole, *held) in results_of(name).sizes.items():
        assert held == [-(-whole // 2)] * 2, parameter


@partitioned
def test_a_partitioned_model_learns_what_a_whole_one_learns(results_of: Callable[[str], RankResults], name: str) -> None:
    # The same float32 sums in another order: gradients are averaged over ranks, not over images.
    result = results_of(name)
    assert (result.losses[0].mean(0) > result.losses[-1].mean(0)).all()  # the mean over ranks is what a step makes smaller
    torch.testing.assert_close(result.losses[..., 0], result.losses[..., 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.nll[0], result.nll[1], rtol=1e-4, atol=1e-4)
    partitioned, whole = result.trained
    for parameter, values in partitioned.items():
        torch.testing.assert_close(values, whole[parameter], rtol=1e-4, atol=1e-5, msg=lambda text, at=parameter: f"{at}: {text}")


def two_ranks(folder: str, names: list[str]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    import deepspeed

    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    rank = torch.distributed.get_rank()
    with poisoned_memory():
        for name in names:
            torch.manual_seed(rank)  # the ranks would draw different weights
            values = {**build(SPECS[name]), **train(SPECS[name], rank)}
            if rank == 0:
                torch.save(values, Path(folder) / name)
    torch.distributed.destroy_process_group()


def settings(precision: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": IMAGES // 2,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # or parameters as small as these would stay whole
            "reduce_bucket_size": 10_000,
            "stage3_prefetch_bucket_size": 10_000,
        },
    }


def build(spec: ModelSpec) -> dict[str, Any]:
    import deepspeed

    initial = {}
    for precision in ("fp32", "bf16"):
        with deepspeed.zero.Init(config_dict_or_path=settings(precision)):
            model, careless = AnyOrderModel(spec), Careless()
        initial[precision] = over_ranks(gathered(model))
    held = over_ranks({name: p.ds_tensor.numel() for name, p in model.named_parameters()})
    sizes = {name: [p.ds_numel, *(rank[name] for rank in held)] for name, p in model.named_parameters()}
    return {"initial": initial, "sizes": sizes, "careless": gathered(careless)["forgotten"]}


def train(spec: ModelSpec, rank: int) -> dict[str, Any]:
    """A few steps of the partitioned model, each rank half of the images, and of a whole one on all of them.

    Plain gradient descent: the parameters then differ by as much as the gradients do.
    """
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=settings("fp32")):
        model = AnyOrderModel(spec)
    whole = AnyOrderModel(spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        for ours, (name, theirs) in zip(model.parameters(), whole.named_parameters(), strict=True):
            if theirs.ndim > 1:
                theirs.copy_(torch.randn(theirs.shape, generator=generator) * 0.3)
            else:
                theirs.fill_(0 if name.endswith(".bias") else 1)
            ours.copy_(theirs)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=Objective(model), optimizer=torch.optim.SGD(trained, lr=LR), config=settings("fp32"))
    objective, optimizer = Objective(whole), torch.optim.SGD(whole.parameters(), lr=LR)

    codes_BN, order_BN = random_codes(whole, IMAGES), random_orders(whole, IMAGES)
    if spec.layout == "raster":
        order_BN = torch.arange(spec.cells).expand_as(order_BN)
    inputs = condition_inputs(spec)
    batch = (codes_BN, order_BN, inputs, torch.tensor([False, True, False, False]))
    losses = []
    for _ in range(STEPS):
        halves = [[t[half] for t in batch] for half in (slice(0, IMAGES // 2), slice(IMAGES // 2, IMAGES))]
        loss = engine(*halves[rank])
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad()
        expected = [objective(*part) for part in halves]
        (torch.stack(expected).mean()).backward()
        optimizer.step()
        losses.append(list(zip(over_ranks(float(loss)), map(float, expected), strict=True)))
    nll = torch.stack([m.eval().nll(codes_BN, order_BN, m.condition(inputs)) for m in (model, whole)])
    after = [gathered(model), {name: p.detach() for name, p in whole.named_parameters()}]
    engine.destroy()
    return {"losses": torch.tensor(losses), "nll": nll, "trained": after}


def condition_inputs(spec: ModelSpec) -> Tensor:
    kind = spec.condition
    if isinstance(kind, ClassSpec):
        return torch.tensor([0, 3, 2, 4])
    if isinstance(kind, TextSpec):
        return torch.tensor([[5, 2, 3, 0], [4, 1, 1, 7], [0, 0, 0, 0], [1, 2, 3, 4]])
    return torch.randn(IMAGES, kind.rows, kind.width, generator=torch.Generator().manual_seed(0))


def gathered(model: nn.Module) -> dict[str, Tensor]:
    import deepspeed

    assert all(parameter.numel() == 0 for parameter in model.parameters())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def over_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None, None]
    torch.distributed.all_gather_object(values, value)
    return values
