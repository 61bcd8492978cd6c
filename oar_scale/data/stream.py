"""Token shards as training batches.

The plan says which samples a step takes; this module opens their shards (verified, cached locally, a bounded number of
them decoded at a time) and adds every random choice about a sample as a hash of (seed, epoch, uid): its view, its order,
whether its prompt is dropped. So a batch is a function of (recipe, step) alone, and resuming is starting at a step.

    for batch in TokenStream(...).batches(start_step=80): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.data.hashing import device_permutations, integers, uniform
from oar_scale.data.manifest import Manifest
from oar_scale.data.plan import SamplePlan, Slots
from oar_scale.data.shards import TokenShard, read_token_shard
from oar_scale.errors import UserError
from oar_scale.storage import join
from oar_scale.tokenizers.prompts import PromptEncoder

StoredOrders = Callable[[str, TokenShard], NDArray[np.uint16]]
"""Stored orders [S, N] of a shard of the given name."""


@dataclass(frozen=True)
class Batch:
    """A rank's share of one step, b samples."""

    step: int
    uid_b: Tensor
    codes_bN: Tensor
    prompts_b: Tensor
    """Encoded prompts, a row for each sample: ids [b, T], labels [b, 1] or features [b, T, F]."""
    drop_b: Tensor
    """Samples whose prompt is dropped (bool)."""
    seed: int
    epoch_b: Tensor
    fixed_b: Tensor
    """Samples in a given order (bool); the others get a random one."""
    fixed_bN: Tensor
    """The given orders; any numbers where there is none."""

    def orders(self, device: torch.device | str = "cpu") -> Tensor:
        """The order of each sample [b, N]. Random ones are made on ``device``, and are the same on all."""
        random_bN = device_permutations("order", self.codes_bN.shape[1], self.seed, self.epoch_b.to(device), self.uid_b.to(device))
        return torch.where(self.fixed_b.to(device)[:, None], self.fixed_bN.to(device), random_bN)


@dataclass(frozen=True)
class StreamSettings:
    """What fixes the batches, besides the shards."""

    seed: int
    global_batch: int
    streams: int
    window_shards: int
    caption_dropout: float
    raster: bool = False
    """All samples in raster order, for a model that knows no other."""
    random_share: float = 1.0
    """Share of samples that take any view, in a random order. The rest take view 0 in its stored order; without stored
    orders (the control) still view 0, in a random order, so that the orders are all that differs."""


class TokenStream:
    """The batches of one rank."""

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        prompts: PromptEncoder,
        settings: StreamSettings,
        cache_dir: str,
        rank: int = 0,
        world: int = 1,
        stored_orders: StoredOrders | None = None,
    ) -> None:
        if manifest.grid is None:
            raise UserError(f"{folder}: these are not token shards (the manifest has no grid). Run the stage tokens first.")
        self.folder, self.manifest, self.prompts, self.settings = folder, manifest, prompts, settings
        self.cache_dir, self.rank, self.world, self.stored_orders = cache_dir, rank, world, stored_orders
        self.cells = manifest.grid**2
        if manifest.samples < settings.streams:
            raise UserError(
                f"{folder}: {manifest.samples} samples are fewer than data.canonical_streams = {settings.streams}. Lower it, or add images."
            )
        self.plan = SamplePlan(tuple(s.samples for s in manifest.shards), settings.seed, settings.streams, settings.window_shards)
        # A rank reads streams/world segments at once, each inside one window; two shards more for the edges.
        decoded = settings.streams // world * min(settings.window_shards, len(manifest.shards)) + 2
        self._shard = lru_cache(maxsize=min(decoded, len(manifest.shards)))(self._decode)

    def batches(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of steps ``start_step`` to ``end_step - 1``; the next one is made while the last is in use."""
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.batch, start_step) if start_step < end_step else None
            for step in range(start_step, end_step):
                assert coming is not None
                batch = coming.result()
                coming = ahead.submit(self.batch, step + 1) if step + 1 < end_step else None
                yield batch

    def batch(self, step: int) -> Batch:
        """This rank's samples of a step: a function of the settings and ``step`` alone."""
        settings = self.settings
        slots = self.plan.step(step, settings.global_batch, self.rank, self.world)
        any_view_b = uniform("order kind", settings.seed, slots.epoch, slots.uid) < settings.random_share
        view_b = integers("view", len(self.manifest.views), settings.seed, slots.epoch, slots.uid)
        view_b[~any_view_b] = 0  # stored orders belong to the first view
        codes, prompts, fixed_b, fixed_bN = self._gather(slots, view_b, ~any_view_b)
        return Batch(
            step=step,
            uid_b=torch.from_numpy(slots.uid),
            codes_bN=torch.from_numpy(codes.astype(np.int64)),
            prompts_b=self.prompts.encode(prompts),
            drop_b=torch.from_numpy(uniform("caption", settings.seed, slots.epoch, slots.uid) < settings.caption_dropout),
            seed=settings.seed,
            epoch_b=torch.from_numpy(slots.epoch),
            fixed_b=torch.from_numpy(fixed_b),
            fixed_bN=torch.from_numpy(fixed_bN),
        )

    def _gather(
        self, slots: Slots, view_b: NDArray[np.int64], stored_b: NDArray[np.bool_]
    ) -> tuple[NDArray[np.uint16], list[Any], NDArray[np.bool_], NDArray[np.int64]]:
        codes = np.empty((len(slots.uid), self.cells), dtype=np.uint16)
        fixed_b = np.full(len(slots.uid), self.settings.raster)
        fixed_bN = np.tile(np.arange(self.cells), (len(slots.uid), 1))
        prompts = []
        for row, uid in enumerate(slots.uid):
            index, at = self.plan.shard_of(int(uid))
            shard, orders_SN = self._shard(index)
            codes[row] = shard.codes_SVN[at, view_b[row]]
            prompts.append(shard.prompts[at])
            if stored_b[row] and orders_SN is not None:
                fixed_b[row], fixed_bN[row] = True, orders_SN[at]
        return codes, prompts, fixed_b, fixed_bN

    def _decode(self, index: int) -> tuple[TokenShard, NDArray[np.uint16] | None]:
        info = self.manifest.shards[index]
        shard = read_token_shard(join(self.folder, info.name), self.cache_dir, info, self.prompts.field)
        if shard.codes_SVN.shape[1:] != (len(self.manifest.views), self.cells):
            raise UserError(
                f"{join(self.folder, info.name)}: codes are {shard.codes_SVN.shape[1:]} (views, cells), "
                f"the manifest says {(len(self.manifest.views), self.cells)}. Run the stage tokens again."
            )
        return shard, self.stored_orders(info.name, shard) if self.stored_orders else None
