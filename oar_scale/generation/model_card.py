"""The model card: ``README.md`` of an exported folder, as people and the Hugging Face hub read it.

Every figure is one that the run has recorded (``run_history``), or that the files themselves tell. What is unknown is "not recorded".
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from oar_scale.config.schema import ClipTextConfig, FeaturesConfig, LabelsConfig, SentencePieceConfig
from oar_scale.generation.folder_files import DIFFUSERS_CODE, MODEL, ORDER_MAP, SAMPLES
from oar_scale.generation.model_bundle import FolderConfig
from oar_scale.json_object import JsonObject
from oar_scale.model.weights import open_model
from oar_scale.registry import MODELS, STAGES, current_name, kind_of, model_label
from oar_scale.text import cut

if TYPE_CHECKING:
    from oar_scale.generation.hub import HubPath  # brings huggingface_hub

UNKNOWN = "not recorded"
_ANY_CAPTION = "a red apple"


def model_card(folder: str, config: FolderConfig, history: JsonObject, public: HubPath | None) -> str:
    """The card of the model whose files lie in a local folder.

    Args:
        public: where it will be published; None: the examples are those of somebody who is in the folder.
    """
    there = set(os.listdir(folder))
    lines = [
        *_metadata(config, there),
        *_what(folder, config, history, public),
        *_use(config, history, public, there),
        *_data(config, history),
        *_training(history),
        *_evaluation(history),
        *_pictures(history, there),
        *_limits(config, history),
    ]
    return "\n".join(lines) + "\n"


def _metadata(config: FolderConfig, there: set[str]) -> Iterator[str]:
    """What the hub reads."""
    yield from ("---", f"license: {config.license or 'unknown'}", "library_name: oar_scale")
    if isinstance(config.text, SentencePieceConfig | ClipTextConfig):
        yield "pipeline_tag: text-to-image"
    tags = ["oar_scale", "image-generation", "autoregressive"]
    tags += [] if config.model.layout == "raster" else ["any-order", "inpainting"]
    tags += ["class-conditional"] if isinstance(config.text, LabelsConfig) else []
    tags += ["diffusers"] if DIFFUSERS_CODE in there else []
    yield from ("tags:", *(f"- {tag}" for tag in tags), "---", "")


def _what(folder: str, config: FolderConfig, history: JsonObject, public: HubPath | None) -> Iterator[str]:
    label = model_label(str(history.get("model", "")))
    title = f"{config.recipe or 'model'}{f' ({label})' if label else ''}"
    if public is not None:
        title = public.folder.rpartition("/")[2] or public.repo.partition("/")[2]
    spec, stored = open_model(os.path.join(folder, MODEL))
    parameters = sum(math.prod(info.shape) for info in stored.infos.values())
    size = _size(config)
    order = "in raster order" if spec.layout == "raster" else "cell by cell in any order"
    yield from (
        f"# {_text(title)}",
        "",
        f"An autoregressive transformer (layout `{spec.layout}`, {parameters / 1e6:.1f} M parameters) that draws pictures"
        f"{f' of {size} x {size} pixels' if size else ''} as {spec.grid} x {spec.grid} codes out of {spec.vocab_size}, {order}. "
        f"It is conditioned on {_prompts(config)}. Made with {_text(config.library)}.",
        "",
    )
    titles = {str(name): model.title for name, model in MODELS.items()}
    if (name := str(history.get("model"))) in titles:
        yield from (f"In its run it is {titles[name]}.", "")


def _size(config: FolderConfig) -> int | None:
    """Side of its pictures in pixels."""
    size = config.vq.spec.get("image_size") if config.vq else None
    return size if isinstance(size, int) else None


def _prompts(config: FolderConfig) -> str:
    match config.text:
        case SentencePieceConfig() as text:
            return f"captions (SentencePiece, at most {text.max_tokens} tokens)"
        case ClipTextConfig() as text:
            return f"captions, through the frozen text tower of {_text(text.architecture)}"
        case LabelsConfig() as text:
            return f"class labels, 0 to {text.classes - 1}"
        case FeaturesConfig() as text:
            return f"features, {text.rows} rows of {text.width}"
        case None:
            return "prompts whose encoder is not recorded"


def _use(config: FolderConfig, history: JsonObject, public: HubPath | None, there: set[str]) -> Iterator[str]:
    yield from ("## Use", "")
    prompt = _example(config, history)
    if config.vq is None or config.text is None or prompt is None:
        yield from ("`oar_scale.load` opens it: see the documentation of oar_scale for what it still needs to draw pictures.", "")
        return
    where, written = str(public or "."), json.dumps(prompt, ensure_ascii=False)
    yield from ("```python", "import oar_scale", "")
    yield f"model = oar_scale.load({where!r}){'' if public else '  # the folder that this file lies in'}"
    yield from (f"images = model.sample([{written}, {written}], seed=0)", 'images[0].save("picture.png")', "```", "")
    quarter = (_size(config) or 32) // 4
    if config.model.layout != "raster":
        box = f"{quarter},{quarter},{3 * quarter},{3 * quarter}"
        yield f"    oar edit picture.png --box {box} --prompt {shlex.quote(str(prompt))} --model {where}"
    yield from (f"    oar serve {where}", "")
    if DIFFUSERS_CODE in there:
        yield from ("With diffusers (`pip install 'oar_scale[diffusers]'`):", "", "```python", "from diffusers import DiffusionPipeline")
        yield from _pipeline_folder(public)
        yield from ("pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)",)
        yield from (f"images = pipeline([{written}, {written}], seed=0).images", "```", "")


def _pipeline_folder(public: HubPath | None) -> Iterator[str]:
    if public is None:
        yield from ("", 'folder = "."  # that this file lies in')
        return
    revision = "" if public.revision is None else f", revision={public.revision!r}"
    below = f" + {'/' + public.folder!r}" if public.folder else ""
    yield from ("from huggingface_hub import snapshot_download", "", f"folder = snapshot_download({public.repo!r}{revision}){below}")


def _example(config: FolderConfig, history: JsonObject) -> str | int | None:
    """A prompt; None where nobody types one."""
    if isinstance(config.text, LabelsConfig):
        return 0
    if not isinstance(config.text, SentencePieceConfig | ClipTextConfig):
        return None
    captions = [each for each in _list(history, "evaluation", "samples", "captions") if isinstance(each, str)]
    return next((each for each in captions if each.strip() and each.isprintable() and "`" not in each), _ANY_CAPTION)


def _data(config: FolderConfig, history: JsonObject) -> Iterator[str]:
    yield from ("## Data", "")
    results = _object(history, "stages", "data", "results")
    source = _at(history, "stages", "data", "settings", "data.source", "type")
    yield f"- Images: {_known(source)}; {_known(results.get('train'))} for training, {_known(results.get('heldout'))} held out"
    yield f"- Their attribution and licence: {_known(results.get('attribution') or None)}"
    if variants := results.get("heldout_with_variant_in_train"):
        yield f"- {_text(variants)} of the held-out images have a variant in training, and test combining what was seen"
    yield from (f"- Licence of the weights: {config.license or UNKNOWN}", "")


def _training(history: JsonObject) -> Iterator[str]:
    yield from ("## Training", "")
    stages = _object(history, "stages")
    tokenizer = _object(stages, "tokenizer", "results")
    if "psnr_db" in tokenizer:
        use = tokenizer.get("codebook_use")
        used = f", {use:.0%} of the codes in use" if isinstance(use, int | float) else ""
        yield from (f"Image tokenizer: {_number(tokenizer['psnr_db'], 1)} dB PSNR on held-out images{used}.", "")
    trained = {name: STAGES[kind_of(name)].training for name in stages if _object(stages, name, "results")}
    trained = {name: section for name, section in trained.items() if section}
    if not trained:
        yield from (f"The training of the model is {UNKNOWN}.", "")
        return
    yield from ("| stage | steps | images a step | learning rate | images/s | hours |", "| --- | --- | --- | --- | --- | --- |")
    for name, section in trained.items():
        results, settings = _object(stages, name, "results"), _object(stages, name, "settings")
        seconds = results.get("seconds")
        hours = _number(seconds / 3600, 2) if isinstance(seconds, int | float) else UNKNOWN
        figures = [
            _known(value) for value in (results.get("steps"), settings.get(f"{section}.global_batch"), settings.get(f"{section}.lr"))
        ]
        yield f"| {name} | {' | '.join(figures)} | {_number(results.get('images_per_s'), 1)} | {hours} |"
    yield ""
    if extract := _object(stages, "extract", "results"):
        score = _at(stages, "extract", "settings", "extract.score")
        yield from (f"Orders were extracted for {_known(extract.get('images'))} training images by the score `{_known(score)}`.", "")


def _evaluation(history: JsonObject) -> Iterator[str]:
    """What was measured of this model, and of the others where it is compared with them."""
    yield from ("## Evaluation", "")
    name, measured = str(history.get("model")), _object(history, "evaluation")
    rows, distances = list(_likelihoods(name, measured)), list(_distances(name, measured))
    if not rows + distances:
        yield from (f"{UNKNOWN.capitalize()}.", "")
        return
    yield from ("On held-out images; one training run: errors are those of the images alone.", "", "| measured | value |", "| --- | --- |")
    yield from (f"| {what} | {value} |" for what, value in rows + distances)
    yield ""
    if distances:
        yield from (
            "`kid_` and `fd_` are the kernel and the Fréchet distance of the features that they are named after (`efflite0`: "
            "EfficientNet-Lite0). They are no FID as it is published, and compare with figures of oar_scale on as many images alone.",
            "",
        )


def _likelihoods(name: str, measured: JsonObject) -> Iterator[tuple[str, str]]:
    images = _known(_at(measured, "nll", "images"))
    for entry in _rows(measured, "nll", "entries"):
        if _is(entry, "model", name) and entry.get("order") != "own gt_logprob":  # that one leaks
            yield f"nats per code, {_text(entry.get('order'))} orders, {images} images", _estimate(entry.get("nll"))
    for entry in _rows(measured, "nll", "differences"):
        if _is(entry, "first", name) and entry.get("order") != "own gt_logprob":
            pair = " − ".join(model_label(current_name(str(entry.get(side)))) for side in ("first", "second"))
            yield f"nats per code, {pair}, {_text(entry.get('order'))} orders", _estimate(entry.get("difference"))
    for entry in _rows(measured, "calibration"):
        if _is(entry, "model", name):
            yield "nats per code, NLL − entropy along own max_prob orders (above 0: over-confident)", _estimate(entry.get("gap"))
    for entry in _rows(measured, "captions"):
        if _is(entry, "model", name):
            yield "nats per code lost with the captions of other images", _estimate(entry.get("difference"))


def _distances(name: str, measured: JsonObject) -> Iterator[tuple[str, str]]:
    """Of the samples, and of real images to read them by."""
    for entry in _rows(measured, "distances"):
        compared = str(entry.get("name"))
        if compared == model_label(name) or compared.startswith("training images"):
            what = "samples" if compared == model_label(name) else _text(compared)
            features = _text(entry.get("features", "efflite0"))
            for figure, digits in (("kid", 3), ("fd", 1)):
                # Until version 0.1.0 figures were stored under the names of their features.
                value = entry.get(figure, entry.get(f"{figure}_efflite0"))
                yield f"`{figure}_{features}`, {_known(entry.get('samples'))} {what}", _number(value, digits)


def _pictures(history: JsonObject, there: set[str]) -> Iterator[str]:
    if ORDER_MAP in there:
        yield from ("## Order", "", "When cells are placed on average over the training images (dark: first).", "")
        if orders := _object(history, "evaluation", "orders"):
            found = f"{_known(orders.get('distinct'))} different orders of {_known(orders.get('images'))} images"
            near = orders.get("neighbour_share")
            steps = f"; {near:.0%} of the steps go to a neighbouring cell" if isinstance(near, int | float) else ""
            yield from (f"The any-order model found {found}{steps}.", "")
        yield from (f"![order map]({ORDER_MAP})", "")
    if SAMPLES in there:
        captions = [_text(caption) for caption in _list(history, "evaluation", "samples", "captions")]
        settings = _known(_at(history, "evaluation", "samples", "settings"))
        yield from ("## Samples", "", f"For the first held-out captions, unselected: {'; '.join(captions) or UNKNOWN}. {settings}.", "")
        yield from (f"![samples]({SAMPLES})", "")


def _limits(config: FolderConfig, history: JsonObject) -> Iterator[str]:
    yield from ("## Limits", "")
    if size := _size(config):
        yield f"- Pictures have {size} x {size} pixels; larger ones are edited at this size, or by windows of it."
    train = _at(history, "stages", "data", "results", "train")
    if isinstance(train, int):
        yield f"- It has seen {train:,} images: what they do not show it cannot draw, and it may repeat them."
    if isinstance(config.text, SentencePieceConfig):
        yield f"- Captions are cut after {config.text.max_tokens} tokens; words that no training caption has mean nothing to it."
    if config.model.layout == "raster":
        yield "- It draws in raster order: nothing can be edited."
    yield f"- Tests for bias, safety, or copies of training images: {UNKNOWN}."


def _at(value: object, *names: str) -> object:
    """What lies at a path of names in a JSON value; None where there is nothing."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _object(value: object, *names: str) -> JsonObject:
    found = _at(value, *names)
    return found if isinstance(found, dict) else {}


def _list(value: object, *names: str) -> list[object]:
    found = _at(value, *names)
    return found if isinstance(found, list) else []


def _rows(value: object, *names: str) -> list[JsonObject]:
    return [row for row in _list(value, *names) if isinstance(row, dict)]


def _is(entry: JsonObject, key: str, model: str) -> bool:
    return current_name(str(entry.get(key))) == model


def _estimate(value: object) -> str:
    return f"{_number(_at(value, 'mean'), 3)} ± {_number(_at(value, 'standard_error'), 3)}"


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−") if isinstance(value, int | float) else UNKNOWN


def _known(value: object) -> str:
    return UNKNOWN if value is None else _text(value)


def _text(value: object) -> str:
    """Somebody's text within a line of Markdown: no markup of HTML, no new line, no new column."""
    line = cut(" ".join(str(value).split()), lines=1, characters=1000)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|").replace("`", "'")
