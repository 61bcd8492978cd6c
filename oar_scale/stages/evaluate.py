"""Stage ``evaluate``: what the models are worth on held-out images, in numbers and in pictures.

Likelihoods (random and raster orders, the model's own; captions of other images), samples and their distance to held-out images, edits
(``evaluation.edit_examples``), and the orders that were extracted. The same images, captions and noise for every model. All of it over all
held-out images, and over those that training has a variant of and has none of, apart.

The result is ``evaluation.json`` with its pictures (``evaluation.evaluation_record``) in the run's local folder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oar_scale.data.hashing import image_numbers
from oar_scale.errors import UserError
from oar_scale.evaluation import result_tables as summary
from oar_scale.evaluation.edit_examples import EditedImages
from oar_scale.evaluation.eval_tasks import (
    BruteForce,
    BruteForceTask,
    Drawn,
    EvalTarget,
    EvalTask,
    Likelihoods,
    LikelihoodTask,
    Results,
    SamplingTask,
    run_eval_tasks,
)
from oar_scale.evaluation.evaluation_record import Evaluation, save_evaluation
from oar_scale.evaluation.extractors import ExtractorSpec
from oar_scale.evaluation.features import features_label, picture_features
from oar_scale.evaluation.likelihood import random_orders, raster_orders, shuffled_captions
from oar_scale.evaluation.nearest import nearest_pictures
from oar_scale.evaluation.pictures import decode_pictures, mean_psnr, step_of_cell
from oar_scale.evaluation.result_tables import ComparedFeatures, Families, Features
from oar_scale.generation.settings import SampleSettings
from oar_scale.json_object import JsonObject
from oar_scale.orders.analysis import neighbour_share
from oar_scale.orders.order_files import run_files
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.registry import ModelName, model_label
from oar_scale.report.run_metadata import describe_prompts, stage_results, tokenizer_origin
from oar_scale.results.estimates import GroupName, ImageGroup
from oar_scale.results.examples import DrawingExample, OrderExample, OrderSummary, Picture, SampleGrid, SampleRow, TokenizerMetadata
from oar_scale.run.artifacts import (
    Tokens,
    model_files,
    prompt_encoder,
    read_pictures,
    read_tokens,
    read_train_orders,
    require,
    training_pictures,
    without_variant,
)
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import devices_here, on_gpu_node, threads_here
from oar_scale.storage import fetch
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.prompts import cond_inputs_of
from oar_scale.tokenizers.vq import codebook_use, load_vq

TASK_IMAGES = 64
BRUTE_FORCE_IMAGES = 2
"""Each costs a full forward pass for every one of N (N + 1) / 2 candidates: 20 s at 64 cells and 6 M parameters."""
ORDER_EXAMPLES = 6
NEAREST_AMONG = 10_000
"""Training images that samples are compared with, at most."""
RECONSTRUCTIONS = 12


@dataclass(frozen=True)
class Inputs:
    """Everything the evaluation reads, open."""

    models: dict[ModelName, str]
    """Local files."""
    vq: ImageTokenizer
    """On a GPU where the evaluation has one."""
    vq_file: str
    heldout: Tokens
    heldout_pictures: list[Picture]
    """Of the first images, as many as anything is measured on; :attr:`cond_inputs_S` likewise."""
    cond_inputs_S: Tensor
    """What the models are conditioned on for each held-out image, on the CPU."""
    train: Tokens
    train_pictures: list[Picture]
    """Of the first training images."""
    train_cond_inputs_S: Tensor
    orders_SN: NDArray[np.uint16]
    """The stored order of every training image."""
    compared: int
    """Images on each side of a distance."""
    novel_S: NDArray[np.bool_]
    """Held-out images that training has no variant of."""
    families_S: Families
    """Of the held-out images: those of one family are not independent of each other."""
    extractor: ExtractorSpec
    """What distances compare pictures by."""

    def features_of(self, pictures: list[Picture]) -> Features:
        """What the extractor sees in pictures, where the image tokenizer is."""
        return picture_features(pictures, self.extractor, self.vq.device)


def run_evaluate(run: Run) -> JsonObject:
    """Measure and draw, on GPUs where the recipe trains on some; returns the few numbers to look at first.

    Raises:
        UserError: a stage before this one has not finished (names it), or the extra ``eval`` is not installed.
    """
    parallel = run.recipe.parallel
    evaluation = on_gpu_node(run, measure, gpus=parallel.max_workers * parallel.gpus_per_worker)
    save_evaluation(evaluation, run.local())
    return _highlights(run, evaluation)


def measure(run: Run) -> Evaluation:
    """All figures and pictures, computed on this machine. Raises as :func:`run_evaluate`."""
    parallel = run.recipe.parallel
    devices = devices_here(parallel)
    torch.set_num_threads(threads_here(parallel.cpu_threads * len(devices)))
    inputs = _read(run, torch.device(devices[0]))
    # Before the long part: this is also what finds out that the extra `eval` is missing.
    reference_SF = inputs.features_of(inputs.heldout_pictures[: inputs.compared])
    edited = _edited_images(run, inputs)
    tasks = [*_eval_tasks(run, inputs), *edited.tasks()]
    with run.console.progress(len(tasks), "likelihoods, drawings, checks: task") as tally:
        results = run_eval_tasks(tasks, devices, parallel.cpu_threads, tally.advance)
    nll, features = summary.per_image(results.of(Likelihoods)), _compared_features(inputs, results, reference_SF)
    samples, families_S = _samples(run, inputs, results), inputs.families_S[: len(nll["ordered"]["random"])]
    return Evaluation(
        nll=summary.likelihood_table(nll, families_S),
        pretrain=summary.pretrain_effect(nll, families_S),
        calibration=summary.calibrations(nll, families_S),
        captions=summary.caption_dependence(nll, families_S),
        distances=features.rows(run.recipe.seed),
        distance_differences=features.differences(),
        groups=_groups(run, inputs, nll, features),
        samples=samples,
        drawing=_drawing(samples, results),
        edits=edited.examples(results),
        gallery=edited.gallery(results),
        leaks=edited.leaks(results),
        orders=_orders(run, inputs, results),
        tokenizer=_tokenizer(run, inputs),
    )


def _read(run: Run, device: torch.device) -> Inputs:
    """Open it all. Of the held-out images as many are looked at as something is measured on, however many there are."""
    models = model_files(run)
    vq_file = fetch(require(run, run.vq_uri, "tokenizer"), run.cache)
    prompts = prompt_encoder(run)
    heldout, train = (read_tokens(run, split, field=prompts.field) for split in ("heldout", "train"))
    if len(heldout.keys) < 8:
        raise UserError(
            f"{run.at('tokens', 'heldout')}: {len(heldout.keys)} held-out images are too few to evaluate; raise data.heldout_fraction."
        )
    compared = min(run.recipe.evaluate.feature_images, len(heldout.keys))
    used = max(compared, run.recipe.evaluate.nll_images, run.recipe.sample.images)
    return Inputs(
        models=models,
        vq=load_vq(vq_file).to(device),
        vq_file=vq_file,
        heldout=heldout,
        heldout_pictures=read_pictures(run, "heldout", heldout.keys[:used]),
        cond_inputs_S=cond_inputs_of(prompts, heldout.prompts[:used], device),
        train=train,
        train_pictures=read_pictures(run, "train", train.keys[: max(compared, ORDER_EXAMPLES)]),
        train_cond_inputs_S=cond_inputs_of(prompts, train.prompts[:BRUTE_FORCE_IMAGES], device),
        orders_SN=read_train_orders(run, train),
        compared=compared,
        novel_S=without_variant(heldout, train),
        families_S=heldout.families_S,
        extractor=_extractor(run),
    )


def _groups(run: Run, inputs: Inputs, nll: summary.PerImage, features: ComparedFeatures) -> tuple[ImageGroup, ...]:
    """The figures over novel and over near-duplicate images apart, where there are both."""
    by_name: dict[GroupName, NDArray[np.bool_]] = {"novel": inputs.novel_S, "near-duplicate": ~inputs.novel_S}
    groups = []
    for name, member_S in by_name.items():
        with_nll = torch.from_numpy(member_S[: len(nll["ordered"]["random"])])
        if bool(member_S.all()) or int(with_nll.sum()) < 2:
            continue
        of_group = {model: {what: values[with_nll] for what, values in row.items()} for model, row in nll.items()}
        families_S = inputs.families_S[: len(with_nll)][with_nll.numpy()]
        compared = features.of(member_S[: inputs.compared])
        groups.append(summary.image_group(name, of_group, families_S, compared, run.recipe.seed))
    return tuple(groups)


# -- what there is to do: longest first, so that all processes end at about the same time ----------------------------------


def _eval_tasks(run: Run, inputs: Inputs) -> list[EvalTask]:
    return [_brute_force_task(run, inputs), *_sampling_tasks(run, inputs), *_likelihood_tasks(run, inputs)]


def _brute_force_task(run: Run, inputs: Inputs) -> EvalTask:
    target = EvalTarget("any_order", inputs.models["any_order"], inputs.train_cond_inputs_S.numpy())
    first = slice(BRUTE_FORCE_IMAGES)
    numbers_S, settings = image_numbers(inputs.train.keys[first]), ExtractionSettings.from_recipe(run.recipe.extract)
    return BruteForceTask(target, inputs.train.codes_SN[first], inputs.orders_SN[first], settings, numbers_S)


def _sampling_tasks(run: Run, inputs: Inputs) -> list[EvalTask]:
    """The captions of the images that samples are compared with; the first of them are the ones shown."""
    recipe, settings = run.recipe, SampleSettings.from_recipe(run.recipe.sample)
    count = max(inputs.compared, min(recipe.sample.images, len(inputs.heldout.keys)))
    return [
        SamplingTask(
            EvalTarget(name, file, inputs.cond_inputs_S[part].numpy(), part.start),
            inputs.vq_file,
            settings,
            recipe.seed,
            recipe.parallel.precision,
            recipe.sample.order,
            run_files(run.at()),
            run.model_uri(name),
            inputs.extractor,
        )
        for part in _task_slices(count)
        for name, file in inputs.models.items()
        if name != "base"
    ]


def _likelihood_tasks(run: Run, inputs: Inputs) -> list[EvalTask]:
    recipe, cells = run.recipe, run.recipe.grid**2
    count = min(recipe.evaluate.nll_images, len(inputs.heldout.keys))
    random_SN, raster_SN = random_orders(count, cells, recipe.seed), raster_orders(count, cells)
    cond_inputs_S = inputs.cond_inputs_S[:count]
    other_S = shuffled_captions(cond_inputs_S, recipe.seed).numpy() if len(cond_inputs_S.unique(dim=0)) > 1 else None
    own, precision = ExtractionSettings.from_recipe(recipe.extract), recipe.parallel.precision
    tasks: list[EvalTask] = []
    for part in _task_slices(count):
        codes_SN, random = inputs.heldout.codes_SN[part], {"random": random_SN[part].numpy()}
        for name, file in inputs.models.items():
            target = EvalTarget(name, file, inputs.cond_inputs_S[part].numpy(), part.start)
            if name == "base":
                tasks.append(LikelihoodTask(target, codes_SN, random))
            else:
                orders = {**random, "raster": raster_SN[part].numpy()}
                tasks.append(LikelihoodTask(target, codes_SN, orders, None if other_S is None else other_S[part], own, precision))
    return tasks


def _extractor(run: Run) -> ExtractorSpec:
    chosen = run.recipe.evaluate.features
    return ExtractorSpec(chosen.name, chosen.weights, chosen.sha256)


def _task_slices(count: int) -> list[slice]:
    return [slice(start, min(start + TASK_IMAGES, count)) for start in range(0, count, TASK_IMAGES)]


# -- the results ---------------------------------------------------------------------------------------------------------


def _compared_features(inputs: Inputs, results: Results, reference_SF: Features) -> ComparedFeatures:
    count = inputs.compared
    real: dict[str, Features] = {}
    if len(inputs.train_pictures) >= count:
        decoded = decode_pictures(inputs.vq, torch.from_numpy(inputs.train.codes_SN[:count]))
        real = {
            "training images": inputs.features_of(inputs.train_pictures[:count]),
            "training images, encoded and decoded": inputs.features_of(decoded),
        }
    drawn: dict[ModelName, Features] = {
        name: np.concatenate([task.features_SF for task in results.of(Drawn) if task.model == name])[:count]
        for name in inputs.models
        if name != "base"
    }
    return ComparedFeatures(reference_SF, inputs.families_S[:count], drawn, real, features_label(inputs.extractor))


def _samples(run: Run, inputs: Inputs, results: Results) -> SampleGrid:
    sample, columns = run.recipe.sample, tuple(name for name in inputs.models if name != "base")
    count = min(sample.images, len(inputs.heldout.keys))
    pictures = {}
    for name in columns:
        codes_SN = np.concatenate([task.codes_SN for task in results.of(Drawn) if task.model == name])[:count]
        pictures[name] = decode_pictures(inputs.vq, torch.from_numpy(codes_SN))
    nearest = nearest_pictures(pictures["ordered"], training_pictures(run, NEAREST_AMONG))
    rows = tuple(
        SampleRow(
            inputs.heldout.captions[row],
            inputs.heldout_pictures[row],
            tuple(pictures[name][row] for name in columns),
            novel=bool(inputs.novel_S[row]),
            nearest=nearest[row],
        )
        for row in range(count)
    )
    settings = f"Guidance {sample.guidance:g}, temperature {sample.temperature:g}"
    settings += f", top {sample.top_k} codes" if sample.top_k else ""
    order = f"order {sample.order}" if sample.order else "each model in its own confidence order"
    compared = min(NEAREST_AMONG, len(inputs.train.keys))
    return SampleGrid(columns, f"{settings}; {order}, all with the same noise", rows, compared)


def _drawing(samples: SampleGrid, results: Results) -> DrawingExample:
    """The ordered model's first sample."""
    first, (drawn, *_) = samples.rows[0], (task for task in results.of(Drawn) if task.model == "ordered")
    return DrawingExample(first.caption, "ordered", first.samples[samples.columns.index("ordered")], drawn.order_SN[0])


