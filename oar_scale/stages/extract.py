"""Stage ``extract``, also of an arm: in which order would the model rather have placed each training image?"""

from __future__ import annotations

import time

from oar_scale.data.manifest import read_manifest
from oar_scale.json_object import JsonObject
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.run.context import Run
from oar_scale.shard_pool import Bounds, PoolReport, Timing
from oar_scale.shard_pool.extraction_pool import ExtractionJob, extract_all
from oar_scale.shard_pool.ledger import Record
from oar_scale.shard_pool.pool_messages import event_message
from oar_scale.storage.patience import patient


def run_extract(run: Run, name: str = "extract") -> JsonObject:
    """Write one order table for each token shard of the training split; returns counts, seconds and rate."""
    stage, parallel, started = run.recipe.stage(name), run.recipe.parallel, time.monotonic()
    config = run.recipe.of(stage).extract
    job = ExtractionJob(
        tokens=run.at("tokens", "train"),
        orders=run.at(stage.orders, "train"),
        model=run.model_uri("any_order"),
        text=run.recipe.tokenizer.text,
        tokenizers=run.at("tokenizers"),
        cache_dir=run.cache,
        cache_bytes=run.recipe.storage.cache_bytes,
        settings=ExtractionSettings.from_recipe(config),
        batch=config.batch,
        views=config.views,
        precision=parallel.precision,
        cpu_threads=parallel.cpu_threads,
        cuda=config.gpus_per_actor > 0,
    )
    patience_s, done_before = run.recipe.storage.patience_s, 0
    with patient(patience_s):
        total = read_manifest(job.tokens).samples
    with run.log(name) as log, run.console.progress(total, "orders") as tally:

        def progress(done: int, report: PoolReport) -> None:
            nonlocal done_before
            if not report.peak_actors:  # no actor has started yet: this is what earlier pools have done
                done_before = done
            rate = (done - done_before) / (time.monotonic() - started)
            counts = {"actors": report.actors, "retries": report.retries, "deaths": report.deaths, "late": report.stragglers}
            log.emit("pool", done=done, total=total, images_per_s=rate, **counts)
            tally.update(done)

        def event(kind: str, fields: Record) -> None:
            log.emit(kind, **fields)
            if message := event_message(kind, fields):
                tally.note(message)

        report = extract_all(
            job,
            actors=Bounds(config.min_actors, config.max_actors),
            gpus_per_actor=config.gpus_per_actor,
            gpu_type=parallel.gpu_type if config.gpus_per_actor else None,
            max_retries=config.max_retries,
            array=run.array,
            timing=Timing(grace_s=parallel.grace_s, hang_s=parallel.hang_timeout_s, patience_s=patience_s),
            on_progress=progress,
            on_event=event,
        )
    report.raise_for_poison()
    seconds = time.monotonic() - started
    return {
        "images": total,
        "seconds": seconds,
        "images_per_s": (total - done_before) / seconds,
        "actors": report.peak_actors,
        "actor_seconds": report.actor_seconds,
        "found": report.already_done,
        "elsewhere": report.done_elsewhere,
        "failures": report.failures,
        "late": report.stragglers,
        "poison": report.poison,
    }
