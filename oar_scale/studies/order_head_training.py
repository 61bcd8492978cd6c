"""Training an order head on extracted orders, and what it is worth on images it has not seen.

    token shards + order tables -> batches of images -> rows of the frozen trunk -> both networks, pairwise ranking loss

Of the training images a share is kept out by the name of their family, so that variants of one picture are on one side. Orders that
nobody had to train are measured on the same images: the baselines of an order head.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.schema import OrderHeadConfig
from oar_scale.data.hashing import derived_seed, name_hashes, permutations
from oar_scale.data.manifest import Manifest, ShardInfo, read_manifest
from oar_scale.data.open_shard import TokenShard
from oar_scale.data.shards import identity, read_token_shard
from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel
from oar_scale.orders.analysis.analysis_values import HeadReport, HeadRow
from oar_scale.orders.analysis.statistics import kendall_distance, placing_times
from oar_scale.orders.head import (
    KIND,
    HeadSpec,
    OrderHead,
    all_cells,
    ask_all,
    ask_rest,
    predict_ahead,
    predict_orders,
    ranking_loss,
    tables_id,
)
from oar_scale.orders.order_files import OrderFiles
from oar_scale.orders.order_table import OrderTable, join_orders, read_orders, table_name, write_orders
from oar_scale.orders.scores import score_rows
from oar_scale.storage import Missing, join, open_storage
from oar_scale.tokenizers.prompts import PromptEncoder, conditioning_inputs

COMPARED = 256
"""Cells of an image that a training step compares with one another; of larger grids a random choice."""
WARMUP = 0.1
"""Share of the steps in which the rate rises."""


class Labelled(NamedTuple):
    """Images with their orders."""

    codes_BN: Tensor
    condition_BTD: Tensor
    order_BN: Tensor
    keys: list[str]


@dataclass
class HeadData:
    """The training images of a run as its model sees them."""

    model: AnyOrderModel
    prompts: PromptEncoder
    files: OrderFiles
    cache_dir: str
    cache_bytes: int | None

    def __post_init__(self) -> None:
        assert self.files.tokens is not None and self.files.tables is not None
        self.tokens, self.tables = self.files.tokens, self.files.tables
        self.manifest: Manifest = read_manifest(self.tokens)
        self.device = next(self.model.parameters()).device
        self.settings_id = tables_id(self.files)

    def open(self, info: ShardInfo) -> TokenShard:
        """A token shard, through the local cache."""
        return read_token_shard(join(self.tokens, info.name), self.cache_dir, info, cache_bytes=self.cache_bytes)

    def orders(self, info: ShardInfo, shard: TokenShard) -> NDArray[np.uint16]:
        """The exact order [S, N] of each image; the first one where it has several."""
        try:
            table = read_orders(join(self.tables, table_name(info.name)))
        except Missing as error:
            raise UserError(f"{error.uri}: missing; an order head learns from extracted orders. Run the stage extract.") from error
        if table.settings_id != self.settings_id:
            raise UserError(f"{self.tables}: orders of several settings: {self.settings_id}, {table.settings_id}. Extract them again.")
        return join_orders(shard.keys, table, shard=join(self.tokens, info.name), cells=self.model.spec.cells)[:, 0]

    @torch.no_grad()
    def take(self, shard: TokenShard, rows: NDArray[np.int64], order_SN: NDArray[np.uint16], view: int = 0) -> Labelled:
        """Some images of a shard, in one of their views."""
        prompts = shard.prompts(self.prompts.field)
        encoded_prompts = self.prompts.encode([prompts[row] for row in rows.tolist()]).to(self.device)
        codes_BN, order_BN = (torch.from_numpy(each[rows].astype(np.int64)).to(self.device) for each in (shard.view(view), order_SN))
        keys = [shard.keys[row] for row in rows.tolist()]
        return Labelled(
            codes_BN, self.model.condition(conditioning_inputs(self.prompts, encoded_prompts, self.model.dtype)), order_BN, keys
        )


def kept_out(shard: TokenShard, share: float) -> NDArray[np.bool_]:
    """Which images [S] a head is not trained on: by their family, else their name, else their key."""
    identities = [identity(shard.metadata(row)) for row in range(len(shard))]
    names = [family or name or key for (name, family), key in zip(identities, shard.keys, strict=True)]
    return name_hashes(names, "order head") < share


def train_head(
    data: HeadData, config: OrderHeadConfig, own_id: str, seed: int, on_step: Callable[[int, float], None] = lambda step, loss: None
) -> tuple[OrderHead, HeadReport]:
    """Train a head on the orders of ``data``, and measure it.

    Args:
        own_id: of the model.
        on_step: called with the steps done and the last loss.

    Raises:
        UserError: images without an order, or too few of them to train on or to measure with.
    """
    torch.manual_seed(derived_seed("order head", seed))
    spec = HeadSpec.of(
        data.model.spec,
        own_id,
        width=config.width,
        first=config.first,
        settings_id=data.settings_id or "",
        heldout_fraction=config.heldout_fraction,
    )
    head = OrderHead(spec).to(data.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=0.05)
    batches, mean, started = _batches(data, config, seed), _Mean(data.model.spec.cells), time.monotonic()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _rate(step, config.steps)
        batch = next(batches)
        mean.add(batch)
        loss = _loss(data.model, head, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step(step + 1, float(loss.detach()))
    head.eval()
    return head, _measure(data, config, head, mean, time.monotonic() - started)


def write_predicted(data: HeadData, head: OrderHead, batch: int, on_done: Callable[[int], None], views: int = 1) -> int:
    """Write an order table with the head's orders for each token shard that has none yet; returns the number of images.

    Args:
        views: orders are predicted for so many of the views, from the first one on.
        on_done: called with the images done.
    """
    assert data.files.predicted is not None
    not_default = {} if views == 1 else {"views": views}
    settings_id = fingerprint({"method": KIND, "head": _content(head), **not_default})
    done = 0
    for info in data.manifest.shards:
        uri = join(data.files.predicted, table_name(info.name))
        if not open_storage(uri).exists(uri) or read_orders(uri).settings_id != settings_id:
            shard = data.open(info)
            unknown_SN = np.zeros((len(shard), data.model.spec.cells), dtype=np.uint16)
            cuts = np.split(np.arange(len(shard)), range(batch, len(shard), batch))
            batches = [data.take(shard, rows, unknown_SN, view) for view in range(views) for rows in cuts]
            predicted = [predict_orders(data.model, part.codes_BN, part.condition_BTD, head) for part in batches]
            order_SN = torch.cat([orders.order_BN for orders in predicted]).cpu().numpy().astype(np.uint16)
            scores = np.zeros(order_SN.shape, dtype=np.float32)
            keys, of_view = list(shard.keys) * views, [view for view in range(views) for _ in shard.keys]
            write_orders(uri, OrderTable(keys, of_view, order_SN, scores, head.spec.model_id, settings_id))
        done += info.samples
        on_done(done)
    return done


def _content(head: OrderHead) -> str:
    """A hash of the head's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Mean:
    """Mean placing time of each cell over the images of the batches."""

    def __init__(self, cells: int) -> None:
        self.total_N, self.keys = np.zeros(cells), set[str]()

    def add(self, batch: Labelled) -> None:
        self.total_N = self.total_N + placing_times(batch.order_BN.cpu().numpy()).sum(axis=0)
        self.keys |= set(batch.keys)

    @property
    def order_N(self) -> NDArray[np.int64]:
        return np.argsort(self.total_N, kind="stable")