def _edited_images(run: Run, inputs: Inputs) -> EditedImages:
    return EditedImages(
        inputs.models,
        inputs.heldout_pictures,
        inputs.heldout.captions,
        inputs.heldout.codes_SN,
        inputs.families_S,
        inputs.cond_inputs_S,
        run.recipe.grid,
        inputs.vq_file,
        SampleSettings.from_recipe(run.recipe.sample),
        run.recipe.seed,
        run.recipe.parallel.precision,
    )


def _orders(run: Run, inputs: Inputs, results: Results) -> OrderSummary:
    orders_SN, captions = inputs.orders_SN, inputs.train.captions
    steps = step_of_cell(torch.from_numpy(orders_SN[:ORDER_EXAMPLES].astype(np.int64)))
    return OrderSummary(
        score=run.recipe.extract.score,
        images=len(orders_SN),
        distinct=len(np.unique(orders_SN, axis=0)),
        mean_step_of_cell=summary.mean_steps(orders_SN),
        kendall_to_raster=summary.raster_distance(orders_SN),
        neighbour_share=float(neighbour_share(orders_SN, run.recipe.grid).mean()),
        seconds=float(stage_results(run, "extract").get("seconds", 0.0)),
        examples=tuple(OrderExample(captions[row], inputs.train_pictures[row], steps[row]) for row in range(len(steps))),
        brute_force=summary.brute_force_text(results.of(BruteForce)[0]),
    )


