"""Comparison of every byte of a folder of shards with its manifest (``oar data verify``).

What is compared: size and crc32c of each shard, the number of its samples, that no key comes twice in it, that each sample has
the members that most have, that no member is doubled, that each ``.json`` is one, and that codes have the shape and the range the
manifest says; with ``--decode`` also that each picture can be decoded. Shards that are missing, or that the manifest does not know,
are faults as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from oar_scale.data.data_files import files_below
from oar_scale.data.manifest import Manifest, ShardInfo, parse_manifest
from oar_scale.data.notes import Notes
from oar_scale.data.scan import ShardScan, in_parallel, open_bytes, scan_shard
from oar_scale.data.tar_samples import samples
from oar_scale.errors import Unreachable, UserError
from oar_scale.json_object import JsonObject
from oar_scale.storage import join, open_storage

FAULTS_KEPT = 200
"""Faults that are kept as text; all are counted."""


@dataclass
class VerifyReport:
    """Totals of a folder, and all its faults."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    bad_captions: int = 0
    """Captions that are no text: trainings replace their samples, so that they are no fault of the shard."""
    faults: list[str] = field(default_factory=list)
    """Each begins with the name of its shard."""
    fault_count: int = 0
    notes: Notes = field(default_factory=Notes)
    """Files and members that were passed over."""

    def add(self, name: str, faults: list[str], count: int) -> None:
        """Add the faults of a shard: their texts, and how many there are."""
        self.fault_count += count
        self.faults += [f"{name}: {fault}" for fault in faults[: FAULTS_KEPT - len(self.faults)]]


def verify_folder(
    folder: str,
    manifest_uri: str | None = None,
    *,
    workers: int = 8,
    decode: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Read every shard once and compare it with the manifest.

    Args:
        manifest_uri: default: ``manifest.json`` beside the shards.
        decode: decode every picture.
        on_progress: called with (shards done, shards in all), at the start and after every shard.

    Raises:
        UserError: no manifest, no access, or a storage that does not answer any more. Faults of shards and samples are in the report.
    """
    uri = manifest_uri or join(folder, "manifest.json")
    manifest = parse_manifest(open_storage(uri).read(uri), uri)
    infos, result, report = {info.name: info for info in manifest.shards}, VerifyReport(), on_progress or (lambda done, total: None)
    by_shard, by_notes = dict[str, tuple[list[str], int]](), dict[str, dict[str, JsonObject]]()

    def broken(name: str, error: UserError) -> None:
        if isinstance(error, Unreachable):
            raise error
        by_shard[name] = [str(error).removeprefix(f"{join(folder, name)}: ")], 1

    report(0, len(infos))
    scans = in_parallel(lambda name: scan_shard(join(folder, name), manifest.vocab_size, decode), infos, workers, broken)
    for name, scan in scans:
        faults = list(_compare(infos[name], scan, manifest))
        by_shard[name] = faults + scan.faults, len(faults) + scan.fault_count
        result.shards += 1
        result.samples += scan.samples
        result.bytes += scan.bytes
        result.bad_captions += scan.bad_captions
        by_notes[name] = scan.notes
        report(len(by_shard), len(infos))
    for name in infos:  # in the order of the manifest, whichever was read first
        result.add(name, *by_shard[name])
        result.notes.merge(by_notes.get(name, {}))
    for name in _unknown(folder, manifest, result.notes):
        if not _holds_samples(join(folder, name)):
            continue  # what a pool makes of a shard without samples that can be used, and leaves out of the manifest
        result.add(name, ["lies here, but is not in the manifest"], 1)
    return result


def _compare(info: ShardInfo, scan: ShardScan, manifest: Manifest) -> Iterator[str]:
    """The differences between a shard and its entry in the manifest."""
    if scan.bytes != info.bytes:
        yield f"{scan.bytes} bytes, the manifest says {info.bytes}"
    elif scan.crc32c != info.crc32c:
        yield f"crc32c {scan.crc32c:08x}, the manifest says {info.crc32c:08x}: the file is damaged or was replaced"
    if scan.samples != info.samples:
        yield f"{scan.samples} samples, the manifest says {info.samples}"
    shape = None if manifest.grid is None else (len(manifest.views), manifest.grid**2)
    if scan.samples and scan.codes_shape != shape:
        here = "no codes" if scan.codes_shape is None else f"codes {list(scan.codes_shape)} (views, cells)"
        yield f"{here}, the manifest says {'none' if shape is None else list(shape)}"


def _unknown(folder: str, manifest: Manifest, notes: Notes) -> list[str]:
    """Shards in the folder that are not in the manifest."""
    known = {info.name for info in manifest.shards}
    endings = tuple({"." + info.name.rpartition(".")[2].lower() for info in manifest.shards})
    return [name for name in files_below(folder, notes) if name.lower().endswith(endings) and name not in known]


def _holds_samples(uri: str) -> bool:
    """Whether a tar holds a sample; one that cannot be read may."""
    try:
        with open_bytes(uri) as data:
            return next(samples(data, uri), None) is not None
    except Unreachable:
        raise
    except UserError:
        return True
