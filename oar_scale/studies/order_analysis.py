"""``oar orders``: what the extracted orders look like.

OUT/index.html   one page with everything      OUT/orders.json    all numbers
OUT/appearing.webp, OUT/appearing.gif          images that appear in their order
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.config.schema import LabelsConfig
from oar_scale.data.hashing import permutations
from oar_scale.data.manifest import ShardInfo, read_manifest
from oar_scale.data.open_shard import TokenShard
from oar_scale.data.shards import read_token_shard
from oar_scale.errors import UserError
from oar_scale.evaluation.animation import animated, appearing
from oar_scale.evaluation.pictures import decode_pictures
from oar_scale.orders.analysis import choice_entropy, describe_orders, kendall_distance, mean_time_map, placing_times
from oar_scale.orders.analysis.agreement import Agreement, agreement
from oar_scale.orders.analysis.analysis_values import OrderAnalysis
from oar_scale.orders.analysis.caption_groups import Group, caption_words, groups, most_deviating
from oar_scale.orders.order_files import head_report_file
from oar_scale.orders.order_table import OrderTable, join_orders, read_orders, table_name
from oar_scale.orders.policies import grid_policies
from oar_scale.orders.policies.mean import order_by_time
from oar_scale.report.orders_page import render_orders
from oar_scale.results.examples import OrderExample
from oar_scale.run.artifacts import require, require_any_order
from oar_scale.run.context import Run
from oar_scale.storage import Missing, join, open_storage
from oar_scale.studies.order_head import read_report
from oar_scale.tokenizers.vq import load_vq

EXAMPLES, COLUMNS = 12, 6
GROUPS = 12
"""Words or classes shown, of the frequent ones and of the deviating ones."""
SMALLEST_GROUP, GROUP_SHARE = 8, 0.005
"""Images, and share of the images, that a word or class must have."""


@dataclass(frozen=True)
class Extracted:
    """Some training images with the orders that were extracted for them."""

    shards: list[ShardInfo]
    keys: list[list[str]]
    """Of each shard."""
    captions: list[str]
    names_of: list[list[str]]
    """The words of each image's caption, or its class."""
    codes_EN: NDArray[np.int64]
    """Of the first few images."""
    order_SN: NDArray[np.uint16]
    step_score_N: NDArray[np.float64]
    model_id: str
    settings_id: str


def run_orders(run: Run, *, images: int, against: Sequence[str] = (), out: str | None = None) -> str:
    """Analyse the orders of about ``images`` training images: whole shards, spread evenly over the data set.

    Args:
        against: other folders of order tables of the same images: of another seed, score or checkpoint.
        out: the folder that is written; default ``report/orders`` in the run's local folder.

    Returns:
        The location of the page.

    Raises:
        UserError: a stage before this one has not finished, or tables that are not of these images.
    """
    require_any_order(run)
    extracted = _extracted(run, images)
    examples, animation, gif = _examples(run, extracted)
    analysis = _analysis(run, extracted, [_agreement(run, extracted, folder) for folder in against], examples, animation)
    out = out or run.local("report", "orders")
    files = {"orders.json": json.dumps(analysis.numbers(), indent=1).encode(), "appearing.webp": animation, "appearing.gif": gif}
    for name, data in files.items():
        if data:
            open_storage(out).write(join(out, name), data)
    page = join(out, "index.html")
    open_storage(out).write(page, render_orders(analysis).encode())
    run.console.say(f"  orders: {page}")
    return page


def _extracted(run: Run, images: int) -> Extracted:
    folder = run.at("tokens", "train")
    require(run, join(folder, "manifest.json"), "tokens")
    shards = spread(read_manifest(folder).shards, images)
    opened = [read_token_shard(join(folder, info.name), run.cache, info, cache_bytes=run.recipe.storage.cache_bytes) for info in shards]
    tables = [_table(run, info) for info in shards]
    made_by = {(table.model_id, table.settings_id) for table in tables}
    if len(made_by) != 1:
        raise UserError(f"{run.at('orders', 'train')}: orders of several models or settings: {sorted(made_by)}. Extract them again.")
    ((model_id, settings_id),) = made_by
    labels = isinstance(run.recipe.tokenizer.text, LabelsConfig)
    captions = [caption for shard in opened for caption in shard.captions]
    return Extracted(
        shards=shards,
        keys=[shard.keys for shard in opened],
        captions=captions,
        names_of=_classes(opened) if labels else [caption_words(caption) for caption in captions],
        codes_EN=np.concatenate([shard.view(0)[:EXAMPLES] for shard in opened])[:EXAMPLES].astype(np.int64),
        order_SN=np.concatenate([_joined(run, info, shard.keys, table) for info, shard, table in zip(shards, opened, tables, strict=True)]),
        step_score_N=np.concatenate([_first_scores(table) for table in tables]).mean(axis=0, dtype=np.float64),
        model_id=model_id,
        settings_id=settings_id,
    )