def _tokenizer(run: Run, inputs: Inputs) -> TokenizerMetadata:
    originals = inputs.heldout_pictures[: inputs.compared]
    decoded = decode_pictures(inputs.vq, torch.from_numpy(inputs.heldout.codes_SN[: inputs.compared]))
    measured = stage_results(run, "tokenizer")
    return TokenizerMetadata(
        origin=tokenizer_origin(run),
        grid=inputs.vq.spec.grid,
        codebook_size=inputs.vq.spec.codebook_size,
        codebook_use=codebook_use([torch.from_numpy(inputs.train.codes_SN)], inputs.vq.spec.codebook_size),
        psnr_db=mean_psnr(originals, decoded),
        prompts=describe_prompts(run, measured),
        reconstruction_fd_efflite0=measured.get("reconstruction_fd_efflite0"),
        originals=tuple(originals[:RECONSTRUCTIONS]),
        reconstructions=tuple(decoded[:RECONSTRUCTIONS]),
    )


def _highlights(run: Run, evaluation: Evaluation) -> JsonObject:
    """The main numbers, printed on the console and kept with the stage."""
    differences = {f"{model_label(d.first)} - {model_label(d.second)}, {d.order}": asdict(d.difference) for d in evaluation.nll.differences}
    captions = {model_label(row.model): asdict(row.difference) for row in evaluation.captions}
    kid_name = next((f"kid_{row.features}" for row in evaluation.distances), "kid_efflite0")
    kid = {row.name: row.kid for row in evaluation.distances}
    kid_differences = {f"{model_label(row.first)} - {model_label(row.second)}": asdict(row.kid) for row in evaluation.distance_differences}
    gaps = {model_label(row.model): asdict(row.gap) for row in evaluation.calibration}
    for name, difference in differences.items():
        if name.endswith("own gt_logprob"):
            continue  # it leaks; the report has it as a diagnosis
        run.console.say(f"  {name}: {difference['mean']:+.4f} +- {difference['standard_error']:.4f} nats per code")
    for name, cost in captions.items():
        run.console.say(f"  captions of other images, {name}: {cost['mean']:+.4f} +- {cost['standard_error']:.4f} nats per code")
    for name, gap in gaps.items():
        run.console.say(
            f"  NLL - entropy along own max_prob orders, {name}: {gap['mean']:+.4f} +- {gap['standard_error']:.4f} nats per code"
        )
    for name, difference in kid_differences.items():
        run.console.say(f"  {name}, {kid_name} (paired): {difference['mean']:+.4f} +- {difference['standard_error']:.4f}")
    run.console.say(f"  {evaluation.orders.brute_force}")
    return {
        "nll_images": evaluation.nll.images,
        "differences": differences,
        "calibration_gap": gaps,
        "shuffled_minus_own": captions,
        kid_name: kid,
        f"{kid_name}_differences": kid_differences,
    }
