"""A folder of shards as a data source: where it lies, what its manifest says, and single samples out of a bounded number of open shards.

Token shards hold codes. Image shards hold pixels, which the source's tokenizer encodes while the stream reads: much slower, but
nothing has to be prepared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.data.manifest import Manifest, ShardInfo
from oar_scale.data.open_shard import ImageShard, OpenShard, TokenShard, UnusableSample
from oar_scale.errors import BadName, Missing, UserError
from oar_scale.runtime.retry import retry_transient
from oar_scale.storage import join
from oar_scale.storage.shard_cache import DamagedShard, ShardCache
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.prompts import Field, Prompt
from oar_scale.tokenizers.vq import pixels_to_unit

Orders = NDArray[np.uint16]
"""Permutations of the cells."""
StoredOrders = Callable[[str, OpenShard], Mapping[int, Orders]]
"""Stored orders [S, K, N] of a shard of the given name, K of each sample, by the number of the view that they are of."""


@dataclass(frozen=True)
class ShardSource:
    """A folder of shards and how to read it. Immutable, and sent to loader processes as it is."""

    folder: str
    manifest: Manifest
    cache: ShardCache
    weight: float = 1.0
    """Weight in a mixture of sources."""
    stored_orders: StoredOrders | None = None
    tokenizer: ImageTokenizer | None = None
    """Encodes image shards; None for token shards."""
    image_views: tuple[str, ...] = ("center",)
    """Views to make of image shards; those of token shards are in the manifest."""

    @property
    def views(self) -> int:
        """Number of views of each sample."""
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
        """Size of the vocabulary: codes lie below it."""
        if self.tokenizer is not None:
            return self.tokenizer.spec.codebook_size
        return self.manifest.vocab_size or 2**16

    def open(self, info: ShardInfo) -> OpenShard:
        """Fetch a shard, open it and compare it with the manifest.

        Raises:
            UnusableSample: it is not there or damaged, or has another number of samples or another shape of codes.
            Unreachable: the storage did not answer for as long as the cache's patience. Nothing is wrong with the shard.
            UserError: the storage refuses, as where credentials have expired. Nothing is wrong with the shard, either.
        """
        uri = join(self.folder, info.name)
        try:
            data = self.cache.read(uri, info.bytes, info.crc32c)
        except (Missing, BadName, DamagedShard) as error:
            raise UnusableSample(str(error)) from error
        try:
            shard = TokenShard(data, uri, (self.views, self.grid**2)) if self.tokenizer is None else ImageShard(data, uri)
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
    """One sample of a shard, as a batch takes it."""

    codes: bytes
    """Little-endian uint16 [N]."""
    prompt: Prompt
    order: Orders | None
    """Its stored order [N]; None where it follows none."""


class OpenShards:
    """Samples of a source by shard and row.

    The ``max_open`` shards used last stay open (least recently used first out). The error of a broken shard is kept, so that its
    samples fail at once instead of after another round of retries.
    """

    def __init__(self, source: ShardSource, field: Field, max_open: int) -> None:
        self.source, self.field, self.max_open = source, field, max_open
        self._open: OrderedDict[int, tuple[OpenShard, Mapping[int, Orders] | None]] = OrderedDict()
        self._broken: dict[int, UnusableSample] = {}

    def row(self, shard: int, row: int, view: int, draw: float | None) -> ShardRow:
        """One sample.

        Args:
            shard: index of the shard in the manifest.
            row: index of the sample in the shard.
            view: index of the view.
            draw: a number in [0, 1) that selects one of the view's K stored orders; None: no stored order is wanted.

        Raises:
            UnusableSample: the shard or the sample cannot be used.
        """
        opened, orders = self._shard(shard)
        order = None
        if draw is not None and orders is not None:
            orders_SKN = orders[view]
            order = orders_SKN[row, int(draw * orders_SKN.shape[1])]
        prompt = opened.prompt(row, self.field)
        if isinstance(opened, TokenShard):
            return ShardRow(opened.codes(row, view), prompt, order)
        assert isinstance(opened, ImageShard) and self.source.tokenizer is not None
        pixels = opened.pixels(row, self.source.image_views[view], self.source.tokenizer.spec.image_size)
        codes_1N = self.source.tokenizer.encode(pixels_to_unit(torch.tensor(pixels)[None]))
        return ShardRow(codes_1N.numpy().astype("<u2").tobytes(), prompt, order)

    def fault(self, shard: int, row: int, what: str) -> UnusableSample:
        """The error that a sample cannot be used; names shard and key, ``what`` continues "sample KEY"."""
        opened, _ = self._shard(shard)
        return opened.fault(row, what)

    def prefetch(self, shard: int) -> None:
        """Start fetching a shard in the background, unless it is open or known to be broken."""
        if shard not in self._open and shard not in self._broken:
            info = self.source.manifest.shards[shard]
            self.source.cache.prefetch(join(self.source.folder, info.name), info.bytes, info.crc32c)

    def _shard(self, index: int) -> tuple[OpenShard, Mapping[int, Orders] | None]:
        """An open shard and its stored orders. Raises UnusableSample; Unreachable where the storage does not answer."""
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
        orders, stored = None, self.source.stored_orders
        if stored is not None:
            orders = retry_transient(lambda: stored(info.name, opened), self.source.cache.patience_s)
        self._open[index] = opened, orders
        if len(self._open) > self.max_open:
            self._open.popitem(last=False)
        return opened, orders