def spread(shards: Sequence[ShardInfo], images: int) -> list[ShardInfo]:
    """Choose whole shards with about so many images, evenly from the first to the last."""
    mean = max(1.0, sum(shard.samples for shard in shards) / len(shards))
    count = min(len(shards), int(np.ceil(images / mean)))
    chosen = np.linspace(0, len(shards) - 1, count).round().astype(int)
    return [shards[index] for index in dict.fromkeys(chosen.tolist())]


def _classes(opened: Sequence[TokenShard]) -> list[list[str]]:
    return [[f"class {label}"] for shard in opened for label in shard.prompts("label")]


def _table(run: Run, info: ShardInfo) -> OrderTable:
    return read_orders(require(run, run.at("orders", "train", table_name(info.name)), "extract"))


def _joined(run: Run, info: ShardInfo, keys: list[str], table: OrderTable) -> NDArray[np.uint16]:
    """The first order of each image [S, N]."""
    return join_orders(keys, table, shard=join(run.at("tokens", "train"), info.name), cells=run.recipe.grid**2)[:, 0]


def _first_scores(table: OrderTable) -> NDArray[np.float32]:
    """The scores of the first order of each image: view 0, draw 0."""
    draws = table.draws or [0] * len(table.views)
    return table.score_SN[[view == draw == 0 for view, draw in zip(table.views, draws, strict=True)]]


def _agreement(run: Run, extracted: Extracted, folder: str) -> Agreement:
    others = []
    for info, keys in zip(extracted.shards, extracted.keys, strict=True):
        try:
            others.append(_joined(run, info, keys, read_orders(join(folder, table_name(info.name)))))
        except Missing as error:
            raise UserError(f"{error.uri}: missing. --against names a folder with order tables of this run's token shards.") from error
    return agreement(folder, extracted.order_SN, np.concatenate(others), run.recipe.grid)


def _examples(run: Run, extracted: Extracted) -> tuple[tuple[OrderExample, ...], bytes, bytes]:
    """The first few images, and the two animations of them."""
    if not open_storage(run.vq_uri).exists(run.vq_uri):
        return (), b"", b""
    pictures = decode_pictures(load_vq(run.vq_uri), torch.from_numpy(extracted.codes_EN))
    order_EN, grid = extracted.order_SN[: len(pictures)], run.recipe.grid
    maps = placing_times(order_EN).reshape(-1, grid, grid)
    frames = appearing(pictures, order_EN, COLUMNS)
    examples = tuple(OrderExample(*each) for each in zip(extracted.captions, pictures, maps, strict=False))
    return examples, animated(frames, "WEBP"), animated(frames, "GIF")


def _analysis(
    run: Run, extracted: Extracted, agreements: list[Agreement], examples: tuple[OrderExample, ...], animation: bytes
) -> OrderAnalysis:
    recipe, grid, order_SN = run.recipe, run.recipe.grid, extracted.order_SN
    random_SN = permutations("orders to compare with", grid * grid, recipe.seed, np.arange(len(order_SN)))
    frequent, deviating = _groups(extracted, grid)
    return OrderAnalysis(
        recipe_name=recipe.name,
        where=run.at("orders", "train"),
        model_id=extracted.model_id,
        settings_id=extracted.settings_id,
        score=recipe.extract.score,
        all_images=read_manifest(run.at("tokens", "train")).samples,
        grid=grid,
        statistics=describe_orders(order_SN, grid),
        random=describe_orders(random_SN, grid),
        time_map=mean_time_map(order_SN, grid),
        choice_entropy=choice_entropy(order_SN),
        random_choice_entropy=choice_entropy(random_SN),
        step_score=extracted.step_score_N,
        distances=_distances(order_SN, grid),
        frequent=frequent,
        deviating=deviating,
        agreements=tuple(agreements),
        examples=examples,
        head=read_report(head_report_file(run.model_uri("any_order")), extracted.settings_id),
        animation=animation,
    )


def _distances(order_SN: NDArray[np.uint16], grid: int) -> dict[str, float]:
    paths: dict[str, NDArray[np.integer]] = {name: policy.path(grid) for name, policy in grid_policies().items()}
    paths["mean"] = order_by_time(placing_times(order_SN).mean(axis=0))
    return {name: float(kendall_distance(order_SN, path).mean()) for name, path in paths.items()}


def _groups(extracted: Extracted, grid: int) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """The frequent ones and the deviating ones."""
    least = max(SMALLEST_GROUP, round(GROUP_SHARE * len(extracted.order_SN)))
    every = groups(extracted.order_SN, grid, extracted.names_of, least)
    return tuple(every[:GROUPS]), tuple(most_deviating(every, GROUPS))
