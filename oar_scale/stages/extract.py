"""Stage ``extract``: in which order would the model rather have placed each training image?"""

from __future__ import annotations

import time
from typing import Any

from oar_scale.data.manifest import read_manifest
from oar_scale.orders.extraction import ExtractionSettings
from oar_scale.orders.pool import ExtractionJob, extract_all
from oar_scale.stages.run import Run

EXPECTED = "10 s to start the actors, then about 20 images/s and actor at 64 cells"


def run_extract(run: Run) -> dict[str, Any]:
    """Write one order table for each token shard of the training split; returns counts, seconds and rate."""
    config, parallel, started = run.recipe.extract, run.recipe.parallel, time.monotonic()
    job = ExtractionJob(
        tokens=run.at("tokens", "train"),
        orders=run.at("orders", "train"),
        model=run.model_uri("anyorder"),
        text=run.recipe.tokenizer.text,
        tokenizers=run.at("tokenizers"),
        cache_dir=run.cache,
        cache_bytes=run.recipe.storage.cache_bytes,
        settings=ExtractionSettings.from_recipe(config),
        batch=config.batch,
        precision=parallel.precision,
        cpu_threads=parallel.cpu_threads,
        cuda=config.gpus_per_actor > 0,
    )
    total = read_manifest(job.tokens).samples
    with run.log("extract") as log, run.console.progress(total, "orders") as tally:

        def progress(done: int, total: int) -> None:
            seconds = time.monotonic() - started
            log.emit("pool", done=done, total=total, images_per_s=done / seconds)
            tally.update(done)

        report = extract_all(
            job, actors=config.actors, gpus_per_actor=config.gpus_per_actor, max_retries=config.max_retries, on_progress=progress
        )
    report.raise_for_poison()
    seconds = time.monotonic() - started
    return {
        "images": total,
        "seconds": seconds,
        "images_per_s": total / seconds,
        "actors": config.actors,
        "found": report.found,
        "failures": report.failures,
        "poison": report.poison,
    }
