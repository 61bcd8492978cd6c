"""Shards on a storage and the files of their cache, for tests of :mod:`oar_scale.storage.shard_cache`."""

from __future__ import annotations

import multiprocessing
import os
import random
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from crc32c import crc32c

from oar_scale.storage import join, open_storage

PART = 128 << 10
SIZE = 300_000
PARTS = 3
SOON_S = 6.0
"""A patience with a silent connection that a test can wait for, and yet above what a busy machine needs to answer."""
FORK = multiprocessing.get_context("fork")


class Shard(NamedTuple):
    """Unpacks to the arguments of ``read``."""

    uri: str
    size: int
    crc32c: int


def content(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def put(root: str, data: bytes) -> Shard:
    uri = join(root, f"{uuid.uuid4().hex}.tar")
    open_storage(uri).write(uri, data)
    return Shard(uri, len(data), crc32c(data))


def files(folder: str, suffix: str = ".shard") -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(suffix))


def in_processes(works: list[Callable[[], Any]]) -> list[Any]:
    """What each returns, each in a fork of its own, all at once."""
    pipes = []
    for work in works:
        here, there = FORK.Pipe(duplex=False)
        process = FORK.Process(target=lambda work=work, there=there: there.send(work()), daemon=True)
        process.start()
        there.close()
        pipes.append((here, process))
    results = [here.recv() for here, _ in pipes]
    for _, process in pipes:
        process.join()
    return results
