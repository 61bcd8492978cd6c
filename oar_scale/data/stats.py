"""A quick look at a folder of shards, with a manifest or without: what its samples are made of, and what they look like.

Some shards are read, by default the first ones; the figures are of those, and say so.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from oar_scale.data.images import EXTENSIONS, decode_image, image_size
from oar_scale.data.manifest import Manifest, parse_manifest
from oar_scale.data.scan import in_parallel, list_shards, npy_header, open_bytes
from oar_scale.data.tars import samples
from oar_scale.errors import UserError
from oar_scale.storage import Missing, join, open_storage

WORDS_KEPT = 200_000
"""Different words that are counted at the same time; above twice as many, the rarest are forgotten."""
CELL = 128
"""Pixels of a picture in the grid."""
CAPTION_STEP = 5
"""Words in a bar of the histogram of caption lengths."""

DecodeCodes = Callable[[NDArray[np.uint16]], list[Image.Image]]
"""Pictures of codes [S, N]."""


@dataclass
class Look:
    """What some shards hold."""

    shards: int = 0
    bytes: int = 0
    samples: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    caption_words: Counter[int] = field(default_factory=Counter)
    """How many captions have so many words."""
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

    def merge(self, other: Look) -> None:
        for name in ("shards", "bytes", "samples", "bad_captions", "bad_images", "bad_codes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("parts", "caption_words", "words", "labels", "sizes", "code_shapes"):
            getattr(self, name).update(getattr(other, name))
        self.codes += other.codes
        self.pictures += other.pictures
        self.tokens += other.tokens
        _trim(self.words)
        _trim(self.labels)


@dataclass(frozen=True)
class StatsJob:
    """What to look at."""

    folder: str
    pattern: str = "*.tar"
    shards: int | None = 4
    """How many of the first shards; None: all."""
    workers: int = 4
    pictures: int = 0
    """Samples kept for a picture grid, as many of each shard."""


def look_at(job: StatsJob, on_progress: Callable[[int, int], None] | None = None) -> tuple[Look, Manifest | None]:
    """Read the shards; returns what they hold, and the manifest if there is one.

    Raises:
        UserError: no shards, or one that cannot be read.
    """
    manifest = _manifest(job.folder)
    names = list_shards(job.folder, job.pattern) if manifest is None else [shard.name for shard in manifest.shards]
    names = names[: job.shards]
    share = math.ceil(job.pictures / len(names)) if names else 0
    report = on_progress or (lambda done, total: None)
    report(0, len(names))
    looks: dict[str, Look] = {}

    def broken(name: str, error: UserError) -> None:
        raise error

    for name, look in in_parallel(lambda name: _look_at_shard(join(job.folder, name), share), names, job.workers, broken):
        looks[name] = look
        report(len(looks), len(names))
    whole = Look()
    for name in names:
        whole.merge(looks.pop(name))
    return whole, manifest


def _manifest(folder: str) -> Manifest | None:
    uri = join(folder, "manifest.json")
    try:
        return parse_manifest(open_storage(uri).read(uri), uri)
    except Missing:
        return None


def _look_at_shard(uri: str, pictures: int) -> Look:
    look = Look(shards=1)
    with open_bytes(uri) as data:
        look.bytes = len(data)
        for key, sample in samples(data, uri):
            look.samples += 1
            look.parts.update(sample.keys())
            wanted = len(look.pictures) + len(look.tokens) < pictures
            _add_caption(look, sample)
            _add_label(look, sample)
            _add_image(look, sample, f"{uri}: image of sample {key!r}", wanted)
            _add_codes(look, sample, wanted)
    return look


def _add_caption(look: Look, sample: dict[str, memoryview]) -> None:
    if "txt" not in sample:
        return
    raw = bytes(sample["txt"])
    caption = raw.decode("utf-8", errors="replace")
    look.bad_captions += caption.encode() != raw
    words = re.findall(r"\w+(?:['’-]\w+)*", caption.lower())
    look.caption_words[len(words)] += 1
    look.words.update(words)
    _trim(look.words)


def _trim(words: Counter[str]) -> None:
    if len(words) > 2 * WORDS_KEPT:
        kept = words.most_common(WORDS_KEPT)
        words.clear()
        words.update(dict(kept))


def _add_label(look: Look, sample: dict[str, memoryview]) -> None:
    """A class label: ``label`` in KEY.json, or KEY.cls."""
    label: Any = None
    try:
        if "cls" in sample:
            label = int(bytes(sample["cls"][:32]))
        elif "json" in sample:
            facts = json.loads(bytes(sample["json"]))
            label = facts.get("label") if isinstance(facts, dict) else None
    except (ValueError, RecursionError):
        return
    if isinstance(label, int | str):
        look.labels[str(label)[:80]] += 1
        _trim(look.labels)


def _add_image(look: Look, sample: dict[str, memoryview], where: str, wanted: bool) -> None:
    data = next((sample[part] for part in EXTENSIONS if part in sample), None)
    if data is None:
        return
    try:
        look.sizes[image_size(data, where)] += 1
        if wanted:
            look.pictures.append(ImageOps.pad(decode_image(data, where), (CELL, CELL), color="white"))
    except UserError:
        look.bad_images += 1


def _add_codes(look: Look, sample: dict[str, memoryview], wanted: bool) -> None:
    if "codes.npy" not in sample:
        return
    data = sample["codes.npy"]
    try:
        shape, dtype, fortran, start = npy_header(data)
        if dtype != "<u2" or fortran or len(shape) != 2 or not all(shape) or len(data) != start + 2 * shape[0] * shape[1]:
            raise ValueError("not uint16 [views, cells]")
    except ValueError:
        look.bad_codes += 1
        return
    codes_VN = np.frombuffer(data[start:], dtype="<u2").reshape(shape)
    look.code_shapes[shape[0], shape[1]] += 1
    counts = np.bincount(codes_VN.reshape(-1))
    look.codes[: len(counts)] += counts
    if wanted:
        look.tokens.append(codes_VN[0].copy())


def picture_grid(look: Look, decode: DecodeCodes | None) -> Image.Image:
    """The pictures that were kept, in rows of equal length.

    Raises:
        UserError: no pictures; for token shards, nobody to decode them.
    """
    pictures = list(look.pictures)
    if look.tokens and decode is None and not pictures:
        raise UserError("These shards hold codes, no pictures: --grid needs the --tokenizer that made them.")
    if decode is not None and look.tokens:
        if len({len(codes) for codes in look.tokens}) > 1:
            raise UserError("These shards hold codes of different grids; no tokenizer decodes them all.")
        pictures += [picture.resize((CELL, CELL), Image.Resampling.NEAREST) for picture in decode(np.stack(look.tokens))]
    if not pictures:
        raise UserError("No picture for --grid: the shards looked at hold none that can be read.")
    columns, gap = math.ceil(math.sqrt(len(pictures))), 2
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (CELL + gap) - gap, rows * (CELL + gap) - gap), "white")
    for at, picture in enumerate(pictures):
        sheet.paste(picture, ((at % columns) * (CELL + gap), (at // columns) * (CELL + gap)))
    return sheet


def summary(look: Look, manifest: Manifest | None) -> dict[str, Any]:
    """The figures as plain values, for JSON."""
    result: dict[str, Any] = {
        "shards": look.shards,
        "samples": look.samples,
        "bytes": look.bytes,
        "parts": dict(look.parts.most_common(50)),
    }
    if manifest is not None:
        result["manifest"] = {"shards": len(manifest.shards), "samples": manifest.samples, "bytes": sum(s.bytes for s in manifest.shards)}
    if look.caption_words:
        bars = Counter[int]()
        for length, count in look.caption_words.items():
            bars[length // CAPTION_STEP * CAPTION_STEP] += count
        result["captions"] = {
            "count": look.caption_words.total(),
            "words": _spread(look.caption_words),
            "histogram": {f"{low}-{low + CAPTION_STEP - 1}": bars[low] for low in sorted(bars)},
            "not_utf8": look.bad_captions,
            "common_words": dict(look.words.most_common(20)),
        }
    if look.sizes or look.bad_images:
        widths, heights = Counter[int](), Counter[int]()
        for (width, height), count in look.sizes.items():
            widths[width] += count
            heights[height] += count
        common = {f"{width}x{height}": count for (width, height), count in look.sizes.most_common(10)}
        sides = {"width": _spread(widths), "height": _spread(heights)} if widths else {}
        result["images"] = {"count": widths.total(), **sides, "common_sizes": common, "unreadable": look.bad_images}
    if look.code_shapes or look.bad_codes:
        result["codes"] = _code_summary(look, manifest)
    if look.labels:
        result["labels"] = {"count": look.labels.total(), "different": len(look.labels), "common": dict(look.labels.most_common(20))}
    return result


def _code_summary(look: Look, manifest: Manifest | None) -> dict[str, Any]:
    """Entropy in bits; ``unused`` of the vocabulary, which without a manifest is what the largest code says."""
    total, used = int(look.codes.sum()), look.codes[look.codes > 0]
    share = used / max(total, 1)
    largest = int(np.flatnonzero(look.codes).max(initial=-1))
    vocabulary = manifest.vocab_size if manifest is not None and manifest.vocab_size else largest + 1
    common = np.argsort(-look.codes, kind="stable")[:10]
    return {
        "count": total,
        "shapes": {f"{views}x{cells}": count for (views, cells), count in look.code_shapes.most_common(10)},
        "largest": largest,
        "vocabulary": vocabulary,
        "unused": vocabulary - len(used),
        "entropy_bits": round(float(-(share * np.log2(share)).sum()), 4),
        "entropy_bits_of_uniform": round(math.log2(max(vocabulary, 1)), 4),
        "common": {str(code): int(look.codes[code]) for code in common.tolist() if look.codes[code]},
        "unreadable": look.bad_codes,
    }


def _spread(counts: Counter[int]) -> dict[str, float]:
    """Of numbers that occur so often."""
    total, ordered = counts.total(), sorted(counts)
    until = list(accumulate(counts[value] for value in ordered))
    at = {name: ordered[bisect_right(until, share * (total - 1))] for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
    mean = sum(value * count for value, count in counts.items()) / total
    return {"min": ordered[0], **at, "max": ordered[-1], "mean": round(mean, 2)}


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """The figures for people."""
    whole = figures.get("manifest")
    of = f" of {whole['shards']} shards with {whole['samples']} samples" if whole else ""
    yield f"{figures['shards']} shards{of}: {figures['samples']} samples, {figures['bytes'] / 1e6:.1f} MB"
    yield "members    " + ", ".join(f".{part} {count}" for part, count in figures["parts"].items())
    if "captions" in figures:
        captions = figures["captions"]
        yield f"captions   {_spread_text(captions['words'])} words" + _also(captions["not_utf8"], "not UTF-8")
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
