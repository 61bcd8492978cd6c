"""How far a pool is, from its ledger alone: while it runs or afterwards, from any machine that reads the storage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from oar_scale.errors import first_line
from oar_scale.observe.formatting import duration, time_left
from oar_scale.shard_pool.leases import read_leases, seems_alive
from oar_scale.shard_pool.ledger import Claim, Ledger, LedgerEntry, Record
from oar_scale.shard_pool.pool_types import Timing

WINDOW_S = 600.0
"""The rate is that of the last so many seconds."""
SLOWEST = 3
NAMED = 10


@dataclass(frozen=True)
class PoolStatus:
    """The status of a pool, as :func:`read_status` returns it."""

    shards: int
    images: int
    done: dict[str, LedgerEntry]
    images_done: int
    in_progress: dict[str, Claim]
    """Shards that a pool with a valid lease has claimed."""
    pools: dict[str, Record]
    """The last record of each pool that is alive: ``host``, ``pid``, ``started``, ``actors``, ``retries``, ``deaths``, ``late``."""
    poison: dict[str, str]
    """The error of each shard that was given up and not done since."""
    damaged: dict[str, str]
    """What is wrong with each ledger entry that cannot be read; the next pool does these shards again."""
    images_per_s: float | None
    actor_seconds: float
    """The time of all actors of all pools there ever were, starting and waiting included."""
    ms_per_image: dict[str, float]
    """Of each actor that finished a shard, slowest first."""

    @property
    def busy_seconds(self) -> float:
        """The time that finished shards took."""
        return float(sum(entry.work.get("seconds", 0.0) for entry in self.done.values()))


def read_status(ledger: str, sizes: Mapping[str, int]) -> PoolStatus:
    """Read the state of a pool from its ledger: a request for each finished shard, about.

    Args:
        sizes: the images of each shard there is to do.
    """
    book = Ledger(ledger)
    claims, leases = book.claims(), read_leases(book)
    done, poison = book.entries(sizes), book.poison()
    pools = {holder: record for holder, record in leases.items() if seems_alive(record, Timing().lease_s)}
    return PoolStatus(
        shards=len(sizes),
        images=sum(sizes.values()),
        done=done,
        images_done=sum(sizes[shard] for shard in done),
        in_progress={shard: claim for shard, claim in claims.items() if shard not in done and claim.holder in pools},
        pools=pools,
        damaged=book.damaged(sizes, done),
        poison={shard: record["error"] for shard, record in poison.items() if shard in sizes and shard not in done},
        images_per_s=_rate(done, sizes, bool(pools)),
        actor_seconds=sum(record.get("actor_seconds", 0.0) for record in leases.values()),
        ms_per_image=_paces(done, sizes),
    )


def _rate(done: Mapping[str, LedgerEntry], sizes: Mapping[str, int], running: bool) -> float | None:
    """Images per second in the window before now, or before the last shard where no pool runs any more."""
    finished = {shard: entry.work["finished"] for shard, entry in done.items() if "finished" in entry.work}
    if not finished:
        return None
    end = max(time.time(), *finished.values()) if running else max(finished.values())
    recent = [shard for shard, at in finished.items() if at > end - WINDOW_S]
    begun = min((finished[shard] - done[shard].work["seconds"] for shard in recent), default=end)
    span = end - max(begun, end - WINDOW_S)
    return sum(sizes[shard] for shard in recent) / span if span > 0 else None


def _paces(done: Mapping[str, LedgerEntry], sizes: Mapping[str, int]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    images: dict[str, int] = {}
    for shard, entry in done.items():
        if "actor" in entry.work:
            actor = entry.work["actor"]
            seconds[actor] = seconds.get(actor, 0.0) + entry.work["seconds"]
            images[actor] = images.get(actor, 0) + sizes[shard]
    paces = {actor: 1000 * seconds[actor] / images[actor] for actor in seconds if images[actor]}
    return dict(sorted(paces.items(), key=lambda item: -item[1]))


def status_lines(status: PoolStatus, where: str) -> list[str]:
    """Format the status for people; ``where`` names the output folder."""
    share = 100 * status.images_done / status.images if status.images else 100.0
    lines = [f"{where}: {len(status.done)} of {status.shards} shards, {status.images_done} of {status.images} images ({share:.1f} %)"]
    rate = status.images_per_s
    if rate is not None:
        left = time_left(status.images - status.images_done, rate) if status.pools else ""
        lines.append(f"rate      {rate:.1f} images/s{f', {left}' if left else ''}")
    finished = len(status.done) + len(status.poison) >= status.shards
    lines += [f"pool      {_pool(record)}" for record in status.pools.values()] or ["pool      none running" + ("" if finished else _AGAIN)]
    if status.in_progress:
        now = time.time()
        oldest = sorted(status.in_progress.values(), key=lambda claim: claim.since)
        named = ", ".join(f"{claim.shard} ({duration(max(0.0, now - claim.since))})" for claim in oldest[:NAMED])
        lines.append(f"running   {len(oldest)}: {named}{', ...' if len(oldest) > NAMED else ''}")
    useful = f", {100 * status.busy_seconds / status.actor_seconds:.0f} % of it in finished shards" if status.actor_seconds else ""
    lines.append(f"cost      {status.actor_seconds / 3600:.3f} actor-hours so far{useful}")
    if len(status.ms_per_image) > 1:
        middle = statistics.median(status.ms_per_image.values())
        slowest = list(status.ms_per_image.items())[:SLOWEST]
        lines.append("slowest   " + ", ".join(f"{actor} {pace:.1f} ms/image ({pace / middle:.2f} x the median)" for actor, pace in slowest))
    for title, problems in (("poison", status.poison), ("damaged", status.damaged)):
        lines += [f"{title:<9} {shard}: {first_line(error)}" for shard, error in list(problems.items())[:NAMED]]
        if len(problems) > NAMED:
            lines.append(f"{title:<9} ... and {len(problems) - NAMED} more")
    return lines


_AGAIN = "; the same command resumes from here"


def _pool(record: Record) -> str:
    trouble = ", ".join(f"{record[name]} {name}" for name in ("retries", "deaths", "late") if record.get(name))
    since = duration(max(0.0, time.time() - record["started"]))
    return f"{record['host']} (pid {record['pid']}), {record.get('actors', 0)} actors, since {since}{f'; {trouble}' if trouble else ''}"
