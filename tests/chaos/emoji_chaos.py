"""The real extraction, killed ten times: OpenMoji drawings in six views, with the model that ships with the recipes.

    python tests/chaos/emoji_chaos.py [--images 160] [--kills 10] [--seed 0] [--compare N]

A quarter of the kills each: the driver with all its actors, one actor, the second node, a request to stop (SIGTERM), spread over the
shards there are to do. In the end every shard is in the ledger and has a whole table, and the tables are, byte for byte, those of one
process that nobody disturbed. ``--images`` of the 3,953 drawings are taken (0: all), without those held out, ten a shard. A core takes
tens of seconds for a shard: with ``--compare N``, only those that were tried more than once, and N others, are extracted again undisturbed.
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

from pool_chaos import HERE, Cluster, Driver, after_tries, begin, kill_an_actor
from pool_worker import NotedExtraction, tries

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import Recipe, SentencePieceConfig
from oar_scale.data.manifest import read_manifest, write_manifest
from oar_scale.data.prepare import prepare_images
from oar_scale.errors import Requeue
from oar_scale.orders.order_table import read_orders, table_name
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.runtime.program import program_exit
from oar_scale.shard_pool import Ledger, Timing, run_pool
from oar_scale.shard_pool.extraction_pool import ExtractionJob, ExtractionWorker
from oar_scale.shard_pool.ledger import Record
from oar_scale.storage import join, open_storage

WEIGHTS = HERE.parents[1] / "recipes" / "weights" / "emoji"
VIEWS = 6
KINDS = ("driver", "actor", "node", "terminate")
REPORT_S = 60.0
"""Between lines about what is done."""
SHARD_S = 10.0
"""A kill comes so long after a shard was begun, at most: about what one takes."""


def prepare(folder: str, images: int) -> Recipe:
    """Token shards of so many drawings (0: all), all views, by the tokenizer that ships."""
    from oar_scale.data.tokenize import token_manifest, tokenize_shard
    from oar_scale.tokenizers.vq import load_vq

    overrides = ["data.samples_per_shard=10", "data.heldout_fraction=0.1", *([f"data.source.limit={images}"] if images else [])]
    recipe = load_recipe(str(HERE.parents[1] / "recipes" / "quickstart-from-scratch.yaml"), overrides)
    source, vq = prepare_images(recipe.data, join(folder, "images"))["train"], load_vq(str(WEIGHTS / "vq.safetensors"))
    assert len(recipe.tokenizer.views) == VIEWS
    locations = join(folder, "images", "train"), join(folder, "tokens")
    shards = [tokenize_shard(*locations, shard, vq, recipe.tokenizer.views, join(folder, "cache")) for shard in source.shards]
    write_manifest(locations[1], token_manifest(shards, vq, recipe.tokenizer.views, source.attribution))
    return recipe


def job(folder: str, orders: str) -> ExtractionJob:
    """``folder`` holds the tokens; the text tokenizer is the one that ships."""
    text = SentencePieceConfig(max_tokens=24)
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


def drive(settings: dict[str, Any]) -> int:
    """A driver of two actors; prints its report."""
    begin(settings)
    work = job(settings["folder"], settings["orders"])
    shards = [shard.name for shard in read_manifest(work.tokens).shards]
    timing = Timing(heartbeat_s=0.5, lease_s=10.0, poll_s=0.5, grace_s=5.0)
    make = partial(NotedExtraction, work, settings["log"])

    def note(kind: str, fields: Record) -> None:
        with events(settings["log"]).open("a") as file:
            file.write(json.dumps({**fields, "kind": kind}) + "\n")

    try:
        # Every kill may hit the same shard: that alone must not set it aside.
        what = {"settings_id": work.settings_id}
        report = run_pool(make, shards, work.ledger, actors=2, max_retries=settings["kills"], timing=timing, config=what, on_event=note)
    except Requeue:
        return 75
    print(json.dumps({"done": list(report.done), "poison": report.poison}), flush=True)
    return 0


def events(log: str) -> Path:
    """The events of the pools, a line each."""
    return Path(log, "events.jsonl")


class Killing:
    """One extraction, from its first driver to its end."""

    def __init__(self, folder: str, root: str, kills: int, seed: int) -> None:
        self.folder, self.orders, self.log = folder, join(root, "orders"), join(folder, "log")
        Path(self.log).mkdir()
        self.dice, self.kills, self.happened = random.Random(seed), kills, Counter[str]()
        self.shards = [shard.name for shard in read_manifest(join(folder, "tokens")).shards]
        self.ledger = Ledger(job(folder, self.orders).ledger)
        self.began, self.reported = time.monotonic(), time.monotonic()
        self.cluster = Cluster(folder)
        self.driver: Driver | None = None

    def go(self) -> None:
        """Kill and restart until all is done.

        Raises:
            AssertionError: it does not end, or not well.
        """
        kinds = [KINDS[number % len(KINDS)] for number in range(self.kills)]
        self.dice.shuffle(kinds)
        try:
            for kind in kinds:
                if not self._kill(kind):
                    self.report(f"finished before the other kills ({kind}, ...) came")
                    break
            driver = self._running()
            while driver.running:
                self._now_and_then()
                time.sleep(0.2)
            code, report = driver.end()
            assert code == 0, f"exit code {code} though nobody disturbed it any more"
        finally:
            if self.driver is not None:
                self.driver.kill_group()
            self.cluster.close()
        assert report["done"] == self.shards and not report["poison"], report
        self.happened["seconds"] = round(time.monotonic() - self.began)

    def _kill(self, kind: str) -> bool:
        """False if the pool finished first."""
        self.cluster.ready()
        hit = 0
        while not hit:
            driver = self._running()
            left = len(self.shards) - len(self.ledger.done())
            # About half of the shards are done when the last kill comes.
            after_tries(self.log, self.dice.randint(1, max(1, left // self.kills)), [driver], self._now_and_then)
            time.sleep(self.dice.uniform(0, SHARD_S))
            if not driver.running:
                return False
            match kind:
                case "driver":
                    driver.kill_group()
                case "node":
                    self.cluster.kill_node()
                case "terminate":
                    driver.process.send_signal(signal.SIGTERM)
            hit = kill_an_actor(self.log, self.dice) if kind == "actor" else 1
        if kind in ("driver", "terminate"):
            self.driver = None
            driver.end()
        self.happened[f"{kind} killed"] += hit
        self.report(f"{kind} killed")
        return True

    def _running(self) -> Driver:
        if self.driver is None:
            settings = {"folder": self.folder, "orders": self.orders, "log": self.log, "kills": self.kills}
            self.driver = Driver(__file__, settings, self.cluster.ray.env)
            self.happened["drivers"] += 1
        return self.driver

    def report(self, what: str) -> None:
        self.reported = time.monotonic()
        done = f"{len(self.ledger.done())} of {len(self.shards)} shards done, {len(tries(self.log))} tries"
        print(f"{self.reported - self.began:5.0f} s: {what}; {done}", flush=True)

    def _now_and_then(self) -> None:
        if time.monotonic() - self.reported > REPORT_S:
            self.report("going on")


def run(folder: str, root: str, images: int, kills: int, seed: int, compare: int | None = None) -> Counter[str]:
    """Returns what happened.

    Args:
        compare: compare the shards that were tried more than once and so many others; None: all.

    Raises:
        AssertionError: a table differs, or it does not end.
    """
    began = time.monotonic()
    prepare(folder, images)
    killing = Killing(folder, root, kills, seed)
    print(f"prepared in {time.monotonic() - began:.0f} s: {len(killing.shards)} shards", flush=True)
    killing.go()
    killing.report("finished")
    happened, shards, tried = killing.happened, killing.shards, Counter(tries(killing.log))
    assert sorted(killing.ledger.done()) == sorted(shards) == sorted(tried)
    samples = 0
    for shard, entry in killing.ledger.entries(shards).items():
        views = read_orders(join(killing.orders, table_name(shard))).views
        assert views == list(range(VIEWS)) * entry.result["images"], f"{shard}: not all views"
        samples += entry.result["images"]
    again = [shard for shard in shards if tried[shard] > 1]
    once = [shard for shard in shards if tried[shard] == 1]
    others = once if compare is None else killing.dice.sample(once, min(compare, len(once)))
    worker, compared = ExtractionWorker(job(folder, join(folder, "calm"))), [*again, *others]
    for number, shard in enumerate(compared):
        ours, theirs = join(killing.orders, table_name(shard)), worker.run(shard, lambda: None)
        assert open_storage(ours).read(ours) == theirs.data, f"{ours} differs from what a calm process makes"
        if time.monotonic() - killing.reported > REPORT_S:
            killing.report(f"{number + 1} of {len(compared)} tables compared, all alike")
    happened |= {"drawings": samples, "orders": samples * VIEWS, "shards": len(shards), "tries": tried.total()}
    happened |= {"shards tried more than once": len(again), "tables compared": len(compared)}
    kinds = [json.loads(line)["kind"] for line in events(killing.log).read_text().splitlines()]
    happened.update(f"event {kind}" for kind in kinds)
    return happened


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160, help="drawings to take; 0: all")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=int, metavar="N", help="compare what was tried more than once, and N others; default: all")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        return drive(json.loads(arguments.drive))
    folder = tempfile.mkdtemp(prefix="oar-emoji-chaos-")
    try:
        happened = run(folder, join(folder, "killed"), arguments.images, arguments.kills, arguments.seed, arguments.compare)
    except AssertionError as error:
        print(f"FAILED, everything is in {folder}: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print("\nevery shard once, every table that was compared byte for byte as undisturbed")
    for name, count in sorted(happened.items()):
        print(f"  {count:6} {name}")
    return 0


if __name__ == "__main__":
    with program_exit():
        sys.exit(main())
