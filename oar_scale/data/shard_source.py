"""A folder of shards as the stream sees it: which folder, and single samples out of a bounded number of open shards.

Token shards give the codes they hold. Image shards give pixels, and the stream's tokenizer makes codes of them on the fly: slower by
far, but nothing has to be prepared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.data.manifest import Manifest, ShardInfo
from oar_scale.data.open_shard import ImageShard, OpenShard, TokenShard, UnusableSample
from oar_scale.errors import UserError
from oar_scale.storage import join
from oar_scale.storage.shard_cache import ShardCache
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.prompts import Field
from oar_scale.tokenizers.vq import pixels_to_unit

Orders = NDArray[np.uint16]
StoredOrders = Callable[[str, OpenShard], Orders]
"""Stored orders [S, V, K, N] of a shard of the given name: K orders of each of a sample's first V views."""


@dataclass(frozen=True)
class ShardSource:
    """A folder of shards."""

    folder: str
    manifest: Manifest
    cache: ShardCache
    weight: float = 1.0
    """Share in a mixture, in proportion to the others'."""
    stored_orders: StoredOrders | None = None
    tokenizer: ImageTokenizer | None = None
    """Makes codes of image shards; token shards have theirs."""
    image_views: tuple[str, ...] = ("center",)
    """Views of image shards; token shards have theirs."""

    @property
    def views(self) -> int:
        return len(self.image_views if self.tokenizer else self.manifest.views)

    @property
    def grid(self) -> int:
        """Cells per side. Raises UserError for image shards without a tokenizer."""
        if self.tokenizer is not None:
            return self.tokenizer.spec.grid
        if self.manifest.grid is None:
            raise UserError(f"{self.folder}: these are not token shards (the manifest has no grid). Run the stage tokens first.")
        return self.manifest.grid

    @property
    def vocabulary(self) -> int:
        """Codes lie below it."""
        if self.tokenizer is not None:
            return self.tokenizer.spec.codebook_size
        return self.manifest.vocab_size or 2**16

    def open(self, info: ShardInfo) -> OpenShard:
        """Open a shard and compare it with the manifest.

        Raises:
            UnusableSample: it cannot be had or read, or it is another one.
        """
        uri = join(self.folder, info.name)
        try:
            data = self.cache.read(uri, info.bytes, info.crc32c)
            shard = TokenShard(data, uri) if self.tokenizer is None else ImageShard(data, uri)
        except UserError as error:
            raise UnusableSample(str(error)) from error
        if len(shard) != info.samples:
            raise UnusableSample(f"{uri}: {len(shard)} samples, the manifest says {info.samples}. Index the folder again (oar data index).")
        if isinstance(shard, TokenShard) and shard.shape != (self.views, self.grid**2):
            raise UnusableSample(
                f"{uri}: codes are {shard.shape} (views, cells), the manifest says {(self.views, self.grid**2)}. "
                "Run the stage tokens again."
            )
        return shard


class ShardRow(NamedTuple):
    """One sample as a batch takes it."""

    codes: bytes
    """Little-endian uint16 [N]."""
    prompt: Any
    order: Orders | None


class OpenShards:
    """Samples of a source by shard and row. The ``room`` shards used last stay open; broken ones are remembered."""

    def __init__(self, source: ShardSource, field: Field, room: int) -> None:
        self.source, self.field, self.room = source, field, room
        self._open: OrderedDict[int, tuple[OpenShard, Orders | None]] = OrderedDict()
        self._broken: dict[int, UnusableSample] = {}

    def row(self, shard: int, row: int, view: int, draw: float | None) -> ShardRow:
        """One sample.

        Args:
            draw: a number from 0 to 1 that says which of the view's K stored orders it takes; None: none of them.

        Raises:
            UnusableSample: the shard or the sample.
        """
        opened, orders_SVKN = self._shard(shard)
        order = None
        if draw is not None and orders_SVKN is not None:
            order = orders_SVKN[row, view, int(draw * orders_SVKN.shape[2])]
        prompt = opened.prompt(row, self.field)
        if isinstance(opened, TokenShard):
            return ShardRow(opened.codes(row, view), prompt, order)
        assert isinstance(opened, ImageShard) and self.source.tokenizer is not None
        pixels = opened.pixels(row, self.source.image_views[view], self.source.tokenizer.spec.image_size)
        codes_1N = self.source.tokenizer.encode(pixels_to_unit(torch.tensor(pixels)[None]))
        return ShardRow(codes_1N.numpy().astype("<u2").tobytes(), prompt, order)

    def outside_vocabulary(self, shard: int, row: int) -> str:
        """What is wrong with a sample that has such codes."""
        opened, _ = self._shard(shard)
        return str(opened.fault(row, f"has codes above {self.source.vocabulary - 1}, the last one of the vocabulary"))

    def prefetch(self, shard: int) -> None:
        """Begin to fetch a shard that will be needed soon."""
        if shard not in self._open and shard not in self._broken:
            info = self.source.manifest.shards[shard]
            self.source.cache.prefetch(join(self.source.folder, info.name), info.bytes, info.crc32c)

    def _shard(self, index: int) -> tuple[OpenShard, Orders | None]:
        if index in self._broken:
            raise self._broken[index]
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        info = self.source.manifest.shards[index]
        try:
            opened = self.source.open(info)
        except UnusableSample as fault:
            self._broken[index] = fault
            raise
        orders = self.source.stored_orders(info.name, opened) if self.source.stored_orders else None
        self._open[index] = opened, orders
        if len(self._open) > self.room:
            self._open.popitem(last=False)
        return opened, orders
