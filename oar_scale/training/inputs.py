"""What a worker trains on and is judged by: the stream of a stage, and the held-out images under fixed orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.config.schema import MixConfig
from oar_scale.data.hashing import permutations
from oar_scale.data.manifest import Manifest, read_manifest
from oar_scale.data.open_shard import OpenShard
from oar_scale.data.shard_source import ShardSource, StoredOrders
from oar_scale.data.shards import read_token_shard
from oar_scale.data.stream import StreamSettings, TokenStream
from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, load_model, model_id
from oar_scale.orders.extraction import ExtractionSettings, extract_orders
from oar_scale.orders.order_files import run_files
from oar_scale.orders.order_table import OrderTable, join_orders, read_orders, table_name
from oar_scale.orders.policies import TrainingOrders, policy
from oar_scale.storage import join
from oar_scale.storage.shard_cache import ShardCache
from oar_scale.tokenizers.prompts import PromptEncoder, check_features, load_prompts, model_inputs
from oar_scale.tokenizers.vq import load_vq
from oar_scale.training.job import TrainingJob

HELDOUT_IMAGES = 256


def job_prompts(job: TrainingJob) -> PromptEncoder:
    return load_prompts(job.recipe.tokenizer.text, join(job.root, "tokenizers"))


def job_stream(job: TrainingJob, prompts: PromptEncoder, rank: int, world: int) -> TokenStream:
    """This rank's batches of the stage."""
    recipe, training = job.recipe, job.training
    folder, given = join(job.root, "tokens", "train"), job_orders(job)
    views = 1 if job.stage == "pretrain" else recipe.extract.views
    settings = StreamSettings(
        seed=recipe.seed,
        global_batch=training.global_batch,
        streams=recipe.data.canonical_streams,
        window_shards=recipe.data.shuffle_window_shards,
        caption_dropout=recipe.model.caption_dropout,
        order=given.order if job.stage == "pretrain" else None,
        random_share=0.0 if recipe.model.layout == "raster" else training.random_share,
        stored_views=views,
        max_bad_fraction=recipe.data.max_bad_fraction,
    )
    manifest = read_manifest(folder)
    stored: StoredOrders | None = None
    if given.tables is not None:
        stored = _Tables(given.tables, folder, manifest.grid or 0, model_id(job.start_from), views)
    elif given.order is not None and job.stage == "finetune":
        # By sample, as if it were stored: so that another order policy changes the orders and nothing else, not the views.
        stored = _SameForAll(given.order, views)
    cache = ShardCache(job.cache, recipe.storage.cache_bytes, recipe.storage.patience_s)
    sources = [ShardSource(folder, manifest, cache, stored_orders=stored)]
    sources += [_mixed_in(job, mix, manifest, cache, stored if given.order is not None else None) for mix in training.mix]
    return TokenStream(sources, prompts, settings, rank, world, recipe.data.loader_processes)


def job_orders(job: TrainingJob) -> TrainingOrders:
    """What the stage's samples outside the random share follow. Raises UserError for a policy that has nothing for them."""
    if job.recipe.model.layout == "raster":
        name = "raster"
    elif job.stage == "control":
        name = "random"
    else:
        name = job.training.order or ("stored" if job.stage == "finetune" else "random")
    return policy(name, f"{job.section}.order").training(run_files(job.root), job.recipe.grid)


def _mixed_in(job: TrainingJob, mix: MixConfig, own: Manifest, cache: ShardCache, orders: StoredOrders | None) -> ShardSource:
    manifest = read_manifest(mix.shards)
    if manifest.grid is None:  # pictures
        vq = load_vq(join(job.root, "tokenizers", "vq.safetensors"))
        return ShardSource(mix.shards, manifest, cache, mix.weight, orders, vq, job.recipe.tokenizer.views)
    if manifest.tokenizer_id != own.tokenizer_id:
        raise UserError(
            f"{mix.shards}: its codes are of the tokenizer {manifest.tokenizer_id}, the run's own are of {own.tokenizer_id}. "
            "Tokenise its images with the run's tokenizer (oar data tokenize)."
        )
    return ShardSource(mix.shards, manifest, cache, mix.weight, orders)


@dataclass(frozen=True)
class _SameForAll:
    """One order for all samples of a shard, in all views."""

    order: tuple[int, ...]
    views: int

    def __call__(self, shard: str, samples: OpenShard) -> NDArray[np.uint16]:
        return np.broadcast_to(np.array(self.order, dtype=np.uint16), (len(samples), self.views, 1, len(self.order)))


