"""What a training step takes of the data stream: the samples of one rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from oar_scale.data.hashing import device_permutations
from oar_scale.storage import FetchStats


@dataclass(frozen=True)
class ReplacedSample:
    """A sample that could not be used and was replaced by another one (event ``bad_sample``)."""

    uid: int
    fault: str
    """Shard, key and what is wrong."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step: b = B / W samples, on the CPU."""

    step: int
    uid_b: Tensor
    """int64: uids as the plan has them, also where a sample was replaced."""
    codes_bN: Tensor
    """int64 codes in raster order."""
    encoded_prompts_b: Tensor
    """Encoded prompts, a row for each sample: ids [b, T], labels [b, 1] or features [b, T, F]."""
    drop_b: Tensor
    """Samples whose prompt is dropped (bool)."""
    seed: int
    """Of the run: with epoch and uid it determines the random orders."""
    epoch_b: Tensor
    """int64: epoch of each sample, from 0."""
    fixed_b: Tensor
    """Samples that follow a given order (bool); the others get a random one."""
    fixed_bN: Tensor
    """int64: the given orders; the raster order where a sample has none."""
    bad: tuple[ReplacedSample, ...] = ()
    """Samples that were replaced."""
    fetched: FetchStats = field(default_factory=FetchStats)
    """Requests, bytes and retries since the last batch, those of shards fetched ahead included."""

    def orders(self, device: torch.device | str = "cpu") -> Tensor:
        """The order of each sample, int64 [b, N]: cell placed first to cell placed last.

        Random orders are computed on ``device``, and are the same on every device.
        """
        random_bN = device_permutations("order", self.codes_bN.shape[1], self.seed, self.epoch_b.to(device), self.uid_b.to(device))
        return torch.where(self.fixed_b.to(device)[:, None], self.fixed_bN.to(device), random_bN)
