"""What a worker trains on: a stage's stream of batches, its prompts and its orders."""

from __future__ import annotations

from dataclasses import replace

from oar_scale.config.data_sections import mirrored_views
from oar_scale.config.schema import MixConfig
from oar_scale.data.hashing import derived_seed
from oar_scale.data.manifest import Manifest, read_manifest
from oar_scale.data.sample_plan import Cut
from oar_scale.data.shard_source import ShardSource, StoredOrders
from oar_scale.data.stream import StreamSettings, TokenStream
from oar_scale.errors import UserError
from oar_scale.orders.distinct import distinct_orders
from oar_scale.orders.order_files import run_files
from oar_scale.orders.policies import TrainingOrders, policy
from oar_scale.storage import join
from oar_scale.storage.shard_cache import ShardCache
from oar_scale.tokenizers.prompts import PromptEncoder, load_prompts
from oar_scale.tokenizers.vq import load_vq
from oar_scale.training.job import TrainingJob
from oar_scale.training.stored_orders import NearestOrders, OneOrder, OrdersByKey, OrdersOfOthers, OrderTables

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
    folder, given, seed = join(job.root, "tokens", "train"), job_orders(job), stream_seed(job, version)
    manifest, pretraining = read_manifest(folder), job.kind == "pretrain"
    views, mirrored = _views_with_orders(job, manifest, given)
    settings = StreamSettings(
        seed=seed,
        global_batch=training.global_batch,
        streams=cut.streams,
        window_shards=cut.window_shards,
        caption_dropout=recipe.model.caption_dropout,
        order=given.order if pretraining else None,
        random_share=0.0 if recipe.model.layout == "raster" else training.random_share,
        any_view_share=None if pretraining else recipe.finetune.any_view_share,
        stored_views=(*range(views), *sorted(mirrored.values())),
        max_bad_fraction=recipe.data.max_bad_fraction,
        earlier=tuple(earlier),
        first_batch=cut.first_batch,
    )
    stored: StoredOrders | None = None
    if given.tables is not None:
        stored = _from_tables(
            job, OrderTables(given.tables, folder, manifest.grid or 0, job.start_id, views, mirrored, job.predicted_id), seed
        )
    elif given.by_key:
        stored = OrdersByKey(seed, recipe.grid, views, mirrored)
    elif given.order is not None and not pretraining:
        # By sample, as if it were stored: so another order policy changes the orders and nothing else, not the views.
        stored = OneOrder(given.order, settings.stored_views)
    cache = ShardCache(job.cache, recipe.storage.cache_bytes, recipe.storage.patience_s)
    sources = [ShardSource(folder, manifest, cache, stored_orders=stored)]
    sources += [_mixed_source(job, mix, manifest, cache, stored if given.tables is None else None) for mix in training.mix]
    return TokenStream(sources, prompts, settings, rank, world, recipe.data.loader_processes)


def _views_with_orders(job: TrainingJob, manifest: Manifest, given: TrainingOrders) -> tuple[int, dict[int, int]]:
    """How many views have orders of their own, and which of them has a mirror image with the same orders mirrored; see
    :func:`mirrored_views`."""
    extract = job.recipe.extract
    if job.kind == "pretrain":
        return len(manifest.views) if given.by_key else 1, {}
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

    Fine-tuning, its control and all arms share one, so that they differ in nothing but the orders. It is not that of the pretraining:
    the control would see its samples in the same random orders a second time, and its model knows them better than any others.
    """
    if version == 0 or job.kind == "pretrain":
        return job.recipe.seed
    return derived_seed(f"stream of {job.section}", job.recipe.seed)


def job_orders(job: TrainingJob) -> TrainingOrders:
    """Return the orders of the stage's samples outside the random share. What they rest on is computed where it is not stored yet.

    Raises:
        UserError: for a policy that has none for them, or what they rest on is missing.
    """
    if job.recipe.model.layout == "raster":
        name = "raster"
    elif job.kind == "control":
        name = "random"
    else:
        name = job.training.order or ("stored" if job.kind == "finetune" else "random")
    orders = policy(name, f"{job.section}.order").training(run_files(job.root, job.orders), job.recipe.grid)
    if orders.tables is not None and job.recipe.finetune.distinct_orders is not None:
        distinct_orders(run_files(job.root, job.orders), job.recipe.finetune.distinct_orders, stream_seed(job), job.recipe.grid)
    return orders


def _from_tables(job: TrainingJob, tables: StoredOrders, seed: int) -> StoredOrders:
    """The stored orders as ``finetune`` wants them: fewer different ones, or those of other images."""
    finetune = job.recipe.finetune
    if finetune.distinct_orders is not None:
        tables = NearestOrders(tables, distinct_orders(run_files(job.root, job.orders), finetune.distinct_orders, seed, job.recipe.grid))
    return OrdersOfOthers(tables, seed) if finetune.orders_of == "other_images" else tables


def _mixed_source(job: TrainingJob, mix: MixConfig, own: Manifest, cache: ShardCache, orders: StoredOrders | None) -> ShardSource:
    """Another folder of the mixture. Raises UserError for codes of another tokenizer.

    Args:
        orders: what its samples follow, in all of its views, of which it may have more than the run's own images.
    """
    manifest = read_manifest(mix.shards)
    if manifest.grid is None:  # pictures
        vq = load_vq(join(job.root, "tokenizers", "vq.safetensors"))
        return ShardSource(mix.shards, manifest, cache, mix.weight, orders, vq, job.recipe.tokenizer.views)
    if isinstance(orders, OneOrder):
        orders = replace(orders, views=tuple(range(len(manifest.views))))
    elif isinstance(orders, OrdersByKey):
        orders = replace(orders, views=max(orders.views, len(manifest.views)))
    if manifest.tokenizer_id != own.tokenizer_id:
        raise UserError(
            f"{mix.shards}: its codes are of the tokenizer {manifest.tokenizer_id}, the run's own are of {own.tokenizer_id}. "
            "Tokenise its images with the run's tokenizer (oar data tokenize)."
        )
    return ShardSource(mix.shards, manifest, cache, mix.weight, orders)
