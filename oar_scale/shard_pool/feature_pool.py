"""The features of a set of images, by a pool of actors: a part of the set at a time.

    a tar, or 1000 images  ->  CACHE/SET-EXTRACTOR/PART.npz, then CACHE/SET-EXTRACTOR/ledger/PART.json

The folder is named by the content of the set and by the extractor, so that a reference is computed once. A pool that was killed goes on
where it was; statistics are merged in the order of the set, so that they are the same to the last bit. What happens when something dies:
see ``oar_scale/shard_pool``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from oar_scale.config.fingerprint import fingerprint
from oar_scale.errors import UserError
from oar_scale.evaluation.extractors import LAYERS, ExtractorSpec, extractor_id, load_extractor
from oar_scale.evaluation.feature_files import FILE_FORMAT, FeatureFiles, feature_file, part_features
from oar_scale.evaluation.image_sets import ImageSet
from oar_scale.shard_pool import Bounds, OnStep, PoolReport, ShardOutput, ShardResult, Timing, Worker, run_pool
from oar_scale.shard_pool.pool_run import lost_outputs
from oar_scale.shard_pool.pool_types import ArrayTask, OnEvent
from oar_scale.storage import join


@dataclass(frozen=True)
class FeatureJob:
    """Everything an actor needs to know: names and settings, no images."""

    images: ImageSet
    extractor: ExtractorSpec
    cache: str
    """Folder URI, shared by all hosts of the pool."""
    batch: int = 64
    """Images that go through the network at once."""
    cpu_threads: int = 1
    cuda: bool = False

    @cached_property
    def extractor_id(self) -> str:
        """Names all that decides about the features of an image."""
        return extractor_id(self.extractor)

    @property
    def out(self) -> str:
        """Folder URI of the features."""
        made_by = fingerprint({"extractor": self.extractor_id, "format": FILE_FORMAT})
        return join(self.cache, f"{self.images.fingerprint}-{made_by}")

    def make_worker(self) -> Worker:
        """Load the network; called in the actor's process."""
        return FeatureWorker(self)


class FeatureWorker:
    """Computes the features of one part after the other."""

    def __init__(self, job: FeatureJob) -> None:
        torch.set_num_threads(job.cpu_threads)
        self.job, self.extractor, self.out = job, load_extractor(job.extractor), job.out
        self.extractor.to("cuda" if job.cuda else "cpu")
        self.parts = {part.name: part for part in job.images.parts}

    def run(self, shard: str, on_step: OnStep) -> ShardOutput:
        """The features of a part; the result says how many images it has, and of which size.

        Raises:
            UserError: an image that cannot be read, images of several sizes, or features that are no numbers.
        """
        part = self.parts[shard]
        found = part_features(self.job.images, part, self.extractor, self.job.batch, on_step)
        return ShardOutput(
            uri=join(self.out, feature_file(shard)),
            data=found.data,
            made_from={"images": part.fingerprint},
            facts={"count": found.images, "side": found.side, "layers": found.layers, "bytes": len(found.data)},
        )


@dataclass(frozen=True)
class SetFeatures:
    """The features of a set, and the size of its images."""

    files: FeatureFiles
    side: tuple[int, int]
    """Height and width."""
    computed: int
    """Parts that were computed now; the others were in the cache."""


def compute_features(
    job: FeatureJob,
    *,
    actors: int | Bounds | None,
    gpus_per_actor: float = 0,
    max_retries: int = 3,
    timing: Timing | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_event: OnEvent | None = None,
) -> SetFeatures:
    """Compute the features of every part that is not in the cache yet, or whose file is gone or has another size.

    Args:
        actors: None: one process beside this one, without Ray.
        on_progress: called with (parts done, parts in all), at the start and after every part.

    Raises:
        UserError: a part could not be computed, the set is empty, or its images have several sizes.
        Requeue: stopped by a signal; the same call resumes.
    """
    total, done = len(job.images.parts), 0

    def lost(results: Mapping[str, ShardResult]) -> dict[str, str]:
        return lost_outputs(job.out, {part: (feature_file(part), result["bytes"]) for part, result in results.items()}, "features")

    def finished(part: str, result: ShardResult, _: PoolReport) -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, total)

    if on_progress:
        on_progress(0, total)
    report = run_pool(
        job.make_worker,
        [part.name for part in job.images.parts],
        join(job.out, "ledger"),
        actors=1 if actors is None else actors,
        gpus_per_actor=gpus_per_actor,
        cpu_threads=job.cpu_threads,
        max_retries=max_retries,
        timing=timing,
        config={"images": job.images.fingerprint, "extractor": job.extractor_id},
        array=ArrayTask(0, 1) if actors is None else None,
        find_lost=lost,
        on_progress=finished,
        on_event=on_event,
    )
    report.raise_for_poison()
    return gathered(job, report)


def gathered(job: FeatureJob, report: PoolReport) -> SetFeatures:
    """The features of a set whose parts are all done. Raises UserError where it is empty, or its images have several sizes."""
    results = {part: result for part, result in report.done.items() if result["count"]}
    if not results:
        raise UserError(f"{job.images.where}: holds no image")
    sides = {part: (int(result["side"][0]), int(result["side"][1])) for part, result in results.items()}
    first = next(iter(sides.values()))
    for part, side in sides.items():
        if side != first:
            raise UserError(
                f"{job.images.where}: the images of {part} are {side[1]} x {side[0]} pixels, others are {first[1]} x {first[0]}. Sets are "
                "compared at one size: --size N brings every image to its middle square of N x N."
            )
    layers = tuple(layer for layer in LAYERS if all(layer in result["layers"] for result in results.values()))
    counts = {part: int(result["count"]) for part, result in results.items()}
    return SetFeatures(FeatureFiles(job.out, counts, layers), first, len(report.done) - report.already_done)