def _batches(data: HeadData, config: OrderHeadConfig, seed: int) -> Iterator[Labelled]:
    """Yield images to train on without end: shards in another order in each epoch, the images of a shard shuffled."""
    epoch = 0
    while True:
        images = 0
        for index in permutations("order head shards", len(data.manifest.shards), seed, epoch).tolist():
            info = data.manifest.shards[index]
            shard = data.open(info)
            order_SN, rows = data.orders(info, shard), np.flatnonzero(~kept_out(shard, config.heldout_fraction))
            rows = rows[permutations("order head images", len(rows), seed, epoch, index)]
            images += len(rows)
            for start in range(0, len(rows), config.batch):
                yield data.take(shard, rows[start : start + config.batch], order_SN)
        if not images:
            raise UserError(f"{data.tokens}: order_head.heldout_fraction {config.heldout_fraction:g} leaves none to train on. Lower it.")
        epoch += 1


def _rate(step: int, steps: int) -> float:
    """The learning rate: up in the first tenth of the steps, then down along a cosine."""
    rise = max(1, round(WARMUP * steps))
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _loss(model: AnyOrderModel, head: OrderHead, batch: Labelled) -> Tensor:
    """Sum of both networks' losses."""
    rows_BND, own_BN = ask_all(model, batch.codes_BN, batch.condition_BTD)
    every_BN = all_cells(batch.codes_BN)
    rows_BRD, rest_BR = ask_rest(model, batch.codes_BN, batch.condition_BTD, head) if head.spec.first else (rows_BND, every_BN)
    exact_BN = batch.order_BN.argsort(1)
    hindsight_BN, ahead_BR = head.hindsight(rows_BND, every_BN, own_BN), head.ahead(rows_BRD, rest_BR)
    return _some_pairs(hindsight_BN, exact_BN) + _some_pairs(ahead_BR, exact_BN.gather(1, rest_BR))


