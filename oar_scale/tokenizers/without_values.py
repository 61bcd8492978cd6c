"""Modules without values: names, shapes and dtypes, to be filled from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _NoInitialization(TorchFunctionMode):
    """Functions that fill a tensor return it as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


@contextmanager
def without_values() -> Iterator[None]:
    """Modules that are made meanwhile are on the device ``meta``, and nothing is drawn for them: for tensors on ``meta`` torch draws by
    functions whose import takes seconds (``torch._dynamo``, sympy)."""
    with torch.device("meta"), _NoInitialization():
        yield
