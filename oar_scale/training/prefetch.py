"""The next step's batch travels to the GPU while the last one is in use.

    loader (batches on the CPU) --a thread: pin, copy on a stream of its own--> one batch ahead --> the training loop

A copy out of ordinary memory makes the host wait for it; one out of pinned memory runs beside the kernels of the step before. On a CPU the
same thread hands the batches on as they are. Neither changes a batch, or their order.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from oar_scale.data.stream import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """The same batches with their tensors on ``device``, made and copied one ahead. What ``batches`` raises comes in its place.

    Closing it waits for the batch that is being made; ``batches`` itself is the caller's to close.
    """
    copies = _Copies(device)

    def following() -> Batch | None:
        batch = next(batches, None)
        return None if batch is None else copies.start(batch)

    with ThreadPoolExecutor(1, thread_name_prefix="batches to the device") as ahead:
        coming = ahead.submit(following)
        while (batch := coming.result()) is not None:
            copies.wait(batch)
            coming = ahead.submit(following)
            yield batch


class _Copies:
    """Copies to a GPU on a stream of their own, one at a time; to a CPU none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, batch: Batch) -> Batch:
        """Begin to copy: the tensors that come back may only be used after :meth:`wait`."""
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            there: dict[str, Any] = {name: self._copy(tensor) for name, tensor in _tensors(batch).items()}
        self._copied = self._stream.record_event()
        return replace(batch, **there)

    def _copy(self, tensor: Tensor) -> Tensor:
        """Made contiguous first: the one order of all samples is an expanded row, whose memory cannot be pinned as it is."""
        return tensor.contiguous().pin_memory().to(self._device, non_blocking=True)

    def wait(self, batch: Batch) -> None:
        """Let the kernels that are called from now on run after the copy; the host does not wait."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._copied)
        for tensor in _tensors(batch).values():
            tensor.record_stream(current)  # its memory is the copies' stream's, which must not have it back before these kernels are done


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {each.name: value for each in fields(batch) if isinstance(value := getattr(batch, each.name), Tensor)}
