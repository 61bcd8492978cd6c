"""``oar evaluate --flexibility``: what models do in orders that they were, and were not, trained for.

OUT/flexibility.json    all numbers
OUT/arrays/*.npz        the values of each image, a file a model
OUT/pieces/             results that are kept (evaluation.flexibility.pieces)
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.data.hashing import permutations
from oar_scale.errors import UserError
from oar_scale.evaluation.flexibility.comparison import arm_differences, arm_figures
from oar_scale.evaluation.flexibility.likelihood import (
    Orders,
    likelihood_measures,
    likelihood_sources,
    own_order_pieces,
    own_orders,
)
from oar_scale.evaluation.flexibility.pieces import Arrays, Piece, PieceFolder, piece_id
from oar_scale.evaluation.flexibility.subjects import Arm, Source, by_measure
from oar_scale.evaluation.likelihood import random_orders
from oar_scale.orders.order_files import run_files
from oar_scale.orders.policies import grid_policies
from oar_scale.orders.policies.mean import mean_order
from oar_scale.results.flexibility import FlexibilityResults, Measure, MeasuredModel
from oar_scale.run.artifacts import read_tokens, read_train_orders
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import devices_here, threads_here
from oar_scale.storage import join, open_storage, write_json
from oar_scale.studies.flexibility_models import HeldoutImages, find_models, named_arms, open_arms, read_images, run_of

FORMAT = 1
"""Of ``flexibility.json``."""
FIXED_POLICIES = ("raster", "halton", "spiral")
TITLES = {
    "random": "random",
    "random seen": "random, of the pretraining",
    "extracted": "extracted, of training images",
    "mean": "mean",
    **{name: name for name in FIXED_POLICIES},
}


@dataclass(frozen=True)
class FlexibilityRequest:
    """What the command line asks for."""

    models: tuple[str, ...]
    out: str
    run: str | None = None
    split: str = "heldout"
    images: int = 256
    against: str | None = None
    """Label of the arm that the others are compared with; None: ``control`` if there is one, else the first."""
    minutes: float | None = None


def run_flexibility(request: FlexibilityRequest) -> bool:
    """Measure what is not measured yet, then write the report.

    Returns:
        Whether it is done: False where the minutes were over before.

    Raises:
        UserError: models that do not fit together, images that are not there, or a model whose answers are no numbers.
    """
    until = None if request.minutes is None else time.time() + 60 * request.minutes
    named = named_arms(request.models)
    against = _against(request.against, [arm.label for arm in named])
    targets = find_models(named)
    run = run_of(targets, request.run)
    devices = devices_here(run.recipe.parallel)
    torch.set_num_threads(threads_here(run.recipe.parallel.cpu_threads * len(devices)))
    images = read_images(run, request.split, 0, request.images)
    arms = open_arms(named, targets, images, torch.device(devices[0]))
    work = _Work(run, PieceFolder(join(request.out, "pieces")), devices, until)
    fixed, notes = fixed_orders(images)

    found = own_order_pieces(arms, images.measured, run.recipe.extract.tie_seed, run.recipe.parallel.precision)
    if not work.do([piece for pieces in found.values() for piece in pieces], "own orders"):
        return False
    sources = likelihood_sources(arms, images.measured, fixed, own_orders(found, work.results))
    measures = likelihood_measures(arms, {name: TITLES[name] for name in fixed})
    if not work.do([piece for source in sources for piece in source.pieces], "likelihoods"):
        return False
    results = _results(request, images, arms, against, measures, sources, work.results, notes)
    write_results(request.out, results, sources, work.results, images.tokens.keys)
    run.console.say(f"  flexibility: {join(request.out, 'flexibility.json')}")
    return True


@dataclass
class _Work:
    """The pieces of a report, and the time there is for them."""

    run: Run
    folder: PieceFolder
    devices: Sequence[str]
    until: float | None

    def __post_init__(self) -> None:
        self.results: dict[str, Arrays] = {}

    def do(self, pieces: Sequence[Piece], what: str) -> bool:
        """Have these results; whether all are there. Says what is left otherwise."""
        wanted = {piece_id(piece): piece for piece in pieces}
        with self.run.console.progress(len(wanted), f"{what}: piece") as tally:
            self.results |= self.folder.run(wanted.values(), self.devices, self.run.recipe.parallel.cpu_threads, self.until, tally.advance)
        left = len(wanted.keys() - self.results.keys())
        if left:
            self.run.console.say(
                f"  stopped after its minutes: {left} of {len(wanted)} pieces of {what} are left, and what comes after them. "
                "The same command goes on from here."
            )
        return not left


def _against(given: str | None, labels: Sequence[str]) -> str:
    if given is None:
        return "control" if "control" in labels else labels[0]
    if given not in labels:
        raise UserError(f"--against {given}: no arm has this label. There are: {', '.join(labels)}")
    return given


def fixed_orders(images: HeldoutImages) -> tuple[dict[str, Orders], tuple[str, ...]]:
    """Orders [S, N] that are the same for all models, by name, and what was left out and why.

    ``random`` is of a seed that nobody trained with; ``random seen`` are those in which the run's pretraining has seen its first samples;
    ``extracted`` are the stored ones of its first training images, given to these images.
    """
    run, (count, cells) = images.run, images.measured.codes_SN.shape
    grid = images.measured.grid
    seen_SN = permutations("order", cells, run.recipe.seed, 0, np.arange(count))
    orders: dict[str, NDArray[np.integer]] = {"random": random_orders(count, cells, run.recipe.seed).numpy(), "random seen": seen_SN}
    orders |= {name: np.tile(policy.path(grid), (count, 1)) for name, policy in grid_policies().items() if name in FIXED_POLICIES}
    notes = []
    try:
        orders["mean"] = np.tile(mean_order(run_files(run.at()), grid), (count, 1))
        extracted_SN = read_train_orders(run, read_tokens(run, "train"))
        orders["extracted"] = np.resize(extracted_SN, (count, cells)) if len(extracted_SN) < count else extracted_SN[:count]
    except UserError as error:
        notes.append(f"Mean and extracted orders were left out: {error}")
    return {name: each.astype(np.uint16) for name, each in orders.items()}, tuple(notes)


def _results(
    request: FlexibilityRequest,
    images: HeldoutImages,
    arms: Sequence[Arm],
    against: str,
    measures: tuple[Measure, ...],
    sources: Sequence[Source],
    results: dict[str, Arrays],
    notes: tuple[str, ...],
) -> FlexibilityResults:
    values = by_measure(sources, results)
    return FlexibilityResults(
        run=images.run.at(),
        split=request.split,
        images=len(images.tokens.keys),
        against=against,
        models=tuple(
            MeasuredModel(model.label, model.seed, model.file.where, model.file.id, _arrays_file(model.label, model.seed))
            for arm in arms
            for model in arm.models
        ),
        measures=measures,
        figures=arm_figures(measures, values),
        differences=arm_differences(measures, values, against),
        notes=notes,
    )


def _arrays_file(label: str, seed: int) -> str:
    return f"arrays/{label}-{seed}.npz"


def write_results(out: str, results: FlexibilityResults, sources: Sequence[Source], kept: dict[str, Arrays], keys: Sequence[str]) -> None:
    """Write the values of each image, then ``flexibility.json``, which makes them count."""
    for model in results.models:
        arrays = {each.measure: each.values(kept) for each in sources if (each.label, each.seed) == (model.label, model.seed)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # the names are never one of its options
        uri = join(out, model.arrays)
        open_storage(uri).write(uri, buffer.getvalue())
    write_json(join(out, "arrays", "images.json"), {"split": results.split, "keys": list(keys)})
    write_json(join(out, "flexibility.json"), {"format": FORMAT, **asdict(results)})
