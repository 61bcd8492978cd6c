"""``oar data ...``: prints progress to standard error and results to standard output."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pydantic import ValidationError

from oar_scale.config.schema import DataConfig, TokenizerConfig
from oar_scale.data.bad_samples import BadSamples
from oar_scale.data.index import IndexJob, index_folder
from oar_scale.data.notes import Notes
from oar_scale.data.stats import DecodeCodes, StatsJob, collect_stats, lines, picture_grid, summary
from oar_scale.data.verify import verify_folder
from oar_scale.errors import UserError
from oar_scale.observe.console import Console, Tally, duration
from oar_scale.storage import absolute, open_storage
from oar_scale.text import cut, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

FAULTS_SHOWN, KINDS_SHOWN = 50, 50
CACHE_BYTES = 8 << 30
"""Size of the local copies of image shards that tokenizing keeps; each shard is read once."""
PICTURES = 64
"""Pictures in the grid of ``oar data stats``."""


def index_shards(job: IndexJob) -> None:
    """Write the manifest of a folder of shards and print what is in it."""
    with _progress("shards") as show:
        index = index_folder(job, show)
    manifest = index.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    print(f"{job.manifest_uri}: {len(manifest.shards)} shards ({index.read} read now), {manifest.samples} samples, {size / 1e6:.1f} MB")
    kinds = sorted(index.extensions.items(), key=lambda item: -item[1])
    more = f", and {len(kinds) - KINDS_SHOWN} kinds more" if len(kinds) > KINDS_SHOWN else ""
    say(cut("members: " + ", ".join(f".{part} {count}" for part, count in kinds[:KINDS_SHOWN]) + more))
    if manifest.grid is not None:
        print(
            f"codes: grid {manifest.grid} x {manifest.grid}, vocabulary {manifest.vocab_size}, views {', '.join(manifest.views)}, "
            f"tokenizer {manifest.tokenizer_id or 'unknown (--tokenizer-id)'}"
        )
    if index.bad_captions:
        print(f"{index.bad_captions} captions are missing or no UTF-8; trainings replace their samples")
    if index.faults:
        print(f"{index.faults} faults in samples; oar data verify names them")
    _print_notes(index.notes)


def verify_shards(folder: str, manifest: str | None, workers: int, decode: bool) -> int:
    """Read every shard, print each fault, and return 1 if there is one, else 0."""
    with _progress("shards") as show:
        result = verify_folder(folder, manifest, workers=workers, decode=decode, on_progress=show)
    for fault in result.faults[:FAULTS_SHOWN]:
        say(fault)
    if result.fault_count > FAULTS_SHOWN:
        print(f"... and {result.fault_count - min(FAULTS_SHOWN, len(result.faults))} more")
    read = f"{result.shards} shards, {result.samples} samples, {result.bytes / 1e6:.1f} MB read"
    captions = f"; {result.bad_captions} captions are missing or no UTF-8; trainings replace their samples" if result.bad_captions else ""
    print(f"{folder}: {read}: {f'{result.fault_count} faults' if result.fault_count else 'all as the manifest says'}{captions}")
    _print_notes(result.notes)
    return 1 if result.fault_count else 0


def show_shard_statistics(folder: str, pattern: str, shards: int | None, grid: str | None, tokenizer: str | None, as_json: bool) -> None:
    """Print statistics of a folder of shards.

    Args:
        folder: of the shards.
        pattern: which of its files are shards.
        shards: how many are read; None: all.
        grid: a file that gets a contact sheet of pictures; None: no pictures are drawn.
        tokenizer: weights that decode codes into pictures for it.
        as_json: print JSON instead of lines of text.
    """
    decode = _decoder(tokenizer) if tokenizer and grid else None
    with _progress("shards") as show:
        stats, manifest = collect_stats(StatsJob(folder, pattern, shards, pictures=PICTURES if grid else 0), show)
    figures = summary(stats, manifest)
    say(json.dumps(figures, indent=2, ensure_ascii=True) if as_json else "\n".join(lines(figures)))
    if grid:
        buffer = io.BytesIO()
        picture_grid(stats, decode).save(buffer, "PNG")
        open_storage(grid).write(grid, buffer.getvalue())
    if not as_json:
        _print_notes(stats.notes)


def _decoder(weights: str) -> DecodeCodes:
    """Pictures of codes [S, N], by an image tokenizer."""
    import torch
    from PIL import Image

    from oar_scale.tokenizers.vq import load_vq, unit_to_pixels

    vq = load_vq(weights)

    def decode(codes_SN: NDArray[np.uint16]) -> list[Image.Image]:
        cells, largest = vq.spec.grid**2, int(codes_SN.max())
        if codes_SN.shape[1] != cells or largest >= vq.spec.codebook_size:
            raise UserError(
                f"{weights}: made for {cells} codes below {vq.spec.codebook_size}; these are {codes_SN.shape[1]} up to {largest}, "
                "so another tokenizer made them."
            )
        with torch.no_grad():
            pixels = unit_to_pixels(vq.decode(torch.from_numpy(codes_SN.astype("int64"))))
        return [Image.fromarray(picture) for picture in pixels.cpu().numpy()]

    return decode


def tokenize_shards(images: str, tokens: str, tokenizer: str, views: str, actors: int, max_bad_fraction: float) -> None:
    """Tokenize a folder of image shards; an interrupted run resumes where it stopped."""
    notes = Notes()

    def bad(total: int) -> BadSamples:
        return BadSamples("tokens", total, DataConfig(max_bad_fraction=max_bad_fraction), notes, "--max-bad-fraction ...")

    try:
        named = TokenizerConfig(views=tuple(views.split(","))).views
    except ValidationError as error:
        raise UserError(f"--views {views}: no such view. Give some of center, center_flip, jitter1 to jitter99, tencrop.") from error
    from oar_scale.shard_pool.tokenization import TokenizeJob, tokenize_all

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="oar-tokenize-") as cache, _progress("images") as show:
        # The actors of a cluster have other working folders than this process.
        job = TokenizeJob(absolute(images), absolute(tokens), absolute(tokenizer), named, cache, cache_bytes=CACHE_BYTES)
        manifest = tokenize_all(job, actors=actors, on_progress=show, make_bad=bad)
    print(
        f"{tokens}: {manifest.samples} images in {len(manifest.shards)} shards, {len(manifest.views)} views of {manifest.grid} x "
        f"{manifest.grid} codes, in {duration(time.monotonic() - began)}"
    )
    _print_notes(notes)


def _print_notes(notes: Notes) -> None:
    if notes.line():
        say(notes.line())


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback for (done, in all) that draws a bar, or prints a line now and then; its first call says the total."""
    console = Console(sys.stderr)
    with ExitStack() as open_bar:
        bars: list[Tally] = []

        def show(done: int, total: int) -> None:
            if not bars:
                bars.append(open_bar.enter_context(console.progress(total, what)))
            bars[0].update(done)

        yield show
