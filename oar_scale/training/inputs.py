"""What a worker trains on: a stage's stream of batches, its prompts and its orders."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from oar_scale.config.data_sections import mirrored_views
from oar_scale.config.schema import MixConfig
from oar_scale.data.hashing import derived_seed
from oar_scale.data.manifest import Manifest, read_manifest
from oar_scale.data.open_shard import OpenShard
from oar_scale.data.sample_plan import Cut
from oar_scale.data.shard_source import Orders, ShardSource, StoredOrders
from oar_scale.data.stream import StreamSettings, TokenStream
from oar_scale.errors import UserError
from oar_scale.orders.order_files import run_files
from oar_scale.orders.order_table import OrderTable, join_orders, mirror_orders, read_orders, table_name
from oar_scale.orders.policies import TrainingOrders, policy
from oar_scale.storage import join
from oar_scale.storage.shard_cache import ShardCache
from oar_scale.tokenizers.prompts import PromptEncoder, load_prompts
from oar_scale.tokenizers.vq import load_vq
from oar_scale.training.job import TrainingJob

STREAM_VERSION = 1
"""0: every stage drew with the recipe's seed. A checkpoint keeps the version that it was trained with: its run resumes as it began."""


def job_prompts(job: TrainingJob) -> PromptEncoder:
    """Return the encoder of the run's prompts."""
    return load_prompts(job.recipe.tokenizer.text, join(job.root, "tokenizers"))


def job_stream(
    job: TrainingJob, prompts: PromptEncoder, rank: int, world: int, version: int = STREAM_VERSION, cuts: tuple[Cut, ...] = ()
) -> TokenStream:
    """Return this rank's batches of the stage.

    Args:
        version: that of the checkpoint it resumes from.
        cuts: how the samples have been cut into streams, the last one as the recipe says; default: always as it says.
    """
    recipe, training = job.recipe, job.training
    *earlier, cut = cuts or (recipe_cut(job),)
    folder, given = join(job.root, "tokens", "train"), job_orders(job)
    manifest = read_manifest(folder)
    views, mirrored = _views_with_orders(job, manifest)
    settings = StreamSettings(
        seed=stream_seed(job, version),
        global_batch=training.global_batch,
        streams=cut.streams,
        window_shards=cut.window_shards,
        caption_dropout=recipe.model.caption_dropout,
        order=given.order if job.stage == "pretrain" else None,
        random_share=0.0 if recipe.model.layout == "raster" else training.random_share,
        stored_views=(*range(views), *sorted(mirrored.values())),
        max_bad_fraction=recipe.data.max_bad_fraction,
        earlier=tuple(earlier),
        first_batch=cut.first_batch,
    )
    stored: StoredOrders | None = None
    if given.tables is not None:
        stored = _OrderTables(given.tables, folder, manifest.grid or 0, job.start_id, views, mirrored)
    elif given.order is not None and job.stage == "finetune":
        # By sample, as if it were stored: so another order policy changes the orders and nothing else, not the views.
        stored = _OneOrder(given.order, settings.stored_views)
    cache = ShardCache(job.cache, recipe.storage.cache_bytes, recipe.storage.patience_s)
    sources = [ShardSource(folder, manifest, cache, stored_orders=stored)]
    sources += [_mixed_source(job, mix, manifest, cache, stored if given.order is not None else None) for mix in training.mix]
    return TokenStream(sources, prompts, settings, rank, world, recipe.data.loader_processes)


def _views_with_orders(job: TrainingJob, manifest: Manifest) -> tuple[int, dict[int, int]]:
    """How many views have orders of their own, and which of them has a mirror image with the same orders mirrored; see
    :func:`mirrored_views`."""
    extract = job.recipe.extract
    if job.stage == "pretrain":
        return 1, {}
    mirrored = mirrored_views(manifest.views, extract.views) if extract.mirror else {}
    if extract.mirror and not mirrored:
        raise UserError(
            f"{join(job.root, 'tokens', 'train')}: extract.mirror wants a mirror image of one of the first {extract.views} views, and the "
            f"shards hold {', '.join(manifest.views)}. Tokenise again with tokenizer.views, or leave mirror out."
        )
    return extract.views, mirrored


def recipe_cut(job: TrainingJob, first_batch: int = 0) -> Cut:
    """How the recipe cuts the samples into streams, from a batch on."""
    return Cut(first_batch, job.recipe.data.canonical_streams, job.recipe.data.shuffle_window_shards)


def stream_seed(job: TrainingJob, version: int = STREAM_VERSION) -> int:
    """The seed of a stage's samples, their orders, views and dropped captions.

    Fine-tuning and its control share one, so that they differ in nothing but the orders. It is not that of the pretraining: the control
    would see its samples in the same random orders a second time, and its model knows them better than any others.
    """
    if version == 0 or job.stage == "pretrain":
        return job.recipe.seed
    return derived_seed(f"stream of {job.section}", job.recipe.seed)


def job_orders(job: TrainingJob) -> TrainingOrders:
    """Return the orders of the stage's samples outside the random share. Raises UserError for a policy that has none for them."""
    if job.recipe.model.layout == "raster":
        name = "raster"
    elif job.stage == "control":
        name = "random"
    else:
        name = job.training.order or ("stored" if job.stage == "finetune" else "random")
    return policy(name, f"{job.section}.order").training(run_files(job.root), job.recipe.grid)


def _mixed_source(job: TrainingJob, mix: MixConfig, own: Manifest, cache: ShardCache, orders: StoredOrders | None) -> ShardSource:
    """Another folder of the mixture. Raises UserError for codes of another tokenizer."""
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
class _OneOrder:
    """One order for all samples of a shard, in all views that have orders."""

    order: tuple[int, ...]
    views: tuple[int, ...]

    def __call__(self, shard: str, samples: OpenShard) -> dict[int, Orders]:
        orders_SKN = np.broadcast_to(np.array(self.order, dtype=np.uint16), (len(samples), 1, len(self.order)))
        return dict.fromkeys(self.views, orders_SKN)


@dataclass(frozen=True)
class _OrderTables:
    """The orders of a token shard's samples, from the order table of the same name."""

    orders: str
    tokens: str
    grid: int
    model_id: str
    views: int
    """The first so many views have rows in the table."""
    mirrored: dict[int, int]
    """Of some of these: the view that is the mirror image."""

    def __call__(self, shard: str, samples: OpenShard) -> dict[int, Orders]:
        table, where = read_orders(join(self.orders, table_name(shard))), join(self.tokens, shard)
        own = {
            view: join_orders(samples.keys, _of_view(table, view), shard=where, cells=self.grid**2, model_id=self.model_id)
            for view in range(self.views)
        }
        return own | {other: mirror_orders(own[view], self.grid) for view, other in self.mirrored.items()}


def _of_view(table: OrderTable, view: int) -> OrderTable:
    """The rows of one view, as a table of first views. Raises UserError where it has none."""
    rows = [row for row, each in enumerate(table.views) if each == view]
    if not rows:
        raise UserError(
            f"{table.uri}: no orders of view {view}, where extract.views asks for those of the first {view + 1} and more. "
            "Extract them again, or set extract.views back."
        )
    draws = None if table.draws is None else [table.draws[row] for row in rows]
    keys, order_SN, score_SN = [table.keys[row] for row in rows], table.order_SN[rows], table.score_SN[rows]
    return replace(table, keys=keys, views=[0] * len(rows), order_SN=order_SN, score_SN=score_SN, draws=draws)
