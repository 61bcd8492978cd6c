"""Batches on their way to a GPU: no GPU is here, so the calls are noted that would copy to one; and what makes the host wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch
from golden_training import golden_batch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from oar_scale.data.hashing import device_permutations
from oar_scale.data.stream import Batch
from oar_scale.errors import UserError
from oar_scale.training.engine import StepResult
from oar_scale.training.optimizer import EmaAdamW
from oar_scale.training.prefetch import on_device

CUDA = torch.device("cuda", 0)


def batches(count: int = 5) -> list[Batch]:
    """One order for all, as of a policy: an expanded row."""
    return [replace(golden_batch("instructed", step), fixed_bN=torch.arange(16).flip(0).expand(6, -1)) for step in range(count)]


def tensors(batch: Batch) -> list[Tensor]:
    return [value for each in fields(batch) if isinstance(value := getattr(batch, each.name), Tensor)]


@dataclass
class Stream:
    """Notes what is recorded on it and what it waits for."""

    name: str
    waited_for: list[str] = field(default_factory=list)

    def record_event(self) -> str:
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.waited_for.append(event)


@dataclass
class FakeCuda:
    """torch's calls, as far as a copy uses them. A tensor is its own copy."""

    current: threading.local = field(default_factory=threading.local)
    main: Stream = field(default_factory=lambda: Stream("main"))
    pinned: dict[int, Tensor] = field(default_factory=dict)
    copied: dict[int, Tensor] = field(default_factory=dict)
    kept_for: list[tuple[int, str]] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current.stream = stream
        yield
        self.current.stream = self.main

    def pin(self, tensor: Tensor) -> Tensor:
        if not tensor.is_contiguous():
            self.faults.append("memory that several elements share cannot be pinned")
        pinned = tensor.clone()
        self.pinned[id(pinned)] = pinned
        return pinned

    def to(self, tensor: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        if id(tensor) not in self.pinned or not non_blocking:
            self.faults.append("the host waits for this copy")
        if getattr(self.current, "stream", self.main) is self.main:
            self.faults.append("the copy waits for the kernels before it")
        there = tensor.clone()
        self.copied[id(there)] = there
        return there

    def keep(self, tensor: Tensor, stream: Stream) -> None:
        self.kept_for.append((id(tensor), stream.name))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.main)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: fake.pin(tensor))
    monkeypatch.setattr(Tensor, "to", lambda tensor, device, **how: fake.to(tensor, device, **how))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: fake.keep(tensor, stream))
    return fake


def test_copies_are_pinned_asynchronous_and_change_nothing(cuda: FakeCuda) -> None:
    made = batches()
    for number, (batch, there) in enumerate(zip(made, on_device(iter(made), CUDA), strict=True), 1):
        assert (there.step, there.seed) == (batch.step, batch.seed)
        for before, after in zip(tensors(batch), tensors(there), strict=True):
            assert torch.equal(before, after) and before.dtype == after.dtype
            assert id(after) in cuda.copied and (id(after), "main") in cuda.kept_for
        assert cuda.main.waited_for == ["event of copies"] * number
    assert not cuda.faults


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_next_batch_is_made_while_one_is_in_use(device: str, cuda: FakeCuda) -> None:
    asked = [threading.Event() for _ in range(3)]

    def source() -> Iterator[Batch]:
        for batch, event in zip(batches(3), asked, strict=True):
            event.set()
            yield batch

    with closing(on_device(source(), torch.device(device))) as there:
        assert next(there).step == 0
        assert asked[1].wait(60) and not asked[2].wait(0.05)


def test_on_a_cpu_batches_stay_as_they_are() -> None:
    made = batches()
    assert all(there is batch for batch, there in zip(made, on_device(iter(made), torch.device("cpu")), strict=True))


def test_an_error_comes_after_the_batches_before_it() -> None:
    def source() -> Iterator[Batch]:
        yield from batches(2)
        raise UserError("too many bad samples")

    seen: list[int] = []
    with pytest.raises(UserError, match="too many bad samples"):
        seen.extend(batch.step for batch in on_device(source(), torch.device("cpu")))
    assert seen == [0, 1]


class HostReads(TorchFunctionMode):
    """Calls that bring numbers to the host, or take a number of the host to a device: each waits for all that the GPU has to do."""

    NAMES = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "tensor")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in self.NAMES:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", [torch.tensor(0.5), 0.5], ids=["ZeRO 1 and 2", "ZeRO 0 and 3"])
def test_the_numbers_of_a_step_are_read_at_once(norm: float | Tensor) -> None:
    losses, quarters = [torch.tensor(1.1), torch.tensor(1.3)], [torch.tensor([1.0, 1.1, 1.2, 1.3]), torch.tensor([2.0, 2.1, 2.2, 2.4])]
    with HostReads() as reads:
        result = StepResult.of(losses, quarters, norm)
    assert [name for name in reads.seen if name != "tensor"] == ["tolist"]  # the quarters that come back are a tensor on the CPU
    assert result.loss == float(torch.stack(losses).mean()) and result.grad_norm == 0.5
    assert torch.equal(result.quarters, torch.stack(quarters).mean(0))


def test_an_optimizer_step_under_zero_reads_nothing() -> None:
    """ZeRO has clipped by then, and knows whether the gradient is finite."""
    weight = torch.nn.Parameter(torch.ones(64))
    optimizer = EmaAdamW([{"params": [weight], "weight_decay": 0.1}], lr=0.1, betas=(0.9, 0.95), ema_decay=0.99)
    for step in range(3):
        weight.grad = torch.full_like(weight, step + 1.0)
        with HostReads() as reads:
            optimizer.step()
        assert reads.seen == []


def average_by_hand(values: list[Tensor], decay: float, move: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    average = values[0].clone()
    for done, value in enumerate(values[1:], 1):
        average = move(average, value, 1 - min(decay, (1 + done) / (10 + done)))
    return average


def test_the_average_is_that_of_its_formula_bit_for_bit() -> None:
    weight = torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    optimizer = EmaAdamW([{"params": [weight], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.95), ema_decay=0.7)
    values, noise = [weight.detach().clone()], torch.Generator().manual_seed(1)
    for _ in range(40):
        weight.grad = torch.randn(1000, generator=noise)
        optimizer.step()
        values.append(weight.detach().clone())
    assert torch.equal(optimizer.state[weight]["ema"], average_by_hand(values, 0.7, torch.lerp))


def test_random_orders_need_no_number_of_the_host() -> None:
    with HostReads() as reads:
        device_permutations("order", 16, 3, torch.zeros(4, dtype=torch.long), torch.arange(4))
    assert reads.seen == []
