"""Bytes and requests to the storage for shards, checkpoints and order tables."""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.config.schema import ClipTextConfig, FeaturesConfig, LabelsConfig, Recipe
from oar_scale.model.spec import FeatureSpec, ModelSpec
from oar_scale.planning.shape import parameters

TAR, RECORD = 512, 10240
"""Blocks of a tar, and of its end."""
NPY = 128
"""Header of a .npy file of a small array."""
CAPTION = 64
"""Bytes taken for a caption; up to 512 it is one block."""
PART = 16 << 20
"""Bytes of one ranged GET and of one part of an upload (``storage/s3_download.py``, ``storage/s3.py``); a test compares them."""
MULTIPART = 32 << 20
"""Larger files are uploaded in parts."""
LISTED = 1000
"""Names in one answer of S3 to a listing."""


@dataclass(frozen=True)
class ShardTraffic:
    """Size of a token shard, and the requests that read it."""

    samples: int
    bytes: int

    @property
    def sample(self) -> float:
        """Bytes for each sample."""
        return self.bytes / self.samples

    @property
    def gets(self) -> int:
        """Requests that read it."""
        return -(-self.bytes // PART)


def token_shard(recipe: Recipe, spec: ModelSpec) -> ShardTraffic:
    """A full token shard of the recipe; text features at their full length."""
    text = recipe.tokenizer.text
    members = [NPY + 2 * len(recipe.tokenizer.views) * spec.cells, CAPTION, 16 if isinstance(text, LabelsConfig) else 2]
    stored = isinstance(text, FeaturesConfig) or (isinstance(text, ClipTextConfig) and text.precompute)
    if stored and isinstance(spec.condition, FeatureSpec):
        members.append(NPY + 2 * spec.condition.rows * spec.condition.width)
    sample = sum(TAR + _up(size, TAR) for size in members)
    count = recipe.data.samples_per_shard
    return ShardTraffic(count, _up(count * sample + 2 * TAR, RECORD))


def orders_bytes(spec: ModelSpec) -> int:
    """Bytes of an image in an order table before compression: the order, a score for each cell, its key."""
    return spec.cells * (2 + 4) + 16


@dataclass(frozen=True)
class CheckpointTraffic:
    """A checkpoint of all workers: its bytes, files and PUT requests."""

    bytes: int
    files: int
    puts: int


def checkpoint_traffic(spec: ModelSpec, workers: int, *, average: bool) -> CheckpointTraffic:
    """Float32 weights and two moments (``training/checkpoints``), a file a worker; the average is a third moment."""
    total = parameters(spec).total * 4 * (4 if average else 3)
    each = total // workers
    small = 3  # DeepSpeed's own state, the manifest, the mark that commits
    return CheckpointTraffic(total, workers + small, workers * _puts(each) + small)


@dataclass(frozen=True)
class PoolLoad:
    """Requests of a pool that processes every shard once."""

    gets: int
    puts: int
    deletes: int
    lists: int
    """Listing requests when a driver starts and reads the ledger."""
    entry_gets: int
    """That a driver which takes over near the end reads, one for each finished shard."""

    @property
    def requests(self) -> int:
        """GET, PUT and DELETE requests together."""
        return self.gets + self.puts + self.deletes


def pool_load(shards: int, shard: ShardTraffic, table_bytes: int, seconds: float, heartbeat_s: float = 10.0) -> PoolLoad:
    """Requests of the pool: claim, check, parts, check, draft, order table, entry and release of each shard, and the heartbeats."""
    heartbeats = int(seconds / heartbeat_s)
    return PoolLoad(
        gets=shards * (2 + shard.gets),
        puts=shards * (3 + _puts(table_bytes)) + heartbeats,
        deletes=2 * shards + heartbeats,
        lists=-(-shards // LISTED),
        entry_gets=shards,
    )


def _puts(size: int) -> int:
    """Requests that upload a file: one, or its parts with a beginning and an end."""
    return -(-size // PART) + 2 if size > MULTIPART else 1


def _up(size: int, block: int) -> int:
    return -(-size // block) * block
