"""Statistics of a folder of shards, with a manifest or without (``oar data stats``): members, captions, images, codes, a picture grid.

By default only the first shards are read; the figures are of those, and the report says of how many.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from oar_scale.data.images import EXTENSIONS, decode_image, image_size
from oar_scale.data.labels import label_of, stored_label
from oar_scale.data.manifest import Manifest, parse_manifest
from oar_scale.data.notes import NO_DATA, Notes
from oar_scale.data.scan import in_parallel, list_shards, npy_header, open_bytes
from oar_scale.data.tar_samples import samples
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject, parse_object
from oar_scale.storage import Missing, join, open_storage
from oar_scale.text import NotText, decode_text, is_missing, shown

WORDS_KEPT = 200_000
"""Different words that are counted at the same time; above twice as many, the rarest are forgotten."""
CELL = 128
"""Pixels of a picture in the grid."""
CAPTION_STEP = 5
"""Words in a bar of the histogram of caption lengths."""

DecodeCodes = Callable[[NDArray[np.uint16]], list[Image.Image]]
"""Decodes codes [S, N] to S pictures."""


@dataclass
class ShardStats:
    """Counts over some shards; those of several shards can be merged."""

    shards: int = 0
    bytes: int = 0
    samples: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    caption_words: Counter[int] = field(default_factory=Counter)
    """Number of captions by their number of words."""
    bad_captions: int = 0
    words: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    bad_images: int = 0
    code_shapes: Counter[tuple[int, int]] = field(default_factory=Counter)
    codes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1 << 16, dtype=np.int64))
    """How often each code occurs, in all views."""
    bad_codes: int = 0
    pictures: list[Image.Image] = field(default_factory=list)
    tokens: list[NDArray[np.uint16]] = field(default_factory=list)
    """Codes of the first view of the samples for the grid."""
    notes: Notes = field(default_factory=Notes)
    """What was passed over, and samples that cannot be used."""

    def merge(self, other: ShardStats) -> None:
        """Add the counts, pictures and codes of other shards to these."""
        for name in ("shards", "bytes", "samples", "bad_captions", "bad_images", "bad_codes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("parts", "caption_words", "words", "labels", "sizes", "code_shapes"):
            getattr(self, name).update(getattr(other, name))
        self.codes += other.codes
        self.notes.merge(other.notes.record())
        self.pictures += other.pictures
        self.tokens += other.tokens
        _trim(self.words)
        _trim(self.labels)


@dataclass(frozen=True)
class StatsJob:
    """Which shards to read, and how many pictures to keep."""

    folder: str
    pattern: str = "*.tar"
    shards: int | None = 4
    """How many of the first shards; None: all."""
    workers: int = 4
    pictures: int = 0
    """Samples kept for a picture grid, about as many of each shard."""


def collect_stats(job: StatsJob, on_progress: Callable[[int, int], None] | None = None) -> tuple[ShardStats, Manifest | None]:
    """Read the shards; returns their statistics, and the manifest if there is one.

    Raises:
        UserError: no shards, or one that cannot be read.
    """
    manifest = _manifest(job.folder)
    notes = Notes()
    names = list_shards(job.folder, job.pattern, notes) if manifest is None else [shard.name for shard in manifest.shards]
    names = names[: job.shards]
    ends = [job.pictures * at // max(1, len(names)) for at in range(len(names) + 1)]
    shares = {name: end - begin for name, (begin, end) in zip(names, pairwise(ends), strict=True)}
    report = on_progress or (lambda done, total: None)
    report(0, len(names))
    waiting: dict[str, ShardStats] = {}
    whole, following = ShardStats(notes=notes), deque(names)

    def broken(name: str, error: UserError) -> None:
        raise error

    scans = in_parallel(lambda name: _shard_stats(join(job.folder, name), shares[name]), names, job.workers, broken)
    for done, (name, stats) in enumerate(scans, 1):
        waiting[name] = stats
        while following and following[0] in waiting:  # in the order of the shards, and at once: the words of all shards need much memory
            whole.merge(waiting.pop(following.popleft()))
        report(done, len(names))
    return whole, manifest


def _manifest(folder: str) -> Manifest | None:
    uri = join(folder, "manifest.json")
    try:
        return parse_manifest(open_storage(uri).read(uri), uri)
    except Missing:
        return None


def _shard_stats(uri: str, pictures: int) -> ShardStats:
    stats = ShardStats(shards=1)
    with open_bytes(uri) as data:
        stats.bytes = len(data)
        for key, sample in samples(data, uri, on_passed=lambda name: stats.notes.add(NO_DATA, f"{uri}: {name}")):
            stats.samples += 1
            stats.parts.update(sample.keys())
            if sample.doubled:
                stats.notes.add("samples with two members of one kind, of which the first is counted", f"{uri}: {key}.{sample.doubled}")
            wanted = len(stats.pictures) + len(stats.tokens) < pictures
            _add_caption(stats, sample)
            _add_label(stats, sample, f"{uri}: {key}")
            _add_image(stats, sample, f"{uri}: image of sample {key!r}", wanted)
            _add_codes(stats, sample, wanted)
    return stats


def _add_caption(stats: ShardStats, sample: dict[str, memoryview]) -> None:
    if "txt" not in sample:
        return
    try:
        caption = decode_text(sample["txt"])
    except NotText:
        caption = bytes(sample["txt"]).decode("utf-8", errors="replace")
        stats.bad_captions += 1
    words = re.findall(r"\w+(?:['’-]\w+)*", caption.lower())
    stats.caption_words[len(words)] += 1
    stats.words.update(words)
    _trim(stats.words)


def _trim(words: Counter[str]) -> None:
    if len(words) > 2 * WORDS_KEPT:
        kept = words.most_common(WORDS_KEPT)
        words.clear()
        words.update(dict(kept))


def _add_label(stats: ShardStats, sample: dict[str, memoryview], where: str) -> None:
    """A class label: ``label`` in KEY.json, or KEY.cls."""
    try:
        label = stored_label(parse_object(bytes(sample.get("json", b"{}"))), sample.get("cls"))
    except ValueError:
        stats.notes.add("samples whose .json is none, not counted among the labels", where)
        return
    if is_missing(label):
        return
    try:
        name = str(label_of(label))
    except ValueError:
        name = shown(label)
    stats.labels[name] += 1
    _trim(stats.labels)


def _add_image(stats: ShardStats, sample: dict[str, memoryview], where: str, wanted: bool) -> None:
    data = next((sample[part] for part in EXTENSIONS if part in sample), None)
    if data is None:
        return
    try:
        stats.sizes[image_size(data, where)] += 1
        if wanted:
            stats.pictures.append(ImageOps.pad(decode_image(data, where), (CELL, CELL), color="white"))
    except UserError as error:
        stats.bad_images += 1
        stats.notes.add("pictures that cannot be read, counted as such", str(error))


def _add_codes(stats: ShardStats, sample: dict[str, memoryview], wanted: bool) -> None:
    if "codes.npy" not in sample:
        return
    data = sample["codes.npy"]
    try:
        shape, dtype, fortran, start = npy_header(data)
        if dtype != "<u2" or fortran or len(shape) != 2 or not all(shape) or len(data) != start + 2 * shape[0] * shape[1]:
            raise ValueError("not uint16 [views, cells]")
    except ValueError:
        stats.bad_codes += 1
        return
    codes_VN = np.frombuffer(data[start:], dtype="<u2").reshape(shape)
    stats.code_shapes[shape[0], shape[1]] += 1
    counts = np.bincount(codes_VN.reshape(-1))
    stats.codes[: len(counts)] += counts
    if wanted:
        stats.tokens.append(codes_VN[0].copy())


def picture_grid(stats: ShardStats, decode: DecodeCodes | None) -> Image.Image:
    """The pictures that were kept, in rows of equal length.

    Raises:
        UserError: no pictures; for token shards, no tokenizer to decode them.
    """
    pictures = list(stats.pictures)
    if stats.tokens and decode is None and not pictures:
        raise UserError("These shards hold codes, no pictures: --grid needs the --tokenizer that made them.")
    if decode is not None and stats.tokens:
        if len({len(codes) for codes in stats.tokens}) > 1:
            raise UserError("These shards hold codes of different grids; no tokenizer decodes them all.")
        pictures += [picture.resize((CELL, CELL), Image.Resampling.NEAREST) for picture in decode(np.stack(stats.tokens))]
    if not pictures:
        raise UserError("No picture for --grid: the shards that were read hold none that can be decoded.")
    columns, gap = math.ceil(math.sqrt(len(pictures))), 2
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (CELL + gap) - gap, rows * (CELL + gap) - gap), "white")
    for at, picture in enumerate(pictures):
        sheet.paste(picture, ((at % columns) * (CELL + gap), (at // columns) * (CELL + gap)))
    return sheet


def summary(stats: ShardStats, manifest: Manifest | None) -> JsonObject:
    """The figures as plain values, for JSON."""
    result: JsonObject = {
        "shards": stats.shards,
        "samples": stats.samples,
        "bytes": stats.bytes,
        "notes": stats.notes.record(),
        "parts": dict(stats.parts.most_common(50)),
    }
    if manifest is not None:
        result["manifest"] = {"shards": len(manifest.shards), "samples": manifest.samples, "bytes": sum(s.bytes for s in manifest.shards)}
    if stats.caption_words:
        bars = Counter[int]()
        for length, count in stats.caption_words.items():
            bars[length // CAPTION_STEP * CAPTION_STEP] += count
        result["captions"] = {
            "count": stats.caption_words.total(),
            "words": _spread(stats.caption_words),
            "histogram": {f"{low}-{low + CAPTION_STEP - 1}": bars[low] for low in sorted(bars)},
            "not_utf8": stats.bad_captions,
            "common_words": dict(stats.words.most_common(20)),
        }
    if stats.sizes or stats.bad_images:
        widths, heights = Counter[int](), Counter[int]()
        for (width, height), count in stats.sizes.items():
            widths[width] += count
            heights[height] += count
        common = {f"{width}x{height}": count for (width, height), count in stats.sizes.most_common(10)}
        sides = {"width": _spread(widths), "height": _spread(heights)} if widths else {}
        result["images"] = {"count": widths.total(), **sides, "common_sizes": common, "unreadable": stats.bad_images}
    if stats.code_shapes or stats.bad_codes:
        result["codes"] = _code_summary(stats, manifest)
    if stats.labels:
        result["labels"] = {"count": stats.labels.total(), "different": len(stats.labels), "common": dict(stats.labels.most_common(20))}
    return result


def _code_summary(stats: ShardStats, manifest: Manifest | None) -> JsonObject:
    """Entropy in bits; ``unused`` of the vocabulary, which without a manifest is what the largest code says."""
    total, used = int(stats.codes.sum()), stats.codes[stats.codes > 0]
    share = used / max(total, 1)
    largest = int(np.flatnonzero(stats.codes).max(initial=-1))
    vocabulary = manifest.vocab_size if manifest is not None and manifest.vocab_size else largest + 1
    common = np.argsort(-stats.codes, kind="stable")[:10]
    return {
        "count": total,
        "shapes": {f"{views}x{cells}": count for (views, cells), count in stats.code_shapes.most_common(10)},
        "largest": largest,
        "vocabulary": vocabulary,
        "unused": vocabulary - len(used),
        "entropy_bits": round(float(-(share * np.log2(share)).sum()), 4),
        "entropy_bits_of_uniform": round(math.log2(max(vocabulary, 1)), 4),
        "common": {str(code): int(stats.codes[code]) for code in common.tolist() if stats.codes[code]},
        "unreadable": stats.bad_codes,
    }


def _spread(counts: Counter[int]) -> dict[str, float]:
    """Range, quantiles and mean of numbers, from how often each occurs."""
    total, ordered = counts.total(), sorted(counts)
    until = list(accumulate(counts[value] for value in ordered))
    at = {name: ordered[bisect_right(until, share * (total - 1))] for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
    mean = sum(value * count for value, count in counts.items()) / total
    return {"min": ordered[0], **at, "max": ordered[-1], "mean": round(mean, 2)}


def lines(figures: JsonObject) -> Iterator[str]:
    """The figures of :func:`summary` as lines of text."""
    whole = figures.get("manifest")
    of = f" of {whole['shards']} shards with {whole['samples']} samples" if whole else ""
    yield f"{figures['shards']} shards{of}: {figures['samples']} samples, {figures['bytes'] / 1e6:.1f} MB"
    yield "members    " + ", ".join(f".{part} {count}" for part, count in figures["parts"].items())
    if "captions" in figures:
        captions = figures["captions"]
        yield f"captions   {_spread_text(captions['words'])} words" + _also(captions["not_utf8"], "no text")
        peak = max(captions["histogram"].values())
        for bar, count in list(captions["histogram"].items())[:20]:
            yield f"  {bar:>9} words  {count:>8}  {'#' * round(40 * count / peak)}"
        yield "words      " + ", ".join(f"{word} {count}" for word, count in captions["common_words"].items())
    if "images" in figures:
        images = figures["images"]
        yield (
            "images     "
            + ", ".join(f"{size}: {count}" for size, count in images["common_sizes"].items())
            + _also(images["unreadable"], "unreadable")
        )
        for side in ("width", "height"):
            if side in images:
                yield f"  {side:<8} {_spread_text(images[side])} pixels"
    if "codes" in figures:
        codes = figures["codes"]
        shapes = ", ".join(f"{shape}: {count}" for shape, count in codes["shapes"].items())
        yield f"codes      {shapes} (views x cells)" + _also(codes["unreadable"], "unreadable")
        yield f"  entropy  {codes['entropy_bits']} bits, {codes['entropy_bits_of_uniform']} if all were equally common"
        yield f"  unused   {codes['unused']} of {codes['vocabulary']}; largest {codes['largest']}"
    if "labels" in figures:
        labels = figures["labels"]
        common = ", ".join(f"{label}: {count}" for label, count in labels["common"].items())
        yield f"labels     {labels['count']}, {labels['different']} different: {common}"


def _spread_text(spread: dict[str, float]) -> str:
    return f"{spread['min']} to {spread['max']}, median {spread['median']}, 80 % within {spread['p10']} to {spread['p90']}"


def _also(count: int, what: str) -> str:
    return f"; {count} {what}" if count else ""
