#!/usr/bin/env python3
"""Whole shards from S3: through ShardCache (cold and warm) against a bare boto3 ``get_object().read()`` of the same bytes.

    python tools/benchmarks/s3_reading.py              # starts a server on loopback: 8 objects of 64 MB, 7 rounds

The methods alternate, object by object, so that they meet the same load of the machine; the figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import boto3
from botocore.config import Config
from crc32c import crc32c

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for cluster/dev, which is not part of the package

from cluster.dev import s3
from oar_scale.runtime.program import program
from oar_scale.storage import join, open_storage
from oar_scale.storage.shard_cache import ShardCache

Object = tuple[str, int, int]
"""URI, bytes, crc32c."""


def compare_reading(objects: Sequence[Object], folder: str, rounds: int = 7) -> dict[str, float]:
    """Megabytes per second of each way to read ``objects``, and the ratio that counts.

    Args:
        folder: an empty folder for the cache.

    Returns:
        ``raw`` (boto3 as it comes), ``raw_unchecked`` (without its check of the server's checksum), ``cold`` and ``warm``
        (ShardCache, with crc32c checked, ``warm`` also in a fresh ShardCache), and the medians of the ratios of neighbours
        in time ``cold_to_raw`` and ``cold_to_raw_unchecked``.
    """
    raw = boto3.client("s3")
    unchecked = boto3.client("s3", config=Config(response_checksum_validation="when_required"))
    cache = ShardCache(folder)
    seconds: dict[str, list[float]] = {"raw": [], "raw_unchecked": [], "cold": [], "warm": []}
    sizes: list[int] = []
    for number in range(rounds):
        for item in objects:
            methods: dict[str, Callable[[], int]] = {
                "raw": lambda item=item: _get(raw, item),
                "raw_unchecked": lambda item=item: _get(unchecked, item),
                "cold": lambda item=item: len(cache.read(*item)),
                "warm": lambda item=item: len(ShardCache(folder).read(*item)),
            }
            for method, read in methods.items():
                begun = time.perf_counter()
                if read() != item[1]:
                    raise RuntimeError(f"{item[0]}: {method} did not bring {item[1]} bytes")
                if number:  # the first round opens connections and fills the server's caches
                    seconds[method].append(time.perf_counter() - begun)
            sizes += [item[1]] if number else []
            shutil.rmtree(folder)
    result = {
        method: statistics.median(size / took / 1e6 for size, took in zip(sizes, each, strict=True)) for method, each in seconds.items()
    }
    for base in ("raw", "raw_unchecked"):
        result[f"cold_to_{base}"] = statistics.median(b / c for b, c in zip(seconds[base], seconds["cold"], strict=True))
    return {name: round(value, 2) for name, value in result.items()}


def _get(client: object, item: Object) -> int:
    bucket, key = item[0].removeprefix("s3://").split("/", 1)
    return len(client.get_object(Bucket=bucket, Key=key)["Body"].read())  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=64, help="of each object")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oar-bench-") as scratch:
        server = s3.up(join(scratch, "s3"), s3.free_port())
        os.environ |= server.env
        try:
            objects = []
            for number in range(arguments.objects):
                data, uri = os.urandom(int(arguments.megabytes * 1e6)), f"s3://oar/bench/{number}.tar"
                open_storage(uri).write(uri, data)
                objects.append((uri, len(data), crc32c(data)))
            print(json.dumps(compare_reading(objects, join(scratch, "cache"), arguments.rounds), indent=2))
        finally:
            s3.down(join(scratch, "s3"))


if __name__ == "__main__":
    program(main)
