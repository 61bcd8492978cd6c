"""The real extraction, killed ten times: drawings in all six views of recipes/emoji.yaml, with the model that ships with the recipes.

    python tests/chaos/emoji_chaos.py [--images 80] [--kills 10] [--seed 0]

A quarter of the kills each: the driver with all its actors, one actor, the second node, a request to stop (SIGTERM). In the end the
order tables are, byte for byte, those of one process that nobody disturbed. ``--images`` of the 3,953 drawings are taken, ten a shard.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from extraction_chaos import HERE, Cluster, Driver, after_tries, kill_an_actor
from pool_worker import NotedExtraction, tries

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import Recipe, SentencePieceConfig
from oar_scale.data.manifest import read_manifest, write_manifest
from oar_scale.data.pool import Ledger, Timing, run_pool
from oar_scale.data.prepare import prepare_images
from oar_scale.errors import Requeue
from oar_scale.orders.extraction import ExtractionSettings
from oar_scale.orders.pool import ExtractionJob, ExtractionWorker
from oar_scale.orders.table import table_name
from oar_scale.storage import join, open_storage

WEIGHTS = HERE.parents[1] / "recipes" / "weights" / "emoji"
VIEWS = 6
KINDS = ("driver", "actor", "node", "terminate")


def prepare(folder: str, images: int) -> Recipe:
    """Token shards of so many drawings, all views, by the tokenizer that ships."""
    from oar_scale.data.tokenize import token_manifest, tokenize_shard
    from oar_scale.tokenizers.vq import load_vq

    overrides = [f"data.source.limit={images}", "data.samples_per_shard=10", "data.heldout_fraction=0.1"]
    recipe = load_recipe(str(HERE.parents[1] / "recipes" / "emoji.yaml"), overrides)
    source, vq = prepare_images(recipe.data, join(folder, "images"))["train"], load_vq(str(WEIGHTS / "vq.safetensors"))
    assert len(recipe.tokenizer.views) == VIEWS
    places = join(folder, "images", "train"), join(folder, "tokens")
    shards = [tokenize_shard(*places, shard, vq, recipe.tokenizer.views, join(folder, "cache")) for shard in source.shards]
    write_manifest(places[1], token_manifest(shards, vq, recipe.tokenizer.views, source.attribution))
    return recipe


def job(folder: str, orders: str) -> ExtractionJob:
    """``folder`` holds the tokens; the text tokenizer is the one that ships."""
    text = SentencePieceConfig(max_tokens=16)
    return ExtractionJob(
        tokens=join(folder, "tokens"),
        orders=orders,
        model=str(WEIGHTS / "model.safetensors"),
        text=text,
        tokenizers=str(WEIGHTS),
        cache_dir=join(folder, "cache"),
        settings=ExtractionSettings(),
        batch=64,
        precision="bf16",
        views=VIEWS,
    )


def drive(told: dict[str, Any]) -> int:
    """A driver of two actors; prints its report."""
    work = job(told["folder"], told["orders"])
    shards = [shard.name for shard in read_manifest(work.tokens).shards]
    timing = Timing(beat_s=0.5, lease_s=10.0, look_s=0.5, grace_s=5.0)
    make = partial(NotedExtraction, work, told["log"])
    try:
        report = run_pool(make, shards, work.ledger, actors=2, timing=timing, what={"settings_id": work.settings_id})
    except Requeue:
        return 75
    print(json.dumps({"done": list(report.done), "poison": report.poison}), flush=True)
    return 0


def run(folder: str, root: str, images: int, kills: int, seed: int) -> Counter[str]:
    """Returns what happened.

    Raises:
        AssertionError: a table differs, or it does not end.
    """
    dice, happened, began = random.Random(seed), Counter[str](), time.monotonic()
    prepare(folder, images)
    calm, worker = join(folder, "calm"), ExtractionWorker(job(folder, join(folder, "calm")))
    shards = [shard.name for shard in worker.manifest.shards]
    for shard in shards:
        worker.run(shard)
    print(f"prepared and extracted undisturbed in {time.monotonic() - began:.0f} s: {len(shards)} shards", flush=True)
    orders, log, began = join(root, "orders"), join(folder, "log"), time.monotonic()
    Path(log).mkdir()
    cluster = Cluster(folder)
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    dice.shuffle(kinds)
    driver: Driver | None = None
    try:
        for kind in kinds:
            cluster.ready()
            if driver is None or not driver.running:
                driver = start(folder, orders, log, cluster)
                happened["drivers"] += 1
            after_tries(log, dice.randint(1, 2), [driver])
            time.sleep(dice.uniform(0, 2))
            if not driver.running and driver.end()[0] == 0:
                raise AssertionError(f"finished after {happened.total()} kills: take more --images")
            disturb(kind, driver, cluster, log, dice)
            happened[f"{kind} killed"] += 1
            print(f"{time.monotonic() - began:4.0f} s: {kind} killed; {len(Ledger(join(orders, 'ledger')).done())} shards done", flush=True)
        cluster.ready()
        code, report = (driver or start(folder, orders, log, cluster)).end()
        while code != 0:
            happened["drivers"] += 1
            code, report = start(folder, orders, log, cluster).end()
    finally:
        if driver is not None:
            driver.kill_group()
        cluster.close()
    assert report["done"] == shards and not report["poison"]
    for shard in shards:
        ours, theirs = (join(place, table_name(shard)) for place in (orders, calm))
        assert open_storage(ours).read(ours) == open_storage(theirs).read(theirs), f"{ours} differs from {theirs}"
    happened["shards"], happened["tries"] = len(shards), len(tries(log))
    happened["seconds"] = round(time.monotonic() - began)
    return happened


def start(folder: str, orders: str, log: str, cluster: Cluster) -> Driver:
    return Driver({"folder": folder, "orders": orders, "log": log}, cluster.address, __file__)


def disturb(kind: str, driver: Driver, cluster: Cluster, log: str, dice: random.Random) -> None:
    match kind:
        case "driver":
            driver.kill_group()
        case "actor":
            kill_an_actor(log, dice)
        case "node":
            cluster.kill_node()
        case "terminate":
            driver.process.send_signal(signal.SIGTERM)
    if kind in ("driver", "terminate"):
        driver.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        return drive(json.loads(arguments.drive))
    folder = tempfile.mkdtemp(prefix="oar-emoji-chaos-")
    happened = run(folder, join(folder, "killed"), arguments.images, arguments.kills, arguments.seed)
    shutil.rmtree(folder)
    print(f"\nevery table byte for byte as undisturbed: {', '.join(f'{name} {count}' for name, count in happened.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
