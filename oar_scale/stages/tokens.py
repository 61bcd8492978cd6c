"""Stage ``tokens``: image shards into token shards, by a pool of Ray actors."""

from __future__ import annotations

from typing import Any

from oar_scale.data.manifest import Manifest, read_manifest
from oar_scale.data.tokenize_pool import TokenizeJob, tokenize_all
from oar_scale.stages.run import Run

EXPECTED = "10 s to start the actors, then about 200 images and views a second"


def run_tokens(run: Run) -> dict[str, Any]:
    """Write ``tokens/train`` (all views) and ``tokens/heldout`` (the images as they are); returns the counts."""
    counts, parallel = {}, run.recipe.parallel
    for split in ("train", "heldout"):
        views = run.recipe.tokenizer.views if split == "train" else ("center",)
        job = TokenizeJob(run.at("images", split), run.at("tokens", split), run.vq_uri, views, run.cache, parallel.cpu_threads)
        counts[split] = _tokenize(run, job, f"{split} images").samples
    return {**counts, "views": list(run.recipe.tokenizer.views)}


def _tokenize(run: Run, job: TokenizeJob, what: str) -> Manifest:
    with run.console.progress(read_manifest(job.images).samples, what) as tally:
        return tokenize_all(job, actors=run.recipe.parallel.workers, on_progress=lambda done, total: tally.update(done))