def _some_pairs(time_BR: Tensor, exact_BR: Tensor) -> Tensor:
    if time_BR.shape[1] > COMPARED:
        some = torch.randperm(time_BR.shape[1], device=time_BR.device)[:COMPARED]
        time_BR, exact_BR = time_BR[:, some], exact_BR[:, some]
    return ranking_loss(time_BR, exact_BR)


# -- what it is worth ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(data: HeadData, config: OrderHeadConfig, head: OrderHead, mean: _Mean, seconds: float) -> HeadReport:
    """Kendall tau of every method on images that were kept out."""
    cells, first = data.model.spec.cells, head.spec.first
    kept, taus = 0, dict[str, list[NDArray[np.float64]]]()
    for batch in _kept_out_batches(data, config):
        exact_BN = batch.order_BN.cpu().numpy()
        for name, order_BN in _orders(data.model, head, batch, mean.order_N).items():
            taus.setdefault(name, []).append(np.stack([_tau(order_BN, exact_BN, None), _tau(order_BN, exact_BN, head)]))
        kept += len(exact_BN)
    if not kept:
        raise UserError(f"{data.tokens}: order_head.heldout_fraction {config.heldout_fraction:g} keeps no image out. Raise it.")
    means = {name: np.concatenate(values, axis=1).mean(axis=1) for name, values in taus.items()}
    rows_of = {"mean order of the data set": 0}
    rows = tuple(HeadRow(name, float(tau), float(rest), rows_of.get(name, cells)) for name, (tau, rest) in means.items())
    exact_rows = cells * (cells + 1) // 2
    return HeadReport(head.spec.model_id, head.spec.settings_id, len(mean.keys), kept, exact_rows, config.steps, seconds, first, rows)


def _kept_out_batches(data: HeadData, config: OrderHeadConfig) -> Iterator[Labelled]:
    """At most ``heldout_images`` images that the head was not trained on."""
    left = config.heldout_images
    for info in data.manifest.shards:
        if left > 0:
            shard = data.open(info)
            rows = np.flatnonzero(kept_out(shard, config.heldout_fraction))[:left]
            left -= len(rows)
            order_SN = data.orders(info, shard)
            for start in range(0, len(rows), config.batch):
                yield data.take(shard, rows[start : start + config.batch], order_SN)


def _orders(model: AnyOrderModel, head: OrderHead, batch: Labelled, mean_N: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """The order of each image by every method; those that see codes come last."""
    rows_BND, own_BN = ask_all(model, batch.codes_BN, batch.condition_BTD)
    every_BN = all_cells(batch.codes_BN)
    best_R = score_rows(model.output.weight, rows_BND.flatten(0, 1), "max_prob", batch.codes_BN.flatten())
    orders = {
        "confidence, asked once": best_R.view_as(own_BN).argsort(1, descending=True),
        "order head ahead": predict_ahead(model, batch.codes_BN, batch.condition_BTD, head).order_BN,
        "own code's score, asked once": own_BN.argsort(1, descending=True),
        "order head in hindsight": head.hindsight(rows_BND, every_BN, own_BN).argsort(1),
    }
    mean_BN = np.broadcast_to(mean_N, batch.codes_BN.shape)
    return {"mean order of the data set": mean_BN} | {name: order_BN.cpu().numpy() for name, order_BN in orders.items()}


def _tau(order_BN: NDArray[np.int64], exact_BN: NDArray[np.int64], head: OrderHead | None) -> NDArray[np.float64]:
    """Kendall tau of each image [B]; with ``head`` of the cells that it decides about."""
    if head is not None and head.spec.first:
        keep_N = ~np.isin(np.arange(order_BN.shape[1]), head.first_N.cpu().numpy())
        number_N = np.cumsum(keep_N) - 1
        order_BN, exact_BN = (number_N[each[keep_N[each]].reshape(len(each), -1)] for each in (order_BN, exact_BN))
    return 1 - 2 * kendall_distance(order_BN, exact_BN)
