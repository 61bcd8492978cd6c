"""``oar distance SAMPLES REFERENCE``: how far a set of images is from another one, and what else its features say."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from oar_scale import __version__
from oar_scale.errors import UserError
from oar_scale.evaluation.adm_batch import Statistics, read_batch, read_statistics, write_batch, write_statistics
from oar_scale.evaluation.extractors import Extractor, ExtractorSpec, extractor_id, load_extractor
from oar_scale.evaluation.image_marks import Pairing
from oar_scale.evaluation.image_sets import ImageSet, find_images
from oar_scale.evaluation.set_figures import FEWEST, OF_SAMPLES_ALONE, Comparison, Side, figure_names
from oar_scale.json_object import JsonObject
from oar_scale.observe.console import Console
from oar_scale.shard_pool.feature_pool import FeatureJob, SetFeatures, compute_features
from oar_scale.shard_pool.ledger import Record
from oar_scale.shard_pool.pool_messages import event_message
from oar_scale.storage import absolute, write_json

FORMAT = 2
OF_FEATURES = [figure for figure in FEWEST if figure not in OF_SAMPLES_ALONE]
"""The figures for which features of images are kept."""


@dataclass(frozen=True, kw_only=True)
class DistanceRequest:
    """What the command line says."""

    samples: str
    reference: str | None = None
    extractor: ExtractorSpec
    metrics: tuple[str, ...] = ()
    """None: all that are possible."""
    size: int | None = None
    cache: str = ""
    """Folder or URI of features that were computed; default: below the user's cache folder."""
    actors: int | None = None
    gpus_per_actor: float = 0
    batch: int = 64
    kept: int = 50_000
    seed: int = 0
    paired: Pairing | None = None
    """What images of both sides that belong together have in common; KID leaves out such pairs."""
    out: str | None = None
    export_npz: str | None = None
    export_statistics: str | None = None

    @property
    def figures(self) -> bool:
        """Whether figures are asked for, beside or instead of what is exported."""
        return bool(self.reference or self.metrics or self.out)


def measure_distance(request: DistanceRequest, say: Callable[[str], None]) -> None:
    """Compute the figures and print them; write what is to be written.

    Args:
        say: called with each line for people.

    Raises:
        UserError: sets that cannot be read or compared, a figure that cannot be computed, weights of another network.
        Requeue: stopped by a signal; the same command resumes.
    """
    _check(request)
    if request.export_npz:
        images = find_images(request.samples, request.size)
        count = _export(images, request.export_npz)
        say(f"{request.export_npz}: {count} images")
        if not request.figures and not request.export_statistics:
            return
    network = load_extractor(request.extractor)  # a wrong file of weights, or figure, is named before images are read
    names = figure_names(request.metrics, network.label, network.standard)
    if request.reference is None and (compared := [name for name in names if name not in OF_SAMPLES_ALONE]):
        raise UserError(f"--metrics {compared[0]}: it compares samples with a reference. Name one.")
    # Both are looked for before the features of one are computed, which may take hours.
    found = [_Found.at(request, where, network) for where in (request.samples, request.reference) if where]
    if request.paired and (alone := next((each.where for each in found if not each.images), None)):
        raise _no_pairs(request, f"{alone} holds statistics alone")
    samples, side = _side(request, found[0], say)
    reference, other = _side(request, found[1], say) if len(found) > 1 else (Side("no reference", None), None)
    if side is not None and other is not None and side != other:
        raise UserError(
            f"the images of {request.samples} are {_shown(side)} pixels, those of {request.reference} {_shown(other)}: their sizes alone "
            "would set them apart. --size N brings all to their middle square of N x N."
        )
    if request.export_statistics:
        _export_statistics(request, samples)
        say(f"{request.export_statistics}: statistics of {request.samples}")
        if not request.figures:
            return
    comparison = Comparison(samples, reference, network.label, network.standard, request.kept, request.seed, request.paired)
    wanted = comparison.wanted(names)
    if request.paired and "kid" not in wanted:
        raise UserError(f"--paired {request.paired}: only kid leaves pairs out, and it cannot be computed: {comparison.why_not('kid')}")
    if not wanted and (few := comparison.left_out(wanted)):
        raise UserError("; ".join(few))
    if not wanted:
        raise UserError(f"{request.samples}: nothing can be measured of it without a reference. Name one, or --export-npz FILE.")
    figures, notes = comparison.figures(wanted), comparison.notes(wanted)
    notes += [] if names else [f"{why}: left out" for why in comparison.left_out(wanted)]
    for name, figure in figures.items():
        say(f"  {_line(name, figure)}")
    for note in notes:
        say(f"  note: {note}")
    if request.out:
        write_json(request.out, _record(request, (samples, reference), (side, other), figures, notes))
        say(request.out)


