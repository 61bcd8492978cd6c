"""What the pool costs beside the work itself, and what a second actor is worth.

    python tools/benchmarks/pool.py overhead [--s3]      shards of exactly so much work: what comes on top, per shard and as a share
    python tools/benchmarks/pool.py actors               the real extraction with one actor and with two, in alternation

``overhead``: one actor; its worker reads a real token shard, sleeps ``--work`` seconds and writes a real order table, so that all other
time is the pool's and the storage's, whatever else the machine does. ``--s3``: also on a real S3 server on loopback.

``actors``: drawings, the tokenizers and the model in recipes/weights/emoji, bfloat16, a thread for each actor. Time starts when the first
actor has its model. ``by CPU time`` compares images per second that an actor *computed*: what is left of the factor two is the actors'
own contention for memory, without what other programs took from the cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, table

from oar_scale.runtime.program import program

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for cluster/dev
WEIGHTS = ROOT / "recipes" / "weights" / "emoji"
SAMPLES = 256


@dataclass
class Sleeper:
    """Reads a token shard, works exactly ``work_s`` seconds, writes an order table."""

    tokens: str
    orders: str
    cache: str
    log: str
    work_s: float

    def __post_init__(self) -> None:
        import oar_scale.data.shards  # noqa: F401 (takes seconds, which are not the first shard's)

    def run(self, shard: str, on_step: Callable[[], None]) -> Any:
        from oar_scale.data.shards import read_token_shard
        from oar_scale.orders.order_table import OrderTable, order_bytes, table_name
        from oar_scale.shard_pool import ShardOutput
        from oar_scale.storage import join

        keys = read_token_shard(join(self.tokens, shard), self.cache).keys
        time.sleep(self.work_s)
        order_SN = np.tile(np.arange(256, dtype=np.uint16), (len(keys), 1))
        score_SN = np.random.default_rng(0).random(order_SN.shape, dtype=np.float32)
        data = order_bytes(OrderTable(keys, [0] * len(keys), order_SN, score_SN, "none", "none"))
        with open(self.log, "a") as log:
            log.write(f"{time.process_time()}\n")  # from one shard to the next: all that this process does for a shard
        return ShardOutput(join(self.orders, table_name(shard)), data, {"images": len(keys)})


class Computer:
    """The real worker; notes for each shard how much it computed, and how much of that was the extraction itself."""

    def __init__(self, job: Any, log: str) -> None:
        self.worker, self.log, self.extracting = job.make_worker(), log, 0.0
        extract = self.worker._extract

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = extract(*arguments)
            self.extracting += time.perf_counter() - began
            return result

        self.worker._extract = timed

    def run(self, shard: str, on_step: Callable[[], None]) -> Any:
        self.extracting, began = 0.0, time.process_time()
        output = self.worker.run(shard, on_step)
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()} {output.result['images']} {time.process_time() - began} {self.extracting}\n")
        return output


@dataclass
class Measured:
    """One run of a pool."""

    seconds: float
    """From the first actor that was ready to the last shard."""
    images: int


def measured(make: Callable[[], Any], shards: list[str], ledger: str, actors: int) -> Measured:
    from oar_scale.shard_pool import run_pool

    ready: list[float] = []

    def event(kind: str, fields: dict[str, Any]) -> None:
        if kind == "actor_started":
            ready.append(time.perf_counter())

    ended: list[float] = []
    report = run_pool(make, shards, ledger, actors=actors, on_event=event, on_progress=lambda *_: ended.append(time.perf_counter()))
    report.raise_for_poison()
    assert not report.failures, report.failures
    return Measured(ended[-1] - ready[0], sum(result["images"] for result in report.done.values()))


# -- what the pool costs -----------------------------------------------------------------------------------------------------


def overhead(arguments: argparse.Namespace) -> None:
    from oar_scale.data.shards import shard_name, token_sample, write_shard
    from oar_scale.runtime.ray_session import ray_session
    from oar_scale.storage import join

    names = [shard_name(index) for index in range(arguments.shards)]
    rows = []
    with tempfile.TemporaryDirectory() as scratch, roots_by_storage(scratch, arguments.s3) as roots, ray_session(cpus=1):
        for storage, root in roots.items():
            codes = np.random.default_rng(0).integers(0, 16384, (SAMPLES, 1, 256), dtype=np.uint16)
            for shard in names:
                samples = (token_sample({"__key__": f"{row:05d}", "txt": "a thing"}, codes[row]) for row in range(SAMPLES))
                write_shard(join(root, "tokens"), shard, samples)
            costs, computed = [], []
            for number in range(arguments.rounds):
                orders, log, began = join(root, f"orders-{number}"), f"{scratch}/log-{storage}-{number}", time.process_time()
                make = partial(Sleeper, join(root, "tokens"), orders, f"{scratch}/cache-{storage}-{number}", log, arguments.work)
                run = measured(make, names, join(orders, "ledger"), 1)
                costs.append(1000 * (run.seconds / len(names) - arguments.work))
                at = [float(line) for line in Path(log).read_text().splitlines()]
                computed.append(1000 * ((at[-1] - at[0]) / (len(at) - 1) + (time.process_time() - began) / len(names)))
            middle = statistics.median(costs)
            share = middle / (1000 * arguments.work + middle)
            spread, cpu = f"{min(costs):.0f} to {max(costs):.0f}", f"{statistics.median(computed):.0f}"
            rows.append([storage, f"{middle:.0f}", spread, f"{100 * share:.2f} %", cpu])
    what = f"{arguments.shards} shards of {SAMPLES} samples of 256 cells, {arguments.work} s of work each, {arguments.rounds} rounds"
    print(f"{what}; {machine('cpu', 1)}; {load()}\n")
    head = ["storage", "ms a shard beside the work, median", "of the rounds", "share of the actor's time", "ms of CPU, actor and driver"]
    print(table(head, rows))


@contextmanager
def roots_by_storage(scratch: str, with_s3: bool) -> Iterator[dict[str, str]]:
    if not with_s3:
        yield {"folder": f"{scratch}/run"}
        return
    from cluster.dev import s3

    server = s3.up(f"{scratch}/s3", s3.free_port(), "bench")
    os.environ |= server.env
    try:
        yield {"folder": f"{scratch}/run", "S3 on loopback": "s3://bench/run"}
    finally:
        s3.down(f"{scratch}/s3")


# -- what a second actor is worth --------------------------------------------------------------------------------------------------


def actors(arguments: argparse.Namespace) -> None:
    from oar_scale.runtime.ray_session import ray_session

    with tempfile.TemporaryDirectory() as folder, ray_session(cpus=2):
        job, shards = prepare(folder, arguments.images)
        rates: dict[int, list[float]] = {1: [], 2: []}
        by_cpu: dict[int, list[float]] = {1: [], 2: []}
        beside: list[float] = []
        for number in range(arguments.rounds):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                print(f"round {number + 1} of {arguments.rounds}: {count} actors, {load()}", file=sys.stderr, flush=True)
                orders, log = f"{folder}/orders-{number}-{count}", f"{folder}/log-{number}-{count}"
                run = measured(partial(Computer, job(orders), log), shards, f"{orders}/ledger", count)
                notes = [[float(word) for word in line.split()] for line in Path(log).read_text().splitlines()]
                rates[count].append(run.images / run.seconds)
                by_cpu[count].append(count * sum(note[1] for note in notes) / sum(note[2] for note in notes))
                if count == 1:
                    beside.append(1 - sum(note[3] for note in notes) / run.seconds)
    rows = []
    for name, by_count in (("by the clock", rates), ("by CPU time", by_cpu)):
        ratios = [two / one for one, two in zip(by_count[1], by_count[2], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([name, *(f"{statistics.median(by_count[count]):.1f}" for count in (1, 2)), f"{statistics.median(ratios):.2f}", spread])
    print(f"{arguments.images} drawings, {len(shards)} shards, {arguments.rounds} rounds; {machine('cpu', 1)}; {load()}\n")
    print(table(["images/s", "one actor", "two actors", "ratio, median", "of the rounds"], rows))
    print(f"\nOne actor's time outside the extraction itself (reading, writing, ledger, waiting): {100 * statistics.median(beside):.2f} %")


def prepare(folder: str, images: int) -> tuple[Callable[[str], Any], list[str]]:
    """Token shards of so many drawings; a function from an output folder to the job."""
    from oar_scale.config.loading import load_recipe
    from oar_scale.config.schema import SentencePieceConfig
    from oar_scale.data.manifest import write_manifest
    from oar_scale.data.prepare import prepare_images
    from oar_scale.data.tokenize import token_manifest, tokenize_shard
    from oar_scale.orders.settings import ExtractionSettings
    from oar_scale.shard_pool.extraction_pool import ExtractionJob
    from oar_scale.tokenizers.vq import load_vq

    overrides = [f"data.source.limit={images}", "data.samples_per_shard=64"]
    recipe = load_recipe(str(ROOT / "recipes" / "quickstart-from-scratch.yaml"), overrides)
    source, vq, views = prepare_images(recipe.data, f"{folder}/images")["train"], load_vq(str(WEIGHTS / "vq.safetensors")), ("center",)
    infos = [tokenize_shard(f"{folder}/images/train", f"{folder}/tokens", shard, vq, views, f"{folder}/cache") for shard in source.shards]
    infos = [info for info in infos if info.samples == 64]  # of one size, so that no actor ends early
    infos = infos[: len(infos) // 2 * 2]
    write_manifest(f"{folder}/tokens", token_manifest(infos, vq, views, source.attribution))

    def job(orders: str) -> ExtractionJob:
        text = SentencePieceConfig(max_tokens=24)
        locations = {
            "tokens": f"{folder}/tokens",
            "orders": orders,
            "model": str(WEIGHTS / "model.safetensors"),
            "tokenizers": str(WEIGHTS),
        }
        return ExtractionJob(**locations, text=text, cache_dir=f"{folder}/cache", settings=ExtractionSettings(), batch=64, precision="bf16")

    return job, [info.name for info in infos]


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True)
    one = what.add_parser("overhead")
    one.add_argument("--work", type=float, default=2.0, help="seconds of work of a shard")
    one.add_argument("--shards", type=int, default=8)
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--s3", action="store_true")
    one.set_defaults(run=overhead)
    two = what.add_parser("actors")
    two.add_argument("--images", type=int, default=600)
    two.add_argument("--rounds", type=int, default=3)
    two.set_defaults(run=actors)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}  # or whatever else runs here comes first
    arguments.run(arguments)


if __name__ == "__main__":
    program(main)
