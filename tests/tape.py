"""A recorder of steps where there is no GPU: what a CUDA graph would do, one operation after the other.

Operations are recorded with the tensors themselves, and replayed on the same memory with the same numbers of the host: a step that depends
on anything else than the memory gives other results when it is replayed. Recording computes nothing that stays, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FRESH = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


class Tape(TorchDispatchMode):
    """Operations in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.own = set[int]()
        """Memory that was taken while recording."""
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """Other memory that was written to, and what was there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITS:
            raise RuntimeError(f"{func.name()} waits for the device: it cannot be recorded")
        if func._schema.is_mutable:
            for each in _tensors((*args, *kwargs.values())):
                self._save(each)
        out = func(*args, **kwargs)
        outs = [] if func.is_view or func._schema.is_mutable else list(_tensors((out,)))
        if not func.is_view:
            self.own.update(_memory(each) for each in outs)
            if func not in FRESH:
                self.operations.append((func, args, kwargs, outs))
        return out

    def _save(self, tensor: Tensor) -> None:
        memory = _memory(tensor)
        if memory not in self.own and memory not in self.before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(_numbers(tensor).untyped_storage())  # type: ignore[call-overload]
            self.before[memory] = whole, whole.clone()

    def undo(self) -> None:
        """Put back what was there before."""
        for whole, saved in self.before.values():
            whole.copy_(saved)

    def replay(self) -> None:
        """Do all operations again."""
        for func, args, kwargs, outs in self.operations:
            for old, new in zip(outs, _tensors((func(*args, **kwargs),)) if outs else _done(func, args, kwargs), strict=True):
                old.copy_(new)


class Tapes:
    """As ``steps.CudaGraphs``."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        own = tuple(each.clone() for each in inputs)
        with Tape() as tape:
            outputs = function(*own)
        tape.undo()

        def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
            self.replays += 1
            for mine, given in zip(own, inputs, strict=True):
                mine.copy_(given)
            tape.replay()
            return outputs

        return replay


def _done(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    func(*args, **kwargs)
    return ()


def _numbers(tensor: Tensor) -> Tensor:
    """What a tensor of a card that is none (``fake_card.py``) holds."""
    numbers: Tensor = getattr(tensor, "numbers", tensor)
    return numbers


def _memory(tensor: Tensor) -> int:
    return _numbers(tensor).untyped_storage().data_ptr()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
