"""How fast training batches come, beside other loaders reading the same samples, and how much memory that takes.

    python tools/benchmarks/stream.py                        token shards on the local disk: ours, plain webdataset, MosaicML streaming
    python tools/benchmarks/stream.py --memory               private memory of a process over an epoch

Samples: codes uint16 [2, 256], a caption, a small JSON. Every loader decodes codes and caption, shuffles, and makes batches of int64
codes [256, 256] of a random view with their captions, in one process. MosaicML streaming (``pip install mosaicml-streaming``) reads
samples of its own format, written from the same arrays; without the package it is left out. Sides run in fresh processes, in alternation.
Reading from S3 is measured by ``s3_reading.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import alternate, in_fresh_process, machine, median_ratio, table

from oar_scale.runtime.program import program

if TYPE_CHECKING:
    from torch import Tensor

BATCH, VIEWS, CELLS = 256, 2, 256
STREAMS, WINDOW = 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--shards", type=int, default=48)
    parser.add_argument("--samples", type=int, default=2000, help="samples of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/tokens"
        write_shards(folder, arguments.shards, arguments.samples)
        if arguments.memory:
            print(memory_report(run_side("memory", folder)))
        else:
            sides = ["ours", "webdataset"]
            if write_mds(f"{scratch}/mds", arguments.shards * arguments.samples):
                sides.append("MosaicML streaming")
            compare(scratch, sides, arguments)


def compare(folder: str, sides: Sequence[str], arguments: argparse.Namespace) -> None:
    results = alternate(sides, arguments.rounds, lambda side: run_side(side, folder))
    rates = {side: [run["rate"] for run in runs] for side, runs in results.items()}
    rows = [
        [side, f"{statistics.median(rates[side]):,.0f}", f"{median_ratio(rates[sides[0]], rates[side]):.2f}" if side != sides[0] else ""]
        for side in sides
    ]
    print(f"{arguments.shards} shards of {arguments.samples} samples, median of {arguments.rounds} rounds; {machine('cpu', 1)}\n")
    print(table(["loader", "samples/s", f"{sides[0]} / it"], rows))


def run_side(side: str, folder: str) -> dict[str, Any]:
    return in_fresh_process(__file__, ["--side", side, "--folder", folder], threads=1)


# -- the samples --------------------------------------------------------------------------------------------------------


def samples(count: int) -> Iterator[tuple[Any, str]]:
    import numpy as np

    noise = np.random.default_rng(0)
    for index in range(count):
        yield (
            noise.integers(0, 16384, (VIEWS, CELLS), dtype=np.uint16),
            f"a picture of the thing number {index} on a wooden table by the sea",
        )


def write_shards(folder: str, shards: int, each: int) -> None:
    from oar_scale.data.manifest import Manifest, write_manifest
    from oar_scale.data.shards import shard_name, token_sample, write_shard

    source, infos = samples(shards * each), []
    for shard in range(shards):
        written = []
        for row in range(each):
            codes, caption = next(source)
            written.append(token_sample({"__key__": f"{shard:05d}{row:05d}", "txt": caption, "json": b'{"label": 3}'}, codes))
        infos.append(write_shard(folder, shard_name(shard), written))
    write_manifest(folder, Manifest(shards=tuple(infos), grid=16, vocab_size=16384, views=("center", "center_flip")))


def write_mds(folder: str, count: int) -> bool:
    """The same samples in MosaicML's format; False without the package."""
    try:
        from streaming import MDSWriter
    except ImportError:
        print("mosaicml-streaming is not installed: left out", file=sys.stderr)
        return False
    columns = {"codes": f"ndarray:uint16:{VIEWS},{CELLS}", "caption": "str"}
    with MDSWriter(out=folder, columns=columns) as writer:
        for codes, caption in samples(count):
            writer.write({"codes": codes, "caption": caption})
    return True


# -- the sides ------------------------------------------------------------------------------------------------------------


