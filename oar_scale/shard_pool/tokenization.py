"""Token shards of a whole folder of image shards: the tokenizer in a pool of actors, a shard at a time.

IMAGES/00000.tar  ->  TOKENS/00000.tar, then TOKENS/ledger/00000.tar.json, and TOKENS/manifest.json last
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.schema import ClipTextConfig, DataConfig
from oar_scale.data.bad_samples import BadSamples
from oar_scale.data.manifest import Manifest, ShardInfo, read_manifest, write_manifest
from oar_scale.data.notes import Notes, escaped
from oar_scale.data.tokenize import pack_tokens, token_manifest
from oar_scale.errors import UserError
from oar_scale.shard_pool import Bounds, OnStep, PoolReport, ShardOutput, ShardResult, Timing, Worker, run_pool
from oar_scale.shard_pool.pool_run import lost_outputs
from oar_scale.storage import join
from oar_scale.storage.patience import patient
from oar_scale.tokenizers.clip_text import ClipText
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.vq import load_vq, vq_id


@dataclass(frozen=True)
class TokenizeJob:
    """Everything an actor needs to know: names and settings, no data."""

    images: str
    """Folder of image shards."""
    tokens: str
    """Folder the token shards go to."""
    vq: str
    """The image tokenizer's weights."""
    views: tuple[str, ...]
    cache_dir: str
    """Local copies of remote shards."""
    cpu_threads: int = 1
    text: ClipTextConfig | None = None
    """The text tower whose features of the captions are stored as well."""
    cuda: bool = False
    cache_bytes: int | None = None
    """Bound of the copies; None = no bound."""

    def make_worker(self) -> Worker:
        """Load the tokenizer; called in the actor's process."""
        return TokenizeWorker(self)


class TokenizeWorker:
    """Tokenizes one shard after the other."""

    def __init__(self, job: TokenizeJob) -> None:
        torch.set_num_threads(job.cpu_threads)
        self.job, self.vq, self.text = job, load_vq(job.vq), _tower(job)
        self.origin = _origin(self.vq, job.views, self.text)
        if job.cuda:
            self.vq.cuda()
            if self.text is not None:
                self.text.to("cuda")
        self.shards = {shard.name: shard for shard in read_manifest(job.images).shards}

    def run(self, shard: str, on_step: OnStep) -> ShardOutput:
        """Make the token shard of an image shard; the result has its entry for the manifest, its bad samples, and what it was made from."""
        source = self.shards[shard]
        tokens = pack_tokens(
            self.job.images, source, self.vq, self.job.views, self.job.cache_dir, self.text, self.job.cache_bytes, on_batch=on_step
        )
        return ShardOutput(
            uri=join(self.job.tokens, shard),
            data=tokens.data,
            made_from={"origin": self.origin, "images_crc32c": source.crc32c},
            facts={"shard": tokens.info.model_dump(), "bad_samples": tokens.bad},
        )


def tokenize_all(
    job: TokenizeJob,
    *,
    actors: int | Bounds,
    gpus_per_actor: float = 0,
    max_retries: int = 3,
    timing: Timing | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    make_bad: Callable[[int], BadSamples] | None = None,
) -> Manifest:
    """Tokenize every shard of ``job.images`` that is not done yet, then write the manifest.

    Args:
        on_progress: called with (images done, images in all), at the start and after every shard.
        make_bad: what becomes of samples that cannot be used, for so many images in all; default: that of a recipe which says nothing.

    Raises:
        UserError: a shard could not be tokenized, too many samples cannot be used, or the ledger is of another tokenizer, text tower,
            other views or images.
    """
    timing = timing or Timing()
    with patient(timing.patience_s):
        source, vq, text = read_manifest(job.images), load_vq(job.vq), _tower(job)
    bad = make_bad(source.samples) if make_bad else BadSamples("tokens", source.samples, DataConfig(), Notes())
    done, origin, shards = 0, _origin(vq, job.views, text), {shard.name: shard for shard in source.shards}

    def check(shard: str, result: ShardResult) -> None:
        if (result["origin"], result["images_crc32c"]) != (origin, shards[shard].crc32c):
            raise UserError(
                f"{job.tokens}: the codes of {shard} were made with another tokenizer, text tower, other views or other images.\n"
                "Codes of two tokenizers must not mix: remove this folder, or tokenize into another."
            )

    def lost(results: Mapping[str, ShardResult]) -> dict[str, str]:
        for shard, result in results.items():
            check(shard, result)
        return lost_outputs(job.tokens, {shard: (shard, result["shard"]["bytes"]) for shard, result in results.items()}, "token shard")

    def finished(shard: str, result: ShardResult, _: PoolReport) -> None:
        nonlocal done
        check(shard, result)
        done += shards[shard].samples
        for row, key, fault in result.get("bad_samples", []):
            name = escaped(f"{shard}/{key}")
            bad.add(f"{name} (row {row})" if name in bad.skipped else name, fault)
        bad.check(done)
        if on_progress:
            on_progress(done, source.samples)

    if on_progress:
        on_progress(0, source.samples)
    report = run_pool(
        job.make_worker,
        list(shards),
        join(job.tokens, "ledger"),
        actors=actors,
        gpus_per_actor=gpus_per_actor,
        cpu_threads=job.cpu_threads,
        max_retries=max_retries,
        timing=timing,
        config={"tokenizer, text tower and views": origin},
        find_lost=lost,
        on_progress=finished,
    )
    report.raise_for_poison()
    bad.check(done)
    made = [info for result in report.done.values() if (info := ShardInfo(**result["shard"])).samples]
    manifest = token_manifest(made, vq, job.views, source.attribution, text, bad.skipped)
    with patient(timing.patience_s):
        write_manifest(job.tokens, manifest)
    return manifest


def _tower(job: TokenizeJob) -> ClipText | None:
    text = job.text
    return None if text is None else ClipText.load(text.architecture, text.weights, features=text.features)


def _origin(vq: ImageTokenizer, views: tuple[str, ...], text: ClipText | None) -> str:
    """Names everything but the images that decides about the bytes of a token shard."""
    features = {} if text is None else {"text": text.content_id, "features": text.spec.features}
    return fingerprint({"tokenizer": vq_id(vq), "views": list(views), **features})
