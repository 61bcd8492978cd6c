"""Activation memory, traced by running the real model on fake tensors: shapes and lifetimes without memory or arithmetic.

The results of every operation are counted for as long as anything references them. Kernels are a CPU's, in the precision requested
for; what they keep for the backward pass is what the fused kernels of a GPU keep (``model/memory_efficient.py``), except for heads
that a GPU pads (``activations.py``). Memory grows by the same amount with every block but the first and the last, so two
shallow models determine it for any depth.
"""

from __future__ import annotations

import weakref
from typing import Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oar_scale.config.schema import ParallelConfig
from oar_scale.model.acceleration import accelerate
from oar_scale.model.layouts import RasterRows
from oar_scale.model.spec import FeatureSpec, ModelSpec
from oar_scale.model.transformer import AnyOrderModel
from oar_scale.planning.activations import Checkpointing, TrunkActivations

SHALLOW = (3, 4)
"""Layers of the models that are run: a first block, a last one, and one or two between; of a decoupled model, layers of each half."""


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operations have created and that are still referenced; works on fake and on real tensors.

    Attributes:
        bytes: current bytes, without gradients of parameters.
        gradients: current bytes of gradients of parameters.
        peak: maximum of ``bytes`` so far.
        most: maximum of the sum of both.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.gradients = self.peak = self.most = 0
        self._sizes: dict[int, int] = {}
        self._gradients: set[int] = set()

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self._update_peaks()
            weakref.finalize(storage, self._freed, key)

    def ignore(self, tensor: Tensor) -> None:
        """Do not count this tensor or its views."""
        self._sizes[tensor.untyped_storage()._cdata] = 0

    def mark_gradient(self, tensor: Tensor) -> None:
        """Count this tensor with the gradients of parameters from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._sizes and key not in self._gradients:
            self._gradients.add(key)
            self.bytes -= self._sizes[key]
            self.gradients += self._sizes[key]

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return made

    def _update_peaks(self) -> None:
        self.peak = max(self.peak, self.bytes)
        self.most = max(self.most, self.bytes + self.gradients)

    def _freed(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._gradients:
            self._gradients.discard(key)
            self.gradients -= size
        else:
            self.bytes -= size


def trace_trunk(spec: ModelSpec, micro_batch: int, precision: Literal["bf16", "fp32"], checkpointing: Checkpointing) -> TrunkActivations:
    """The memory of forward and backward pass through condition and trunk, at full depth; as :func:`activations.trunk`, traced."""
    depths = (2 * SHALLOW[0], 2 * SHALLOW[1]) if spec.decoupled else SHALLOW  # each half
    if spec.layers <= depths[1]:
        return _trace(spec, micro_batch, precision, checkpointing)
    few, more = (_trace(spec.model_copy(update={"layers": n}), micro_batch, precision, checkpointing) for n in depths)
    more_layers, step = spec.layers - depths[0], depths[1] - depths[0]
    return TrunkActivations(*(a + (b - a) * more_layers // step for a, b in zip(few, more, strict=True)))


def _trace(spec: ModelSpec, micro_batch: int, precision: str, checkpointing: Checkpointing) -> TrunkActivations:
    with FakeTensorMode():
        model = _model(spec, precision)
        accelerate(model, ParallelConfig(activation_checkpointing=checkpointing))
        live = LiveTensors()

        def first_block_begins(_gradient: Tensor) -> None:
            live.most = 0

        def watch(_block: nn.Module, _inputs: object, output: Tensor) -> None:
            output.register_hook(first_block_begins)

        model.layers[0].register_forward_hook(watch)
        for parameter in model.parameters():
            live.ignore(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: live.mark_gradient(p.grad))
        codes_BN = torch.zeros(micro_batch, spec.cells, dtype=torch.long)
        inputs, drop_B = _inputs(spec, micro_batch), torch.zeros(micro_batch, dtype=torch.bool)
        model.layout.rotated(codes_BN)  # a table that stays, whatever is trained
        with live:
            condition_BTD = model.condition(inputs, drop_B)
            rows_BND = model.rows(codes_BN, torch.zeros_like(codes_BN), condition_BTD)
            kept = live.bytes
            rows_BND.backward(torch.empty_like(rows_BND))
        return TrunkActivations(kept, live.peak, live.most)


def _model(spec: ModelSpec, precision: str) -> AnyOrderModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)  # a fake model cannot be cast
    try:
        model = AnyOrderModel(spec).train()
    finally:
        torch.set_default_dtype(before)
    if isinstance(model.layout, RasterRows):
        model.layout._require_raster = lambda *_: None  # type: ignore[method-assign]  # it looks at values, and there are none
    return model


def _inputs(spec: ModelSpec, micro_batch: int) -> Tensor:
    kind = spec.condition
    if isinstance(kind, FeatureSpec):
        return torch.zeros(micro_batch, kind.rows, kind.width)
    return torch.zeros(micro_batch, kind.rows, dtype=torch.long)