@dataclass(frozen=True)
class _Tables:
    """The orders of a token shard's samples, from the table of the same stem."""

    orders: str
    tokens: str
    grid: int
    model_id: str
    views: int

    def __call__(self, shard: str, samples: OpenShard) -> NDArray[np.uint16]:
        table, where = read_orders(join(self.orders, table_name(shard))), join(self.tokens, shard)
        of_view = [_of_view(table, view) for view in range(self.views)]
        joined = [join_orders(samples.keys, each, shard=where, cells=self.grid**2, model_id=self.model_id) for each in of_view]
        return np.stack(joined, axis=1)


def _of_view(table: OrderTable, view: int) -> OrderTable:
    """The rows of one view, as a table of first views.

    Raises:
        UserError: it has none.
    """
    rows = [row for row, each in enumerate(table.views) if each == view]
    if not rows:
        raise UserError(
            f"{table.uri}: no orders of view {view}, where extract.views asks for those of the first {view + 1} and more. "
            "Extract them again, or set extract.views back."
        )
    draws = None if table.draws is None else [table.draws[row] for row in rows]
    keys, order_SN, score_SN = [table.keys[row] for row in rows], table.order_SN[rows], table.score_SN[rows]
    return replace(table, keys=keys, views=[0] * len(rows), order_SN=order_SN, score_SN=score_SN, draws=draws)


class Heldout:
    """Held-out negative log-likelihood under fixed orders, each rank its share of the images.

    Attributes:
        orders: ``nll_random``, ``nll_raster``, ``nll_stored`` -> the order of each of this rank's images [S, N].
        captions: all of the images' captions, this rank's or not.
    """

    def __init__(self, job: TrainingJob, prompts: PromptEncoder, rank: int, world: int, device: torch.device) -> None:
        folder = join(job.root, "tokens", "heldout")
        manifest = read_manifest(folder)
        check_features(manifest.features, prompts, folder)
        shards = [read_token_shard(join(folder, shard.name), job.cache, shard) for shard in manifest.shards]
        codes = torch.cat([torch.from_numpy(shard.view(0).astype("int64")) for shard in shards])[:HELDOUT_IMAGES]
        cond_inputs = prompts.encode([prompt for shard in shards for prompt in shard.prompts(prompts.field)][:HELDOUT_IMAGES])
        self.captions = [caption for shard in shards for caption in shard.captions][:HELDOUT_IMAGES]
        self.prompts = prompts
        # A rank that has no share computes with someone else's image, for under ZeRO-3 each forward pass is collective.
        self.counts = rank < len(codes)
        mine = torch.arange(len(codes))[rank::world] if self.counts else torch.tensor([rank % len(codes)])
        self.share = -(-len(codes) // world)
        self.codes, self.cond_inputs = (t[mine].to(device) for t in (codes, cond_inputs))
        raster = torch.arange(codes.shape[1], device=device).expand_as(self.codes)
        makers: dict[str, Callable[[], Tensor]] = {
            "random": lambda: torch.from_numpy(permutations("heldout order", codes.shape[1], mine.numpy())).to(device),
            "raster": lambda: raster,
            "stored": lambda: self._preferred(job, mine, device),
        }
        wanted = ("raster",) if job.recipe.model.layout == "raster" else job.training.evaluate_orders
        # A raster model's only order goes by the name that every other part of a run looks for.
        names = {"raster": "nll_random"} if job.recipe.model.layout == "raster" else {name: f"nll_{name}" for name in wanted}
        self.orders = {names[name]: makers[name]() for name in wanted}

    @torch.no_grad()
    def nll(self, model: AnyOrderModel, order: str = "nll_random", batch: int = 64) -> float:
        """Mean nats per code over all ranks' images. Collective."""
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.codes.device)
        for start in range(0, self.share, batch):  # as many rounds on every rank
            counts = self.counts and start < len(self.codes)
            part = slice(start, start + batch) if counts else slice(0, 1)
            condition_bTD = model.condition(model_inputs(self.prompts, self.cond_inputs[part]))
            nll_bN = model.nll(self.codes[part], self.orders[order][part], condition_bTD).double()
            if counts:
                total += torch.stack([nll_bN.sum(), nll_bN.new_tensor(nll_bN.numel())])
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _preferred(self, job: TrainingJob, mine: Tensor, device: torch.device, batch: int = 64) -> Tensor:
        """The orders that the stage's first model prefers for this rank's images, as those of the training images were found."""
        model = load_model(job.start_from).to(device)
        settings = ExtractionSettings.from_recipe(job.recipe.extract)
        found = []
        for start in range(0, len(self.codes), batch):
            part = slice(start, start + batch)
            condition_bTD = model.condition(model_inputs(self.prompts, self.cond_inputs[part]))
            orders = extract_orders(model, self.codes[part], condition_bTD, settings, mine[part].numpy())
            found.append(orders.order_BN.long())
        return torch.cat(found).to(device)
