"""A manifest for shards that others wrote (``oar data index``): every shard is read once, in parallel; an interrupted run resumes.

    SHARDS/00000.tar ...            ->  SHARDS/manifest.json
    SHARDS/index.partial/NAME.json      the scan of each shard that was read; removed when the manifest is written

An entry is used only while its shard is unchanged (the entry holds the storage's version of it). An existing manifest with other
contents is replaced with --force only.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from urllib.parse import quote

from oar_scale.data.manifest import Manifest, ShardInfo, parse_manifest
from oar_scale.data.notes import Notes, escaped
from oar_scale.data.scan import ShardScan, in_parallel, list_shards, scan_shard
from oar_scale.errors import UserError
from oar_scale.storage import DamagedJson, Missing, join, open_storage, read_json, write_json

NAMED = 10
"""Broken shards that an error names."""
LONGEST_ENTRY = 180
"""Characters of a shard's name in the name of its entry; a file system takes 255 bytes, and writing adds some."""


@dataclass(frozen=True)
class IndexJob:
    """Which shards to index, and what cannot be read off token shards."""

    folder: str
    pattern: str = "*.tar"
    out: str | None = None
    """URI of the manifest; default: ``manifest.json`` beside the shards, where all readers expect it."""
    workers: int = 8
    grid: int | None = None
    """Cells per side; default: the root of the number of codes."""
    vocab_size: int | None = None
    """Default: one more than the largest code."""
    views: tuple[str, ...] | None = None
    """Names of the views; default: ``center`` for one, ``view0, view1, ...`` for more."""
    tokenizer_id: str | None = None
    force: bool = False
    """Replace another manifest."""

    @property
    def manifest_uri(self) -> str:
        """Where the manifest is written."""
        return self.out or join(self.folder, "manifest.json")

    @property
    def ledger(self) -> str:
        """Folder with the scans of shards that were read, until the manifest is written."""
        return join(self.manifest_uri.rpartition("/")[0] or ".", "index.partial")


@dataclass(frozen=True)
class IndexResult:
    """The manifest, and statistics of the shards that are not in it."""

    manifest: Manifest
    read: int
    """Shards that were read now; the others were in the ledger."""
    extensions: dict[str, int]
    """How many samples have each extension."""
    faults: int
    """Samples that cannot be used as the others can (``oar data verify`` names them)."""
    bad_captions: int
    notes: Notes
    """Files and members that were passed over."""


def index_folder(job: IndexJob, on_progress: Callable[[int, int], None] | None = None) -> IndexResult:
    """Read the shards that are not in the ledger yet and write the manifest.

    Args:
        on_progress: called with (shards done, shards in all), at the start and after every shard.

    Raises:
        UserError: no shards, shards that cannot be read or whose names are not UTF-8, token and image shards mixed, codes that do not fit
            what was given, or a manifest that says something else.
    """
    notes = Notes()
    names = list_shards(job.folder, job.pattern, notes)
    _require_utf8(job.folder, names)
    before = _existing_manifest(job)
    if before is not None and not job.force and [shard.name for shard in before.shards] != names:
        raise _other_manifest(job, f"it lists {len(before.shards)} shards, here are {len(names)} that match {job.pattern!r}")
    scans = _from_ledger(job, names)
    missing = [name for name in names if name not in scans]
    report = on_progress or (lambda done, total: None)
    report(len(scans), len(names))
    broken: dict[str, str] = {}
    for name, scan in in_parallel(
        lambda name: _scan(job, name), missing, job.workers, lambda name, error: broken.update({name: str(error)})
    ):
        scans[name] = scan
        report(len(scans), len(names))
    if broken:
        raise _broken(broken, len(names))
    manifest = _manifest(job, {name: scans[name] for name in names}, before)
    if before is not None and not job.force and before.fingerprint != manifest.fingerprint:
        raise _other_manifest(job, "shards or settings differ")
    open_storage(job.manifest_uri).write(job.manifest_uri, manifest.model_dump_json(indent=1).encode())
    _remove_ledger(job)
    extensions: Counter[str] = Counter()
    for name in names:
        extensions.update(scans[name].parts)
        notes.merge(scans[name].notes)
    faults, captions = sum(scan.fault_count for scan in scans.values()), sum(scan.bad_captions for scan in scans.values())
    return IndexResult(manifest, len(missing), dict(extensions), faults, captions, notes)


def _scan(job: IndexJob, name: str) -> ShardScan:
    """Read a shard and enter it into the ledger."""
    uri = join(job.folder, name)
    version = open_storage(uri).version(uri)
    scan = scan_shard(uri)
    write_json(_entry(job, name), {"shard": name, "uri": uri, "version": version, "scan": asdict(scan)})
    return scan


def _entry(job: IndexJob, name: str) -> str:
    short = quote(name, safe="")
    if len(short) > LONGEST_ENTRY:  # a letter that is not ASCII takes up to twelve there
        short = f"{short[:LONGEST_ENTRY]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return join(job.ledger, f"{short}.json")


