"""One pass over one shard: checksum, samples, members, and every fault of single samples.

``oar data index`` makes the manifest of a folder from such scans, ``oar data verify`` compares the manifest with them. A local shard is
mapped, not read into memory. One from S3 is downloaded once, into a temporary file that is mapped and unlinked before it is used,
so that nothing is left behind by a killed process.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import crc32c
import numpy as np

from oar_scale.data.data_files import files_below, require_folder, shards_among
from oar_scale.data.images import EXTENSIONS, decode_image
from oar_scale.data.labels import label_of, stored_label
from oar_scale.data.notes import NO_DATA, SEVERAL_FORMATS, Notes
from oar_scale.data.tar_samples import TWICE, Parts, samples
from oar_scale.data.tars import map_file
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject, parse_object
from oar_scale.names import relative_path
from oar_scale.storage import open_storage
from oar_scale.text import NotText, decode_text, is_missing

FAULTS_KEPT = 20
"""Faults of a shard that are kept as text; the others are counted."""
KINDS_KEPT = 500
"""Different sets of extensions that are counted separately in a shard; samples with further ones count as ``(other)``."""

Result = TypeVar("Result")


@dataclass
class ShardScan:
    """What one shard holds, as :func:`scan_shard` read it."""

    bytes: int
    crc32c: int
    samples: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    """How many samples have a member of each extension."""
    codes_shape: tuple[int, int] | None = None
    """Views and cells of its codes; None where it has none."""
    largest_code: int = -1
    bad_captions: int = 0
    """Captions that are missing or no text (:mod:`oar_scale.text`): trainings replace their samples."""
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    notes: dict[str, JsonObject] = field(default_factory=dict)
    """Members that were passed over (:class:`oar_scale.data.notes.Notes`)."""

    def fault(self, text: str) -> None:
        """Count a fault, and keep the text of the first ones."""
        self.fault_count += 1
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append(text)


def list_shards(folder: str, pattern: str = "*.tar", notes: Notes | None = None) -> list[str]:
    """Names of the shards below a folder, relative to it, numbers in their natural order: ``2.tar`` before ``10.tar``.

    Args:
        pattern: matches in upper as in lower case.
        notes: gets what was passed over (:mod:`oar_scale.data.data_files`).

    Raises:
        UserError: there is no such folder, or no shard in it, or one has a name that leads out of the folder.
    """
    notes = notes or Notes()
    require_folder(folder)
    names = files_below(folder, notes)
    shards = shards_among(names, notes, pattern)
    if not shards:
        raise UserError(
            f"{folder}: none of the {len(names)} objects below it matches {pattern!r}. Check the path, or give another --pattern."
        )
    for name in shards:
        try:
            relative_path(name)
        except ValueError as error:
            raise UserError(f"{folder}: {error}. Rename or remove the object: its name becomes a path where shards are written.") from error
    return sorted(shards, key=_natural)


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Digits compare as numbers: first by how many there are, without leading zeros."""
    runs = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if at % 2 else (0, part) for at, part in enumerate(runs)], name


@contextmanager
def open_bytes(uri: str) -> Iterator[memoryview]:
    """The bytes of an object, mapped from a local file. Raises ``Missing``."""
    if not uri.startswith("s3://"):
        open_storage(uri).version(uri)  # the clear error where there is none
        yield map_file(uri)
        return
    with tempfile.TemporaryDirectory(prefix="oar-scan-") as folder:
        path = os.path.join(folder, "shard")
        open_storage(uri).download(uri, path)
        data = map_file(path)
    yield data


