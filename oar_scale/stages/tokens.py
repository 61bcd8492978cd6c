"""Stage ``tokens``: image shards into token shards, by a pool of Ray actors."""

from __future__ import annotations

from oar_scale.config.schema import ClipTextConfig
from oar_scale.data.bad_samples import BadSamples
from oar_scale.data.manifest import Manifest, read_manifest
from oar_scale.data.notes import Notes
from oar_scale.data.prepare import splits_of
from oar_scale.json_object import JsonObject
from oar_scale.run.context import Run
from oar_scale.shard_pool import Bounds, Timing
from oar_scale.shard_pool.tokenization import TokenizeJob, tokenize_all
from oar_scale.storage.patience import patient


def run_tokens(run: Run) -> JsonObject:
    """Write ``tokens/train`` (all views) and those of the other splits (the images as they are); returns the counts."""
    counts, parallel, text, notes = {}, run.recipe.parallel, run.recipe.tokenizer.text, Notes()
    tower = text if isinstance(text, ClipTextConfig) and text.precompute else None
    for split in splits_of(run.recipe.data):
        views = run.recipe.tokenizer.views if split == "train" else ("center",)
        job = TokenizeJob(
            images=run.at("images", split),
            tokens=run.at("tokens", split),
            vq=run.vq_uri,
            views=views,
            cache_dir=run.cache,
            cache_bytes=run.recipe.storage.cache_bytes,
            cpu_threads=parallel.cpu_threads,
            text=tower,
            cuda=parallel.gpus_per_worker > 0,
        )
        counts[split] = _tokenize(run, job, f"{split} images", notes).samples
    if notes.line():
        run.console.say(f"  {notes.line()}")
    return {**counts, "views": list(run.recipe.tokenizer.views), "notes": notes.record()}


def _tokenize(run: Run, job: TokenizeJob, what: str, notes: Notes) -> Manifest:
    parallel, patience_s = run.recipe.parallel, run.recipe.storage.patience_s
    with patient(patience_s):
        images = read_manifest(job.images).samples
    with run.console.progress(images, what) as tally:
        return tokenize_all(
            job,
            actors=Bounds(parallel.min_workers, parallel.max_workers),
            gpus_per_actor=float(parallel.gpus_per_worker > 0),
            timing=Timing(grace_s=parallel.grace_s, hang_s=parallel.hang_timeout_s, patience_s=patience_s),
            on_progress=lambda done, total: tally.update(done),
            make_bad=lambda total: BadSamples("tokens", total, run.recipe.data, notes),
        )