def _require_utf8(folder: str, names: Iterable[str]) -> None:
    """Check that a manifest, which is JSON, can hold the names. Raises UserError."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{folder}: the name {escaped(name)!r} is not UTF-8, and a manifest cannot hold it. Rename the file."
            ) from error


def _from_ledger(job: IndexJob, names: Iterable[str]) -> dict[str, ShardScan]:
    """The scans of an earlier, interrupted run, of the shards that have not changed since."""
    existing = set(open_storage(job.ledger).list(job.ledger))

    def read(name: str) -> tuple[str, ShardScan | None]:
        uri = join(job.folder, name)
        try:
            entry = read_json(_entry(job, name))
        except DamagedJson:
            return name, None
        try:
            if (entry["uri"], entry["version"]) != (uri, open_storage(uri).version(uri)):
                return name, None
            views_cells = entry["scan"]["codes_shape"]  # JSON has no tuples
            return name, ShardScan(**{**entry["scan"], "codes_shape": views_cells and tuple(views_cells)})
        except (KeyError, TypeError):  # not what was written
            return name, None

    with ThreadPoolExecutor(job.workers) as pool:
        return {name: scan for name, scan in pool.map(read, (name for name in names if _entry(job, name) in existing)) if scan is not None}


def _remove_ledger(job: IndexJob) -> None:
    if os.path.isdir(job.ledger):
        shutil.rmtree(job.ledger)  # with what a killed process was writing
        return
    storage = open_storage(job.ledger)
    with ThreadPoolExecutor(job.workers) as pool:
        list(pool.map(storage.delete, storage.list(job.ledger)))


def _existing_manifest(job: IndexJob) -> Manifest | None:
    try:
        return parse_manifest(open_storage(job.manifest_uri).read(job.manifest_uri), job.manifest_uri)
    except Missing:
        return None


def _other_manifest(job: IndexJob, why: str) -> UserError:
    return UserError(
        f"{job.manifest_uri}: there is another manifest: {why}.\n"
        "Codes, orders and runs that were made with it depend on it. Use --force to replace it, or --out for another path."
    )


def _broken(broken: dict[str, str], total: int) -> UserError:
    named = "\n".join(f"  {broken[name]}" for name in sorted(broken)[:NAMED])
    more = f"\n  and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return UserError(
        f"{len(broken)} of {total} shards cannot be read:\n{named}{more}\n"
        "Replace or remove them and run the same command again; the others will not be read again."
    )


def _manifest(job: IndexJob, scans: dict[str, ShardScan], before: Manifest | None) -> Manifest:
    """Raises UserError where the codes of the shards do not fit each other, or what was given."""
    infos = tuple(ShardInfo(name=name, bytes=scan.bytes, samples=scan.samples, crc32c=scan.crc32c) for name, scan in scans.items())
    attribution = "" if before is None else before.attribution
    token_shards = [name for name, scan in scans.items() if scan.codes_shape is not None]
    if not token_shards:
        if job.grid or job.vocab_size or job.views or job.tokenizer_id:
            raise UserError(f"{job.folder}: no shard holds codes, so grid, vocabulary, views and tokenizer mean nothing here.")
        return Manifest(shards=infos, attribution=attribution)
    for name, scan in scans.items():
        first = scans[token_shards[0]].codes_shape
        if scan.samples and scan.codes_shape != first:
            what = "no codes" if scan.codes_shape is None else f"codes {list(scan.codes_shape)} (views, cells)"
            raise UserError(
                f"{join(job.folder, name)}: {what}, {token_shards[0]} has {list(first or ())}. Index each kind by itself (--pattern)."
            )
    grid, views = _layout(job, *(scans[token_shards[0]].codes_shape or (0, 0)))
    largest_in = max(token_shards, key=lambda name: scans[name].largest_code)
    largest = scans[largest_in].largest_code
    if job.vocab_size is not None and largest >= job.vocab_size:
        raise UserError(f"{join(job.folder, largest_in)}: code {largest}, but --vocab-size is {job.vocab_size}. Give the tokenizer's own.")
    return Manifest(
        shards=infos,
        grid=grid,
        vocab_size=job.vocab_size or largest + 1,
        views=views,
        tokenizer_id=job.tokenizer_id,
        attribution=attribution,
    )


def _layout(job: IndexJob, views: int, cells: int) -> tuple[int, tuple[str, ...]]:
    """Cells per side and the names of the views."""
    grid = job.grid or math.isqrt(cells)
    if grid * grid != cells:
        given = f"not {grid} x {grid}, as --grid says" if job.grid else "no square number of them"
        raise UserError(f"{job.folder}: an image has {cells} codes, {given}. Only square grids can be used.")
    names = job.views or (("center",) if views == 1 else tuple(f"view{number}" for number in range(views)))
    if len(names) != views:
        raise UserError(f"{job.folder}: an image has codes of {views} views, --views names {len(names)}.")
    return grid, names