def scan_shard(uri: str, vocab_size: int | None = None, decode: bool = False) -> ShardScan:
    """Read a shard once and return its sizes, checksum and faults.

    Args:
        vocab_size: codes must be below it.
        decode: decode every picture.

    Raises:
        UserError: it cannot be fetched, or is no tar that can be read; what is wrong with single samples is in ``faults``.
    """
    with open_bytes(uri) as data:
        scan, notes = ShardScan(len(data), crc32c.crc32c(data)), Notes()
        codes, sets, seen = _Codes(scan, vocab_size), dict[tuple[str, ...], list[str]](), set[str]()
        counts: Counter[tuple[str, ...]] = Counter()
        for key, sample in samples(data, uri, on_passed=lambda name: notes.add(NO_DATA, f"{uri}: {name}")):
            scan.samples += 1
            if key in seen:
                scan.fault(f"key {key!r} {TWICE}")
            seen.add(key)
            if sum(part in EXTENSIONS for part in sample) > 1:
                notes.add(SEVERAL_FORMATS, f"{uri}: {key}")
            extensions = tuple(sample)
            if extensions not in counts:
                if len(counts) == KINDS_KEPT:
                    extensions = ("(other)",)
                sets.setdefault(extensions, [])
            counts[extensions] += 1
            if len(sets[extensions]) < FAULTS_KEPT:
                sets[extensions].append(key)
            _check_parts(scan, key, sample, decode)
            if "codes.npy" in sample:
                codes.add(key, sample["codes.npy"])
        codes.flush()
        _compare_members(scan, counts, sets)
    scan.notes = notes.record()
    return scan


def _check_parts(scan: ShardScan, key: str, sample: Parts, decode: bool) -> None:
    """What one sample's members say by themselves."""
    if sample.doubled:
        scan.fault(f"sample {key!r} has two members .{sample.doubled}")
    metadata: JsonObject = {}
    if "json" in sample:
        try:
            metadata = parse_object(bytes(sample["json"]))
        except ValueError as error:
            scan.fault(f"sample {key!r} has a .json that is none ({error})")
    if "txt" in sample and not _is_caption(sample, metadata):
        scan.bad_captions += 1
    picture = next((sample[part] for part in EXTENSIONS if part in sample), None)
    if decode and picture is not None:
        try:
            decode_image(picture, f"picture of sample {key!r}")
        except UserError as error:
            scan.fault(str(error))


def _compare_members(scan: ShardScan, counts: Counter[tuple[str, ...]], sets: dict[tuple[str, ...], list[str]]) -> None:
    """Count the members; each sample should have what most samples of the shard have, and a picture or codes.

    Args:
        counts: how many samples have just these members.
        sets: the keys of the first of them.
    """
    having, total = Counter[str](), Counter[str]()
    kinds = {extensions: {"image" if part in EXTENSIONS else part for part in extensions} for extensions in counts}
    for extensions, count in counts.items():
        total.update(dict.fromkeys(extensions, count))
        having.update(dict.fromkeys(kinds[extensions], count))
    scan.parts = dict(sorted(total.items()))
    usual = {kind for kind, count in having.items() if 2 * count > scan.samples}
    for extensions, count in counts.items():
        lacking = sorted(usual - kinds[extensions])
        if not kinds[extensions] & {"image", "codes.npy"}:
            lacking = ["image or codes"]
        for key in sets[extensions] if lacking else []:
            scan.fault(f"sample {key!r} has no {' and no '.join(lacking)}")
        scan.fault_count += count - len(sets[extensions]) if lacking else 0