class Captions:
    """A prompt encoder that keeps the decoded captions and encodes nothing, as the other loaders do."""

    field = "txt"
    max_tokens = vocab_size = 1

    def encode(self, prompts: Sequence[str]) -> Tensor:
        import torch

        self.last = list(prompts)
        return torch.zeros(len(prompts), 1, dtype=torch.long)


def our_stream(folder: str, cache: str) -> Any:
    from oar_scale.data.manifest import read_manifest
    from oar_scale.data.shard_source import ShardSource
    from oar_scale.data.stream import StreamSettings, TokenStream
    from oar_scale.storage.shard_cache import ShardCache

    settings = StreamSettings(seed=0, global_batch=BATCH, streams=STREAMS, window_shards=WINDOW, caption_dropout=0.0)
    return TokenStream(ShardSource(folder, read_manifest(folder), ShardCache(cache)), Captions(), settings)


def rate(batches: Iterator[Any], size: Callable[[Any], int]) -> dict[str, float]:
    """Samples a second over an epoch, the first batch (opening, filling buffers) included."""
    began, seen = time.perf_counter(), 0
    for batch in batches:
        seen += size(batch)
    return {"rate": seen / (time.perf_counter() - began), "samples": seen}


def ours(scratch: str) -> dict[str, float]:
    stream = our_stream(f"{scratch}/tokens", f"{scratch}/cache")
    return rate(stream.batches(0, stream.plan.per_epoch // BATCH), lambda batch: len(batch.codes_bN))


def plain_webdataset(scratch: str) -> dict[str, float]:
    import random

    import numpy as np
    import torch
    import webdataset

    def batch(rows: list[tuple[Any, str]]) -> tuple[Tensor, list[str]]:
        codes = np.stack([codes[random.randrange(VIEWS)] for codes, _ in rows])
        return torch.from_numpy(codes.astype(np.int64)), [caption for _, caption in rows]

    urls = sorted(str(path) for path in Path(scratch, "tokens").glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(5000).decode().to_tuple("codes.npy", "txt")
    return rate(iter(dataset.batched(BATCH, collation_fn=batch)), lambda each: len(each[0]))


def mosaic_streaming(scratch: str) -> dict[str, float]:
    import random

    import numpy as np
    import torch
    from streaming import StreamingDataset

    def batches() -> Iterator[Tensor]:
        rows: list[Any] = []
        captions: list[str] = []
        for sample in StreamingDataset(local=f"{scratch}/mds", shuffle=True, batch_size=BATCH, shuffle_block_size=16_000):
            rows.append(sample["codes"][random.randrange(VIEWS)])
            captions.append(sample["caption"])
            if len(rows) == BATCH:
                yield torch.from_numpy(np.stack(rows).astype(np.int64))
                rows, captions = [], []

    return rate(batches(), len)


def memory(folder: str) -> dict[str, Any]:
    import psutil

    stream = our_stream(folder, f"{folder}/cache")
    steps = stream.plan.per_epoch // BATCH
    process, used, open_shards = psutil.Process(), [], []
    for batch in stream.batches(0, 2 * steps):
        if batch.step % max(1, steps // 8) == 0:
            used.append((batch.step, process.memory_full_info().uss / 2**20))
            open_shards.append(len(stream.shards[0]._open))
    return {"steps": steps, "used": used, "open": max(open_shards), "bound": STREAMS * WINDOW + 2}


def memory_report(result: dict[str, Any]) -> str:
    rows = [[step, f"{mib:.0f}"] for step, mib in result["used"]]
    head = f"an epoch has {result['steps']} steps; at most {result['open']} shards open (bound: {result['bound']})\n\n"
    return head + table(["step", "private memory, MiB"], rows)


SIDES: dict[str, Callable[[str], dict[str, Any]]] = {
    "ours": ours,
    "webdataset": plain_webdataset,
    "MosaicML streaming": mosaic_streaming,
    "memory": memory,
}


if __name__ == "__main__":
    program(main)
