"""``oar evaluate --flexibility``: what models do in orders that they were, and were not, trained for.

OUT/index.html, OUT/flexibility.json    one page with everything; all numbers
OUT/arrays/*.npz                        the values of each image, a file a model
OUT/pieces/                             results that are kept (evaluation.flexibility.pieces)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.run_sections import SAMPLE_SCORES
from oar_scale.data.hashing import derived_seed
from oar_scale.errors import UserError
from oar_scale.evaluation.extractors import ExtractorSpec
from oar_scale.evaluation.flexibility.edits import edit_measures, edit_sources
from oar_scale.evaluation.flexibility.features import FeatureNetwork, feature_network
from oar_scale.evaluation.flexibility.likelihood import Orders, likelihood_measures, likelihood_sources, own_order_pieces, own_orders
from oar_scale.evaluation.flexibility.pieces import KeptResults, Piece, PieceFolder, piece_id
from oar_scale.evaluation.flexibility.sampling import SampleWork, sample_measures
from oar_scale.evaluation.flexibility.subjects import Arm, Source
from oar_scale.evaluation.flexibility.sweep import Sweep, best_sources, parse_sweep, settings_of
from oar_scale.generation.settings import SampleSettings
from oar_scale.results.flexibility import Measure
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import devices_here, threads_here
from oar_scale.storage import join
from oar_scale.studies.flexibility_models import (
    CHOSEN_ON,
    FEWEST,
    HeldoutImages,
    find_models,
    first_images,
    named_arms,
    open_arms,
    run_of,
    sweep_images,
)
from oar_scale.studies.flexibility_orders import DRAWN, TITLES, fixed_orders
from oar_scale.studies.flexibility_results import Measured, remove_other_report, write_report

CHAPTERS = ("likelihood", "samples", "edits")


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
    chapters: tuple[str, ...] = CHAPTERS
    sweep: str | None = None
    extractor: ExtractorSpec = field(default_factory=ExtractorSpec)
    minutes: float | None = None


def run_flexibility(request: FlexibilityRequest) -> bool:
    """Measure what is not measured yet, then write the report.

    Returns:
        Whether it is done: False where the minutes were over before.

    Raises:
        UserError: models that do not fit together, images that are not there, or a model whose answers are no numbers.
    """
    until = None if request.minutes is None else time.time() + 60 * request.minutes
    plan = _plan(request)
    remove_other_report(request.out, plan.call)
    run, work = plan.images.run, _Work(plan.images.run, PieceFolder(join(request.out, "pieces")), until)

    own = own_order_pieces(plan.arms, plan.images.measured, run.recipe.extract.tie_seed, run.recipe.parallel.precision)
    if "likelihood" not in request.chapters:
        own = {}
    first = plan.first_sources()
    chosen_on = plan.sweep.sources() if plan.sweep else []
    found = [piece for pieces in own.values() for piece in pieces]
    if not work.do([*found, *_pieces([*first, *chosen_on])], "own orders, samples and edits"):
        return False

    rows = plan.sweep.rows(work.results) if plan.sweep else ()
    second = likelihood_sources(plan.arms, plan.images.measured, plan.fixed, own_orders(own, work.results)) if own else []
    second += best_sources(plan.samples(), rows) if rows else []
    if not work.do(_pieces(second), "likelihoods and best samples"):
        return False
    measured = Measured(
        arms=plan.arms,
        images=plan.images,
        against=plan.against,
        measures=plan.measures(),
        sources=[*first, *second],
        kept=work.results,
        sampling=describe(plan.settings),
        features=plan.network.spec.name,
        sweep=rows,
        sweep_images=plan.sweep_images,
        notes=plan.notes,
        call=plan.call,
    )
    write_report(request.out, measured)
    run.console.say(f"  flexibility: {join(request.out, 'index.html')}")
    return True


@dataclass(frozen=True)
class _Plan:
    """What is measured of whom."""

    chapters: tuple[str, ...]
    arms: list[Arm]
    images: HeldoutImages
    fixed: dict[str, Orders]
    notes: tuple[str, ...]
    against: str
    settings: SampleSettings
    network: FeatureNetwork
    sweep: Sweep | None = None
    sweep_images: str = ""

    @property
    def call(self) -> str:
        """A hash of all that the report depends on."""
        images, sweep, recipe = self.images, self.sweep, self.images.run.recipe
        orders = {name: hashlib.sha256(order_SN.tobytes()).hexdigest() for name, order_SN in self.fixed.items()}
        return fingerprint(
            {
                "arms": [[arm.label, [model.file.id for model in arm.models]] for arm in self.arms],
                "images": [
                    images.run.at(),
                    images.split,
                    images.tokens.keys,
                    images.tokens.captions,
                    images.families,
                    images.measured.vq.id,
                ],
                "asked": [list(self.chapters), self.against, asdict(self.settings), self.network.id],
                "run": [orders, recipe.seed, recipe.extract.tie_seed, recipe.parallel.precision],
                "sweep": [list(sweep.choices), self.sweep_images] if sweep else None,
            }
        )

    def samples(self) -> SampleWork:
        """How samples are drawn and compared."""
        return _sample_work(self.arms, self.images, self.network, self.settings, self.images.run.recipe.seed)

    def first_sources(self) -> list[Source]:
        """All but what has to wait for own orders and for the sweep."""
        sources, recipe = list[Source](), self.images.run.recipe
        if "samples" in self.chapters:
            drawn = {name: order_SN for name, order_SN in self.fixed.items() if name in DRAWN}
            work = self.samples()
            sources += [*work.matrix(drawn, chosen_orders(self.settings)), *work.diversity()]
        if "edits" in self.chapters:
            sources += edit_sources(self.arms, self.images.measured, self.network, self.settings, recipe.seed, recipe.parallel.precision)
        return sources

    def _title(self, name: str) -> str:
        return TITLES[name].format(score=self.images.run.recipe.extract.score)

    def measures(self) -> tuple[Measure, ...]:
        """All that the report has."""
        measures: tuple[Measure, ...] = ()
        if "likelihood" in self.chapters:
            measures += likelihood_measures(self.arms, {name: self._title(name) for name in self.fixed})
        if "samples" in self.chapters:
            columns = {name: self._title(name) for name in DRAWN if name in self.fixed}
            columns |= {name: f"chosen by {name}" for name in chosen_orders(self.settings)}
            columns |= {"best": f"chosen by {self.settings.score}, at its best settings"} if self.sweep else {}
            measures += sample_measures(columns, self.network, "best" if self.sweep else self.settings.score)
        return measures + edit_measures(self.network) if "edits" in self.chapters else measures


@dataclass
class _Work:
    """The pieces of a report, and the time there is for them."""

    run: Run
    folder: PieceFolder
    until: float | None
    results: KeptResults = field(default_factory=lambda: KeptResults({}))

    def do(self, pieces: Sequence[Piece], what: str) -> bool:
        """Have these results; whether all are there. Says what is left otherwise."""
        wanted = {piece_id(piece): piece for piece in pieces}
        parallel = self.run.recipe.parallel
        with self.run.console.progress(len(wanted), f"{what}: piece") as tally:
            self.results |= self.folder.run(wanted.values(), devices_here(parallel), parallel.cpu_threads, self.until, tally.advance)
        left = len(wanted.keys() - self.results.keys())
        if left:
            self.run.console.say(
                f"  stopped after its minutes: {left} of {len(wanted)} pieces of {what} are left, and what comes after them. "
                "The same command goes on from here."
            )
        return not left


def _plan(request: FlexibilityRequest) -> _Plan:
    named = named_arms(request.models)
    labels = [arm.label for arm in named]
    against = request.against or ("control" if "control" in labels else labels[0])
    if against not in labels:
        raise UserError(f"--against {against}: no arm has this label. There are: {', '.join(labels)}")
    unknown = next((each for each in request.chapters if each not in CHAPTERS), None)
    if unknown is not None:
        raise UserError(f"--chapters: there is no {unknown!r}. There are: {', '.join(CHAPTERS)}")
    choices = parse_sweep(request.sweep) if request.sweep else []
    if choices and "samples" not in request.chapters:
        raise UserError("--sweep chooses settings for samples, which --chapters leaves out")
    network = feature_network(request.extractor)  # also what finds out that a package is missing, before the long part
    targets = find_models(named)
    run = run_of(targets, request.run)
    devices = devices_here(run.recipe.parallel)
    torch.set_num_threads(threads_here(run.recipe.parallel.cpu_threads * len(devices)))
    device = torch.device(devices[0])
    images = first_images(run, request.split, request.images)
    families = len(set(images.families))
    if families < FEWEST and request.chapters != ("likelihood",):
        raise UserError(
            f"--images {request.images}: they are of {families} families, and a distance compares at least {FEWEST}. Ask for more."
        )
    arms = open_arms(named, targets, images, device)
    fixed, notes = fixed_orders(images)
    settings = replace(SampleSettings.from_recipe(run.recipe.sample), draft=0)  # which changes no image
    plan = _Plan(request.chapters, arms, images, fixed, notes, against, settings, network)
    if not choices:
        return plan
    for choice in choices:
        settings_of(settings, choice)
    others, which = sweep_images(images)
    noise = derived_seed("sweep", run.recipe.seed)  # not that of the figures, which a setting would be chosen for
    work = _sample_work(open_arms(named, targets, others, device), others, network, settings, noise)
    if len(others.rows) < CHOSEN_ON:
        few = f"Best settings were chosen on {len(others.rows)} images only: fewer than {CHOSEN_ON} choose mostly by chance."
        plan = replace(plan, notes=(*notes, few))
    return replace(plan, sweep=Sweep(work, choices), sweep_images=which)


def _sample_work(arms: Sequence[Arm], images: HeldoutImages, network: FeatureNetwork, settings: SampleSettings, seed: int) -> SampleWork:
    return SampleWork(arms, images.measured, network, settings, seed, images.run.recipe.parallel.precision)


def chosen_orders(settings: SampleSettings) -> dict[str, SampleSettings]:
    """The ways in which a model chooses the order of a sample, by their scores."""
    return {score: replace(settings, score=score) for score in SAMPLE_SCORES}


def describe(settings: SampleSettings) -> str:
    """Settings of samples as a phrase, with all that changes an image and is not the default (so without drafts)."""
    said = [f"guidance {settings.guidance:g}", f"temperature {settings.temperature:g}"]
    said += [f"top {settings.top_k} codes"] if settings.top_k else []
    usual = SampleSettings(guidance=settings.guidance, temperature=settings.temperature, top_k=settings.top_k, order_temperature=0.0)
    others = asdict(replace(usual, draft=settings.draft))
    return ", ".join([*said, *(f"{name} {value}" for name, value in asdict(settings).items() if value != others[name])])


def _pieces(sources: Sequence[Source]) -> list[Piece]:
    """All that sources rest on."""
    return [piece for source in sources for piece in source.needed]
