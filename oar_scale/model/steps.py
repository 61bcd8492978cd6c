"""One step after the other: as a program, or on static buffers as a recording that is replayed.

    kind        the step's function, shapes of its tensors, and its other arguments
    first       runs                                 and warms up what a recording must find there: tables, libraries
    second      is recorded as a CUDA graph, and replayed
    others      are replayed                         the host starts one graph, where a program starts hundreds of kernels

A step is a function of a prefix and of tensors; of the host's numbers only those are arguments that are the same in many steps
(``Prefix.varying`` makes a tensor of the others). Nothing is wrong if one is forgotten: each step is of a kind of its own then, and runs.
Without a GPU nothing is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from oar_scale.model.decoding import Prefix
from oar_scale.model.row_layout import Placed

log = logging.getLogger(__name__)
Outputs = tuple[Tensor, ...]
Step = Callable[..., tuple[Prefix, Outputs]]
Replay = Callable[..., Outputs]
Number = int | float | None


class Recorder(Protocol):
    """Records functions of tensors, which write to memory that stays where it is."""

    def record(self, function: Replay, inputs: Outputs) -> Replay:
        """A replay of the function for other inputs of the same shapes; its outputs hold until the next replay of anything. Recording
        itself computes nothing."""
        ...


class CudaGraphs:
    """CUDA graphs in one pool of memory: they are never replayed at once."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Replay, inputs: Outputs) -> Replay:
        """As of :class:`Recorder`."""
        own, graph = tuple(each.clone() for each in inputs), torch.cuda.CUDAGraph()
        # Other threads, which fetch the next batch, may go on meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = function(*own)

        def replay(*inputs: Tensor) -> Outputs:
            for mine, given in zip(own, inputs, strict=True):
                mine.copy_(given)
            graph.replay()
            return outputs

        return replay


RECORDERS: dict[str, Callable[[], Recorder]] = {"cuda": CudaGraphs}
"""By type of device."""


class Steps:
    """The steps of one course of images, which share a prefix's memory."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.replays: dict[object, Replay | None] = {}
        """By kind; None after the first step of a kind."""

    def __call__(self, step: Step, prefix: Prefix, *arguments: Tensor | Number) -> tuple[Prefix, Outputs]:
        """``step(prefix, *arguments)``, which returns the prefix after the step and any tensors."""
        if not prefix.static or prefix.cache.device.type not in RECORDERS:
            return step(prefix, *arguments)
        tensors = (*prefix.last, *(each for each in arguments if isinstance(each, Tensor)))
        others = tuple(None if isinstance(each, Tensor) else each for each in arguments)
        kind = (step, id(prefix.cache), id(prefix.rows), others, tuple(each.shape for each in tensors))
        if kind not in self.replays:
            self.replays[kind] = None
            return step(prefix, *arguments)
        replay = self.replays[kind] or self._record(step, prefix, arguments, tensors)
        self.replays[kind] = replay
        cells_BK, codes_BKD, *outputs = replay(*tensors)
        # What is replayed next may overwrite the outputs. What was placed last is an input of the next step, copied before.
        return replace(prefix, last=Placed(cells_BK, codes_BKD)), tuple(each.clone() for each in outputs)

    def _record(self, step: Step, prefix: Prefix, arguments: tuple[Tensor | Number, ...], tensors: Outputs) -> Replay:
        # None of the tensors of this one step is kept: a compiler would ask in each step whether it is that one.
        others = tuple((isinstance(each, Tensor), None if isinstance(each, Tensor) else each) for each in arguments)

        def function(*tensors: Tensor) -> Outputs:
            rest = iter(tensors[2:])
            given = [next(rest) if is_tensor else other for is_tensor, other in others]
            after, outputs = step(replace(prefix, last=Placed(*tensors[:2])), *given)
            return (*after.last, *outputs)

        try:
            if self.recorder is None:
                self.recorder = RECORDERS[prefix.cache.device.type]()
            return self.recorder.record(function, tensors)
        except RuntimeError as error:
            log.warning("a step of decoding could not be recorded as a CUDA graph, and runs as it is: %s", error)
            return function