def default_cache() -> str:
    """Where features are kept if nobody says where."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "oar_scale", "features")


def _check(request: DistanceRequest) -> None:
    if not 0 <= request.gpus_per_actor < math.inf:
        raise UserError(f"--gpus-per-actor {request.gpus_per_actor} must be a number from 0")
    if request.gpus_per_actor and request.actors is None:
        raise UserError("--gpus-per-actor means nothing without --actors: leave it out, a GPU of this machine is used as it is")
    if request.export_npz and not request.export_npz.lower().endswith(".npz"):
        raise UserError(f"--export-npz {request.export_npz}: name a file .npz")
    if request.export_statistics and not request.export_statistics.lower().endswith(".npz"):
        raise UserError(f"--export-statistics {request.export_statistics}: name a file .npz")
    if request.paired and request.reference is None:
        raise _no_pairs(request, "there is no reference")
    if request.paired and request.metrics and "kid" not in request.metrics:
        raise UserError(f"--paired {request.paired}: only kid leaves pairs out, and it is not among --metrics")
    fewest = max((max(FEWEST[name]) for name in request.metrics or OF_FEATURES if name in OF_FEATURES), default=0)
    if request.kept < fewest:
        raise UserError(f"--kept {request.kept}: the figures need {fewest} images a side, so keep as many")


def _no_pairs(request: DistanceRequest, why: str) -> UserError:
    return UserError(f"--paired {request.paired}: only kid leaves pairs out, and it compares the images of two sets; {why}")


@dataclass(frozen=True)
class _Found:
    """What lies at a side of the comparison."""

    where: str
    statistics: Statistics | None
    images: ImageSet | None
    """None where there are statistics alone."""

    @classmethod
    def at(cls, request: DistanceRequest, where: str, extractor: Extractor) -> _Found:
        """Look for it. Raises UserError where nothing is, or statistics of other features alone."""
        is_file = where.lower().endswith(".npz")
        statistics, has_images = read_statistics(where) if is_file else None, not is_file or read_batch(where) is not None
        if statistics is not None:
            own = extractor_id(request.extractor)
            # ADM's statistics are those of the network that FID is defined with, and say nothing of it.
            fits = statistics.extractor == own or (statistics.extractor is None and extractor.standard)
            if not fits and not has_images:
                made = statistics.extractor or "the InceptionV3 that FID is defined with"
                raise UserError(f"{where}: its statistics are of other features ({made}), and these are {own}. Name a set of images.")
            statistics = statistics if fits else None
        if not has_images and statistics is None:
            raise UserError(f"{where}: holds neither images (arr_0) nor statistics (mu, sigma)")
        return cls(where, statistics, find_images(absolute(where), request.size) if has_images else None)


def _side(request: DistanceRequest, found: _Found, say: Callable[[str], None]) -> tuple[Side, tuple[int, int] | None]:
    """One side of the comparison, and the size of its images; None where there are statistics alone."""
    given = found.statistics.layers if found.statistics else {}
    count = found.statistics.count if found.statistics else None
    if found.images is None:
        return Side(found.where, None, given, count), None
    features = _features(request, found.images, say)
    return Side(found.where, features.files, given, count), features.side


def _features(request: DistanceRequest, images: ImageSet, say: Callable[[str], None]) -> SetFeatures:
    import torch

    cuda = request.gpus_per_actor > 0 if request.actors else torch.cuda.is_available()
    job = FeatureJob(
        images=images,
        extractor=replace(request.extractor, weights=request.extractor.weights and os.path.abspath(request.extractor.weights)),
        cache=absolute(request.cache or default_cache()),
        batch=request.batch,
        cpu_threads=max(1, (os.cpu_count() or 1) // (request.actors or 1)) if "RAY_ADDRESS" not in os.environ else 1,
        cuda=cuda,
    )
    with Console(sys.stderr).progress(len(images.parts), f"features of {images.where}: part") as tally:

        def event(kind: str, fields: Record) -> None:
            if message := event_message(kind, fields):
                tally.note(message)

        found = compute_features(
            job,
            actors=request.actors,
            gpus_per_actor=request.gpus_per_actor,
            on_progress=lambda done, _: tally.update(done),
            on_event=event,
        )
    reused = (
        "" if found.computed == len(images.parts) else f", {len(images.parts) - found.computed} of {len(images.parts)} parts from the cache"
    )
    say(f"{images.where}: {found.files.images} images of {_shown(found.side)}{reused}")
    return found


def _export(images: ImageSet, path: str) -> int:
    """Write all images of a set as an ADM batch; their number."""
    first, count = None, 0
    for part in images.parts:  # the number comes first in the file
        for image in images.read(part):
            first, count = first or image.pixels.shape, count + 1
    if first is None:
        raise UserError(f"{images.where}: holds no image")
    every = (image.pixels for part in images.parts for image in images.read(part))
    write_batch(path, every, count, (first[0], first[1]))
    return count


def _export_statistics(request: DistanceRequest, side: Side) -> None:
    if side.files is None or request.export_statistics is None:
        raise UserError(f"{request.samples}: these are statistics already")
    layers = [layer for layer in ("pooled", "spatial") if layer in side.layers]
    moments = {str(layer): side.moments(layer) for layer in layers}
    write_statistics(request.export_statistics, moments, extractor_id(request.extractor))


def _line(name: str, figure: JsonObject) -> str:
    line = f"{name} {figure['value']:.4f}" + (f" +- {figure['error']:.4f}" if "error" in figure else "")
    line += f" [{figure['low']:.4f}, {figure['high']:.4f}]" if "low" in figure else ""
    sides = [
        f"{figure[side] if figure[side] is not None else 'an unknown number of'} {side}"
        for side in ("samples", "reference")
        if side in figure
    ]
    sides += [f"pairs of one {figure['paired']} left out"] if figure.get("paired") else []
    line += f"  ({', '.join(sides)}"
    if equal := figure.get("equal_sizes"):
        line += (
            f"; of {equal['images']} images a side: {equal['samples']:.4f}, two halves of the reference {equal['halves_of_reference']:.4f}"
        )
    return line + ")"


def _shown(side: tuple[int, int]) -> str:
    return f"{side[1]} x {side[0]}"


def _record(
    request: DistanceRequest,
    sides: Sequence[Side],
    pixels: Sequence[tuple[int, int] | None],
    figures: JsonObject,
    notes: list[str],
) -> JsonObject:
    """What ``--out`` writes."""
    names = ("samples", "reference") if request.reference else ("samples",)
    described = {
        name: {"where": side.where, "images": side.files.images if side.files else side.given_count, "pixels": size and [size[1], size[0]]}
        for name, side, size in zip(names, sides, pixels, strict=False)
    }
    return {
        "format": FORMAT,
        **described,
        "features": {**asdict(request.extractor), "id": extractor_id(request.extractor)},
        "size": request.size,
        "seed": request.seed,
        "figures": figures,
        "notes": notes,
        "oar_scale": __version__,
    }