class _Codes:
    """Checks the codes of a shard, some hundred samples at a time."""

    def __init__(self, scan: ShardScan, vocab_size: int | None) -> None:
        self.scan, self.vocab_size = scan, vocab_size
        self.header = b""
        self.keys: list[str] = []
        self.waiting: list[bytes] = []

    def add(self, key: str, data: memoryview) -> None:
        shape = self.scan.codes_shape
        if shape is None or data[: len(self.header)] != self.header or len(data) != len(self.header) + 2 * shape[0] * shape[1]:
            header = self._header(key, data)
            if header is None:
                return
            self.header = header
        self.keys.append(key)
        self.waiting.append(data[len(self.header) :].tobytes())
        if len(self.keys) == 512:
            self.flush()

    def flush(self) -> None:
        """Check the codes that were added since the last call."""
        if not self.keys:
            return
        largest = [int(np.frombuffer(codes, dtype="<u2").max()) for codes in self.waiting] if self.vocab_size is not None else []
        for key, code in zip(self.keys, largest, strict=bool(largest)):
            if self.vocab_size is not None and code >= self.vocab_size:
                self.scan.fault(f"sample {key!r} has code {code}, the vocabulary has {self.vocab_size}")
        together = np.frombuffer(b"".join(self.waiting), dtype="<u2")
        self.scan.largest_code = max(self.scan.largest_code, int(together.max()))
        self.keys, self.waiting = [], []

    def _header(self, key: str, data: memoryview) -> bytes | None:
        """The ``.npy`` header of codes of the shard's shape; without it a fault is noted."""
        try:
            shape, dtype, fortran, start = npy_header(data)
        except ValueError as error:
            self.scan.fault(f"codes of sample {key!r} are no .npy array ({error})")
            return None
        bad = dtype != "<u2" or fortran or len(shape) != 2 or not all(shape)
        if bad or len(data) != start + 2 * shape[0] * shape[1]:
            self.scan.fault(f"codes of sample {key!r} are {dtype} {list(shape)} in {len(data)} bytes instead of uint16 [views, cells]")
            return None
        if self.scan.codes_shape is None:
            self.scan.codes_shape = shape[0], shape[1]
        if self.scan.codes_shape != shape:
            self.scan.fault(f"codes of sample {key!r} are {list(shape)} (views, cells), those before it {list(self.scan.codes_shape)}")
            return None
        return data[:start].tobytes()


def npy_header(data: memoryview) -> tuple[tuple[int, ...], str, bool, int]:
    """Shape, type (``<u2``), whether columns come first, and where the values begin.

    ``numpy.load`` would first allocate whatever the header claims, and evaluate its text.

    Raises:
        ValueError: no ``.npy``.
    """
    if data[:6].tobytes() != b"\x93NUMPY" or len(data) < 12:
        raise ValueError("it does not begin with the magic string")
    start, width = (10, 2) if data[6] == 1 else (12, 4)
    end = start + int.from_bytes(data[8 : 8 + width], "little")
    text = data[start : min(end, start + 10_000)].tobytes()
    fields = [
        re.search(pattern, text)
        for pattern in (rb"'shape':\s*\(([0-9, ]*)\)", rb"'descr':\s*'([^']*)'", rb"'fortran_order':\s*(True|False)")
    ]
    if not all(fields) or end > len(data):
        raise ValueError("its header cannot be read")
    shape, dtype, fortran = (match[1].decode("latin-1") for match in fields if match)
    return tuple(int(number) for number in shape.replace(",", " ").split()), dtype, fortran == "True", end


def _is_caption(sample: Parts, metadata: JsonObject) -> bool:
    """Whether the ``.txt`` of a sample is text, and says something where nothing else does: no label and no features."""
    try:
        if not is_missing(decode_text(sample["txt"])) or "features.npy" in sample:
            return True
        label_of(stored_label(metadata, sample.get("cls")))
    except (NotText, ValueError):
        return False
    return True


def in_parallel(
    work: Callable[[str], Result], names: Iterable[str], workers: int, on_error: Callable[[str, UserError], None]
) -> Iterator[tuple[str, Result]]:
    """Run ``work`` on each name in threads; yields (name, result) as results are ready, with a bounded number of names in progress.

    Threads, because most of the time is download, checksum and disk, which run beside each other; and because nothing is left
    running when the process is killed.

    Args:
        on_error: called with the name and the UserError that the work raised; the other names still run.
    """
    rest = iter(names)
    running: dict[Future[Result], str] = {}
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            for name in islice(rest, 2 * workers - len(running)):
                running[pool.submit(work, name)] = name
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    result = future.result()
                except UserError as error:
                    on_error(name, error)
                    continue
                yield name, result
    finally:
        pool.shutdown(cancel_futures=True)
